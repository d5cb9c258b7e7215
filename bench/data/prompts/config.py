"""What a prompts config may say, checked once at the boundary."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class PromptsConfig(BaseModel):
    """Which images with which questions, how many, and how many a call of the network takes.

    `embedded` draws scenes that no task shows. `file` reads a parquet file at `path`, `hub` the
    `split` of a data set; both take `count` rows drawn with `seed` and read their columns `image`
    and `question`, or as these are called in `image_column` and `question_column`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: Literal["embedded", "file", "hub"]
    path: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    image_column: str = "image"
    question_column: str = "question"
    count: int = Field(default=100, ge=1)
    batch: int = Field(default=10, ge=1)
    seed: int = Field(default=1234, ge=0)

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.source == "file") != (self.path is not None):
            raise ValueError("prompts.source=file needs prompts.path, no other source takes one")
        if (self.source == "hub") != (self.dataset is not None):
            raise ValueError("prompts.source=hub needs prompts.dataset, no other source takes one")
        return self
