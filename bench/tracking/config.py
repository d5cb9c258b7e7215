"""Schema of the `tracker` section of a config, validated at the boundary."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

INIT_SECONDS = 20.0
"""A healthy server answers much sooner; the client's own limit is 90 s."""


class TrackerConfig(BaseModel):
    """One entry of the `tracker` config group: Weights & Biases, or none.

    Sending a record is abandoned after `timeout` seconds; `bench track` sends it later.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["wandb", "none"] = "wandb"
    project: str = "slimbench"
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"
    timeout: float = Field(default=120, gt=0)
