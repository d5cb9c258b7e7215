"""WGSEF inside the fine-tuning of a language model: micro-experts fade out as the others learn.

Shapes: B rows of text, L tokens a row, M routed micro-experts of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.errors import UserError
from bench.method import Context, MethodReport
from bench.models.anatomy import Anatomy, MoEBlock
from bench.models.model import Model
from bench.models.observation import observing
from methods import checkpoint
from methods.activations import Activations
from methods.baselines.micro_scores import magnitudes
from methods.checkpoint import Checkpoint, Keeper
from methods.micro_pruning import MicroPruning
from methods.moe_pruning import calibration_of, refuse_offloaded
from methods.walking import refuse_nan, walk
from methods.wgsef.groups.partition import Partition
from methods.wgsef.groups.transformer import micro_experts
from methods.wgsef.solvers.envelope import Debiased
from methods.wgsef.solvers.solver import Frozen, Scene, Solver
from methods.wgsef.training.allocation import Allocation
from methods.wgsef.training.optimizers import ProximalAdam
from methods.wgsef.training.schedule import learning_rate

CHUNK = 4096
"""Tokens shown to one expert at a time; no result depends on it."""
UNSEEN = 1e-6
"""The relative energy of a micro-expert that was never active: an empty group has no budget."""


class WgsefFinetune(MicroPruning):
    """Train the routed experts on calibration text while the debiased WGSEF thins them out.

    Groups are micro-experts: a row of gate and of up and a column of down. Each step is one of
    AdamW on `rows` rows of text, followed by the operator in each layer under that layer's budget,
    which all comes from the routed experts. Norms count in the unit in which a group's norm is at
    first its energy RMS(phi) ||w||, for weights alone do not say how strongly text drives a neuron
    (specification section 7, 6). After `sparse_share` of the `steps` the mask is frozen.
    Everything but the routed experts keeps its weights. Use float32: steps are small.
    """

    uses_calibration: ClassVar[bool] = True

    steps: int = Field(default=60, ge=2)
    rows: int = Field(default=8, ge=1)
    rate: float = Field(default=5e-4, gt=0)
    sparse_share: float = Field(default=0.7, ge=0.1, le=1)

    def check(self, anatomy: Anatomy) -> None:
        """Refuse what `MicroPruning` refuses, and budgets that routed experts cannot give."""
        super().check(anatomy)
        self._share_of_routed(anatomy)

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Train, freeze, tune and take out."""
        calibration = calibration_of(context)
        anatomy = model.anatomy
        refuse_offloaded(anatomy.moe)
        partition = Partition(model.network, micro_experts(model.network))
        history, alive = self._train(model, partition, calibration.tokens, context)
        dead = [~part for part in partition.split(partition.alive())]
        layers = [
            self.take_out(block, block.d_shared + dead_M.nonzero().flatten())
            for block, dead_M in zip(anatomy.moe, dead, strict=True)
        ]
        more = {
            "calibration": calibration.fingerprint,
            "alive_before_selection": alive,
            "history": history,
        }
        return self.conclude(model, anatomy, layers, **more)

    def _share_of_routed(self, anatomy: Anatomy) -> float:
        """Return which share of the routed micro-experts every layer loses."""
        shares = {
            budget / sum(block.widths)
            for block, budget in zip(anatomy.moe, self.budgets(anatomy), strict=True)
        }
        if len(shares) > 1:
            raise UserError(
                f"the MoE layers of {anatomy.architecture} differ, wgsef_finetune needs them alike"
            )
        share = shares.pop()
        if share >= 1:
            raise UserError(
                f"ratio={self.ratio} is more than the routed experts alone have to give"
            )
        return share

    def _units(
        self, model: Model, partition: Partition, tokens_NL: Tensor, context: Context
    ) -> Tensor:
        """Return energy over norm, [M], the energies of each layer relative to their mean."""

        def watching(seen: dict[MoEBlock, Activations]) -> AbstractContextManager[None]:
            return observing(seen, CHUNK)

        told, energies = context.progress, []
        seen = walk(model, tokens_NL, Activations, watching, self.rows, False, told)
        for block, observer in seen:
            energy_N = (observer.square_sum() * magnitudes(block)).sqrt()[block.d_shared :]
            refuse_nan(block, energy_N)
            # An expert that no token visited goes first, but it does not go for nothing.
            energies.append((energy_N / energy_N.mean()).clamp(min=UNSEEN))
        return torch.cat(energies) / partition.norms().clamp(min=torch.finfo(torch.float32).tiny)

    def _train(
        self, model: Model, partition: Partition, tokens_NL: Tensor, context: Context
    ) -> tuple[list[dict[str, float]], int]:
        """Return a line of history for each tenth of the steps, and who was left when frozen."""
        sparse = max(1, round(self.sparse_share * self.steps))
        share = self._share_of_routed(model.anatomy)
        allocation = Allocation(partition, share, "layer", floor=0.0)
        scene = Scene(model.network, partition, allocation, sparse, self.steps, tokens_NL[:1])
        trained = list(partition.owned_parameters().values())
        keeper = Keeper(context.folder, context.progress)
        saved = keeper.last()
        solver = Debiased(scene)
        if saved is None:
            solver.unit_M = self._units(model, partition, tokens_NL, context)
        optimizer = ProximalAdam(trained, solver, self.rate)
        run = _Run(trained, optimizer, partition.groups)
        if saved is not None:
            run.go_on(saved, scene)
        drawn = islice(_drawn(tokens_NL, self.rows, context.seed), run.step, None)
        for weight in trained:
            weight.requires_grad_(True)
        for step in context.progress.track(range(run.step, self.steps), "fine-tuning"):
            if step == sparse:
                run.freeze(scene)
            factor = learning_rate((step + 1) / self.steps, self.sparse_share)
            optimizer.param_groups[0]["lr"] = self.rate * factor
            optimizer.zero_grad()
            loss = _loss(model.network, next(drawn).to(model.device))
            loss.backward()
            optimizer.step()
            run.step = step + 1
            run.losses.append(float(loss.detach()))
            if run.step % max(1, self.steps // 10) == 0:
                run.close(int(partition.alive().sum()))
            keeper.keep_if_due(run.checkpoint)
        keeper.keep(run.checkpoint)
        model.network.requires_grad_(False)
        optimizer.zero_grad()
        return run.history, run.alive


@dataclass
class _Run:
    """Where a training is: all that the next steps and the report depend on."""

    trained: list[nn.Parameter]
    optimizer: ProximalAdam
    alive: int
    step: int = 0
    keep_M: Tensor | None = None
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)

    def close(self, alive: int) -> None:
        """Write a line of history."""
        line = {"epoch": self.step, "loss": sum(self.losses) / len(self.losses)}
        self.history.append(line | {"alive": alive})
        self.losses = []

    def freeze(self, scene: Scene) -> None:
        """Choose who stays, zero the others, and hold them at zero from now on."""
        solver = self.optimizer.solver
        assert isinstance(solver, Solver)
        alive_M = scene.partition.alive()
        self.alive = int(alive_M.sum())
        self.keep_M = scene.allocation.select(solver.score()) & alive_M
        scene.partition.scale_(self.keep_M.double())
        self.optimizer.solver = Frozen(scene, self.keep_M)

    def checkpoint(self) -> Checkpoint:
        """Return it as tensors and JSON values."""
        solver = self.optimizer.solver
        assert isinstance(solver, Solver)
        tensors = checkpoint.named(
            weights={str(number): weight for number, weight in enumerate(self.trained)},
            optimizer=checkpoint.optimizer_tensors(self.optimizer),
            solver=solver.state(),
            frozen={} if self.keep_M is None else {"keep": self.keep_M},
        )
        state = {"alive": self.alive, "losses": self.losses, "history": self.history}
        return Checkpoint(self.step, tensors, state)

    @torch.no_grad()
    def go_on(self, saved: Checkpoint, scene: Scene) -> None:
        """Take over where a killed training was."""
        for number, weight in saved.part("weights").items():
            self.trained[int(number)].copy_(weight)
        checkpoint.load_optimizer(self.optimizer, saved.part("optimizer"))
        if frozen := saved.part("frozen"):
            self.keep_M = frozen["keep"].to(scene.partition.device)
            self.optimizer.solver = Frozen(scene, self.keep_M)
        solver = self.optimizer.solver
        assert isinstance(solver, Solver)
        solver.load(saved.part("solver"))
        self.step, self.alive = saved.step, saved.state["alive"]
        self.losses, self.history = saved.state["losses"], saved.state["history"]


def _drawn(tokens_NL: Tensor, rows: int, seed: int) -> Iterator[Tensor]:
    """Yield rows of text for ever, each once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order_N = torch.randperm(len(tokens_NL), generator=generator)
        for index_B in order_N.split(rows):
            yield tokens_NL[index_B]


def _loss(network: Any, token_BL: Tensor) -> Tensor:
    """Return the mean loss of every next token."""
    logit_BLV = network(input_ids=token_BL, use_cache=False).logits
    return cross_entropy(logit_BLV[:, :-1].flatten(0, 1).float(), token_BL[:, 1:].flatten())
