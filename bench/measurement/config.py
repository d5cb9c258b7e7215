"""What a costs config may say, checked once at the boundary."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from bench.measurement.conventions import Name

Quantity = Literal["latency", "memory", "energy", "limits"]
"""What can be measured besides what is counted; `limits` are the device's own."""

Grid = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class TimingConfig(BaseModel):
    """At which shapes a model is measured, and how often.

    Language models: every batch with every length in tokens. Models that see images: every batch
    with every number of words after one image. Image classifiers: every batch. An answer has
    `new_tokens` tokens. A round times each contestant once; warm-up ends when the times have
    settled, after `warm_up` rounds at the latest. There are `rounds` of them, and more until every
    interval of a ratio reaches at most `precision` of it to either side; none is added beyond
    `most_rounds` or after `most_seconds`, and what is wider then is marked. Where the machine was
    loaded all rounds are repeated, `attempts` times in all, and what is kept then is marked.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    batches: Grid = (1,)
    lengths: Grid = (512,)
    words: Grid = (32,)
    new_tokens: int = Field(default=32, ge=2)
    rounds: int = Field(default=15, ge=5)
    precision: float = Field(default=0.03, gt=0, lt=1)
    most_rounds: int = Field(default=200, ge=5)
    most_seconds: float = Field(default=90.0, gt=0)
    warm_up: int = Field(default=20, ge=1)
    attempts: int = Field(default=2, ge=1)
    energy_seconds: float = Field(default=3.0, gt=0)


class FlopsConfig(BaseModel):
    """How FLOPs are told beside the suite's own count: a paper's `convention` by name, or none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    convention: Name | None = None


class CostsConfig(BaseModel):
    """One entry of the `costs` config group.

    Counted: at `batch` sequences of `length` tokens for a language model; for a model that sees
    images, at one image and `words` words. Measured: what `measure` lists, at the shapes that
    `timing` says.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    batch: int = Field(default=1, ge=1)
    length: int = Field(default=512, ge=1)
    words: int = Field(default=32, ge=1)
    flops: FlopsConfig = FlopsConfig()
    measure: tuple[Quantity, ...] = ()
    timing: TimingConfig = TimingConfig()
