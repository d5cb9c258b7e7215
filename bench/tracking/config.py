"""What a tracker config may say, checked once at the boundary."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class TrackerConfig(BaseModel):
    """One entry of the `tracker` config group: Weights & Biases, or none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["wandb", "none"] = "wandb"
    project: str = "slimbench"
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"
