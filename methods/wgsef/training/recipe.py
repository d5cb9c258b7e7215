"""How a run trains: length, batches, optimizer, and when the selection is made."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Recipe(BaseModel):
    """The knobs of training that all solvers share, so that they can be compared.

    The first `sparse_share` of the steps belongs to the solver; then the groups that stay are
    chosen, the mask is frozen and the rest fine-tunes. `decay` does not touch the weights of
    groups whose solver decays them itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(default=30, ge=1)
    batch: int = Field(default=64, ge=2)
    optimizer: Literal["sgd", "adam"] = "sgd"
    rate: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    decay: float = Field(default=5e-4, ge=0)
    sparse_share: float = Field(default=0.7, ge=0.1, le=1)
    save_every: int = Field(default=0, ge=0, description="steps; 0 saves after every epoch")
