"""State of a fine-tuning: everything its next steps depend on, to and from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from methods import checkpoint
from methods.checkpoint import Checkpoint


@dataclass
class State:
    """Trained weights, AdamW's moments, the learning-rate schedule, and the losses so far."""

    trained: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Any
    losses: list[float] = field(default_factory=list)

    def checkpoint(self) -> Checkpoint:
        """Return the state as tensors and JSON values; the number of losses is the step."""
        tensors = checkpoint.named(
            weights={str(number): weight for number, weight in enumerate(self.trained)},
            optimizer=checkpoint.optimizer_tensors(self.optimizer),
        )
        return Checkpoint(len(self.losses), tensors, {"losses": self.losses})

    @torch.no_grad()
    def go_on(self, saved: Checkpoint) -> None:
        """Restore the state of an interrupted training."""
        for number, weight in saved.part("weights").items():
            self.trained[int(number)].copy_(weight)
        checkpoint.load_optimizer(self.optimizer, saved.part("optimizer"))
        self.losses = saved.state["losses"]
        # Only the step is stored: the schedule is a function of it, so rates are computed from this
        # run's settings. Setting `last_epoch` does not change the optimizer's rates, hence the
        # loop.
        self.schedule.last_epoch = saved.step
        for group, rate in zip(self.optimizer.param_groups, self._rates(), strict=True):
            group["lr"] = rate

    def _rates(self) -> list[float]:
        """Return the scheduled learning rates of the next step."""
        functions = zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        return [rate * function(self.schedule.last_epoch) for rate, function in functions]
