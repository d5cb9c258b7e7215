"""Schema of the `costs` section of a config, validated at the boundary."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from bench.measurement.conventions import Name

Quantity = Literal["latency", "memory", "energy", "limits"]
"""Quantities that can be measured in addition to the counts; `limits` is the device's roofline."""

Grid = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class TimingConfig(BaseModel):
    """Shapes at which a model is measured, and the number of repetitions.

    Language models run every batch with every length in tokens; vision-language models every batch
    with every number of words after one image; image classifiers every batch. A generation has
    `new_tokens` tokens.

    A round times each candidate once. Warm-up ends when the times have settled, after at most
    `warm_up` rounds. At least `rounds` rounds follow; more are added until the interval of every
    ratio extends at most `precision` of its value to either side, up to `most_rounds` rounds or
    `most_seconds` seconds. A result whose interval is still wider is marked. On a loaded machine
    all rounds are repeated, in `attempts` attempts at most; the best one is kept and marked.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    batches: Grid = (1,)
    lengths: Grid = (512,)
    words: Grid = (32,)
    # The first token belongs to the prefill: seconds per decoded token need a second one.
    new_tokens: int = Field(default=32, ge=2)
    rounds: int = Field(default=15, ge=5)
    precision: float = Field(default=0.03, gt=0, lt=1)
    most_rounds: int = Field(default=200, ge=5)
    most_seconds: float = Field(default=90.0, gt=0)
    warm_up: int = Field(default=20, ge=1)
    attempts: int = Field(default=2, ge=1)
    # Per window: a GPU's energy counter advances only about every 0.1 s.
    energy_seconds: float = Field(default=3.0, gt=0)


class FlopsConfig(BaseModel):
    """Paper's FLOP `convention` to report next to slimbench's own counts; none by default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    convention: Name | None = None


class CostsConfig(BaseModel):
    """One entry of the `costs` config group.

    FLOPs are counted at `batch` sequences of `length` tokens for a language model, and at one image
    and `words` words for a vision-language model. `measure` lists what is measured in addition, at
    the shapes of `timing`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    batch: int = Field(default=1, ge=1)
    length: int = Field(default=512, ge=1)
    words: int = Field(default=32, ge=1)
    flops: FlopsConfig = FlopsConfig()
    measure: tuple[Quantity, ...] = ()
    timing: TimingConfig = TimingConfig()
