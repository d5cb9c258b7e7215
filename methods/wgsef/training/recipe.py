"""Training settings: length, batches, optimizer, and the time of the selection."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Recipe(BaseModel):
    """Training settings that all solvers share, so that they can be compared.

    The solver acts during the first `sparse_share` of the steps; then the groups to keep are
    selected, the mask is frozen and the rest of the steps fine-tunes. `decay` skips the weights of
    groups if the solver decays them itself.
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
