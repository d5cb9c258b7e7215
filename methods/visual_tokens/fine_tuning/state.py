"""Where a fine-tuning is: what its next steps depend on, written to a checkpoint and read back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from methods import checkpoint
from methods.checkpoint import Checkpoint


@dataclass
class State:
    """The trained weights, AdamW's moments, the learning rate's place, the losses so far."""

    trained: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Any
    losses: list[float] = field(default_factory=list)

    def checkpoint(self) -> Checkpoint:
        """Return it as tensors and JSON values; there is a loss for every step."""
        tensors = checkpoint.named(
            weights={str(number): weight for number, weight in enumerate(self.trained)},
            optimizer=checkpoint.optimizer_tensors(self.optimizer),
        )
        return Checkpoint(len(self.losses), tensors, {"losses": self.losses})

    @torch.no_grad()
    def go_on(self, saved: Checkpoint) -> None:
        """Take over where a killed training was."""
        for number, weight in saved.part("weights").items():
            self.trained[int(number)].copy_(weight)
        checkpoint.load_optimizer(self.optimizer, saved.part("optimizer"))
        self.losses = saved.state["losses"]
        self.schedule.last_epoch = saved.step
        for group, rate in zip(self.optimizer.param_groups, self._rates(), strict=True):
            group["lr"] = rate

    def _rates(self) -> list[float]:
        """Return what the schedule says for the step that comes next."""
        functions = zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        return [rate * function(self.schedule.last_epoch) for rate, function in functions]
