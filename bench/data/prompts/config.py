"""The `prompts` section of a config."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class PromptsConfig(BaseModel):
    """Source of the image prompts, their number, and the batch size of a forward.

    `embedded` draws scenes that appear in no task. `file` reads a parquet file at `path`, `hub` the
    `split` of the data set `dataset` (with configuration `subset`); both draw `count` rows with
    `seed` and read the columns named by `image_column` and `question_column`.
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
            raise ValueError("prompts.path is required by source=file and by no other source")
        if (self.source == "hub") != (self.dataset is not None):
            raise ValueError("prompts.dataset is required by source=hub and by no other source")
        return self
