"""What a costs config may say, checked once at the boundary."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from bench.measurement.conventions import Name


class FlopsConfig(BaseModel):
    """How FLOPs are told beside the suite's own count: a paper's `convention` by name, or none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    convention: Name | None = None


class CostsConfig(BaseModel):
    """One entry of the `costs` config group: the shapes at which costs are counted.

    `batch` sequences of `length` tokens for a language model; for a model that sees images, one
    image and `words` words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    batch: int = Field(default=1, ge=1)
    length: int = Field(default=512, ge=1)
    words: int = Field(default=32, ge=1)
    flops: FlopsConfig = FlopsConfig()
