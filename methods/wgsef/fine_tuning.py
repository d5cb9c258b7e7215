"""WGSEF within the fine-tuning of a language model: micro-experts fade out while others learn.

Shapes: B rows of text, L tokens per row, M routed micro-experts of all layers.
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
from bench.models.expert_hooks import observe_experts
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import MoEBlock
from methods import checkpoint
from methods.checkpoint import Checkpoint, CheckpointManager
from methods.moe.calibration_statistics import Activations
from methods.moe.calibration_walk import require_finite, walk_blocks
from methods.moe.pruning import MicroExpertPruning, refuse_offloaded, require_calibration
from methods.moe.ranking import magnitudes
from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.groups.transformer import micro_experts
from methods.wgsef.solvers.allocation import LayerAllocation
from methods.wgsef.solvers.envelope import DebiasedSolver
from methods.wgsef.solvers.optimizers import ProximalAdam
from methods.wgsef.solvers.schedules import learning_rate_factor
from methods.wgsef.solvers.solver import FrozenSolver, Solver, SolverContext

TOKEN_CHUNK = 4096
"""Tokens passed to one expert at a time; bounds memory and changes no result."""
UNSEEN_ENERGY = 1e-6
"""Relative energy of a micro-expert that was never active: above 0, or it would count as empty."""


class WgsefFinetune(MicroExpertPruning):
    """Train the routed experts on calibration text while the debiased WGSEF removes micro-experts.

    Groups are micro-experts: a row of gate, a row of up and a column of down. Each step is one
    AdamW step on `rows` rows of text, followed by the operator in each layer under that layer's
    budget, which is taken entirely from the routed experts. Norms are measured in a unit in which a
    group's initial norm is its energy RMS(phi) ||w||, since weights alone do not show how strongly
    text drives a neuron (specification section 7, 6). After the fraction `sparse_share` of the
    `steps` the mask is frozen. Only the routed experts are trained. Use float32, since steps are
    small.
    """

    uses_calibration: ClassVar[bool] = True

    steps: int = Field(default=60, ge=2)
    rows: int = Field(default=8, ge=1)
    rate: float = Field(default=5e-4, gt=0)
    sparse_share: float = Field(default=0.7, ge=0.1, le=1)

    def check(self, structure: ModelStructure) -> None:
        """Refuse what `MicroPruning` refuses, and budgets that routed experts cannot provide."""
        super().check(structure)
        self._share_of_routed(structure)

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Train, freeze, fine-tune and remove."""
        calibration = require_calibration(context)
        structure = model.structure
        refuse_offloaded(structure.moe)
        partition = GroupPartition(model.network, micro_experts(model.network))
        history, alive = self._train(model, partition, calibration.tokens, context)
        dead = [~part for part in partition.split(partition.alive())]
        layers = [
            # Indices of a block count the shared experts first; the groups are routed experts only.
            self.remove_micro_experts(block, block.d_shared + dead_M.nonzero().flatten())
            for block, dead_M in zip(structure.moe, dead, strict=True)
        ]
        more = {
            "calibration": calibration.fingerprint,
            "alive_before_selection": alive,
            "history": history,
        }
        return self.build_report(model, structure, layers, **more)

    def _share_of_routed(self, structure: ModelStructure) -> float:
        """Return the fraction of routed micro-experts that each layer loses."""
        shares = {
            budget / sum(block.widths)
            for block, budget in zip(structure.moe, self.budgets(structure), strict=True)
        }
        if len(shares) > 1:
            raise UserError(
                f"wgsef_finetune needs MoE layers of equal size; those of "
                f"{structure.architecture} differ"
            )
        share = shares.pop()
        if share >= 1:
            raise UserError(f"ratio={self.ratio} removes more than all routed experts: lower ratio")
        return share

    def _units(
        self, model: Model, partition: GroupPartition, tokens_NL: Tensor, context: Context
    ) -> Tensor:
        """Return energy over norm, [M]; the energies of each layer are relative to their mean."""

        def watching(seen: dict[MoEBlock, Activations]) -> AbstractContextManager[None]:
            return observe_experts(seen, TOKEN_CHUNK)

        told, energies = context.progress, []
        seen = walk_blocks(model, tokens_NL, Activations, watching, self.rows, False, told)
        for block, observer in seen:
            energy_N = (observer.square_sum() * magnitudes(block)).sqrt()[block.d_shared :]
            require_finite(block, energy_N)
            # A micro-expert that no token reached must rank last, but not with energy 0: operators
            # treat that as an empty group and drop it at once, even where the budget could keep it.
            energies.append((energy_N / energy_N.mean()).clamp(min=UNSEEN_ENERGY))
        return torch.cat(energies) / partition.norms().clamp(min=torch.finfo(torch.float32).tiny)

    def _train(
        self, model: Model, partition: GroupPartition, tokens_NL: Tensor, context: Context
    ) -> tuple[list[dict[str, float]], int]:
        """Return the history, one line per tenth of the steps, and the number alive when frozen."""
        sparse = max(1, round(self.sparse_share * self.steps))
        share = self._share_of_routed(model.structure)
        # Energies of different layers are not comparable here (each is relative to its own mean),
        # hence a budget per layer.
        allocation = LayerAllocation(partition, share, floor=0.0)
        context = SolverContext(
            model.network, partition, allocation, sparse, self.steps, tokens_NL[:1]
        )
        trained = list(partition.owned_parameters().values())
        keeper = CheckpointManager(context.folder, context.progress)
        saved = keeper.latest()
        solver = DebiasedSolver(context)
        # Measured on the weights before training only; a resumed run restores the units with the
        # solver.
        if saved is None:
            solver.unit_M = self._units(model, partition, tokens_NL, context)
        optimizer = ProximalAdam(trained, solver, self.rate)
        run = _FineTuning(trained, optimizer, partition.groups)
        if saved is not None:
            run.go_on(saved, context)
        # The order of rows depends only on the seed, so skipping the steps already taken resumes
        # it.
        drawn = islice(_row_batches(tokens_NL, self.rows, context.seed), run.step, None)
        for weight in trained:
            weight.requires_grad_(True)
        for step in context.progress.track(range(run.step, self.steps), "fine-tuning"):
            if step == sparse:
                run.freeze(context)
            factor = learning_rate_factor((step + 1) / self.steps, self.sparse_share)
            optimizer.param_groups[0]["lr"] = self.rate * factor
            optimizer.zero_grad()
            loss = _next_token_loss(model.network, next(drawn).to(model.device))
            loss.backward()
            optimizer.step()
            run.step = step + 1
            run.losses.append(float(loss.detach()))
            if run.step % max(1, self.steps // 10) == 0:
                run.close(int(partition.alive().sum()))
            keeper.save_if_due(run.checkpoint)
        # Removal and evaluation follow; a run that is killed there must not train again.
        keeper.save(run.checkpoint)
        model.network.requires_grad_(False)
        optimizer.zero_grad()
        return run.history, run.alive


@dataclass
class _FineTuning:
    """State of a training: everything the next steps and the report depend on."""

    trained: list[nn.Parameter]
    optimizer: ProximalAdam
    alive: int
    step: int = 0
    keep_M: Tensor | None = None
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)

    def close(self, alive: int) -> None:
        """Append a line of history."""
        line = {"epoch": self.step, "loss": sum(self.losses) / len(self.losses)}
        self.history.append(line | {"alive": alive})
        self.losses = []

    def freeze(self, context: SolverContext) -> None:
        """Select the groups to keep, zero all others, and hold them at zero from now on."""
        solver = self.optimizer.solver
        assert isinstance(solver, Solver)
        alive_M = context.partition.alive()
        self.alive = int(alive_M.sum())
        self.keep_M = context.allocation.select(solver.score()) & alive_M
        context.partition.scale_(self.keep_M.double())
        self.optimizer.solver = FrozenSolver(context, self.keep_M)

    def checkpoint(self) -> Checkpoint:
        """Return the state as tensors and JSON values."""
        solver = self.optimizer.solver
        assert isinstance(solver, Solver)
        tensors = checkpoint.prefixed_tensors(
            weights={str(number): weight for number, weight in enumerate(self.trained)},
            optimizer=checkpoint.optimizer_tensors(self.optimizer),
            solver=solver.state(),
            frozen={} if self.keep_M is None else {"keep": self.keep_M},
        )
        state = {"alive": self.alive, "losses": self.losses, "history": self.history}
        return Checkpoint(self.step, tensors, state)

    @torch.no_grad()
    def go_on(self, saved: Checkpoint, context: SolverContext) -> None:
        """Restore the state of an interrupted training."""
        for number, weight in saved.tensors_of("weights").items():
            self.trained[int(number)].copy_(weight)
        checkpoint.load_optimizer(self.optimizer, saved.tensors_of("optimizer"))
        if frozen := saved.tensors_of("frozen"):
            self.keep_M = frozen["keep"].to(context.partition.device)
            self.optimizer.solver = FrozenSolver(context, self.keep_M)
        solver = self.optimizer.solver
        assert isinstance(solver, Solver)
        solver.load(saved.tensors_of("solver"))
        self.step, self.alive = saved.step, saved.state["alive"]
        self.losses, self.history = saved.state["losses"], saved.state["history"]


def _row_batches(tokens_NL: Tensor, rows: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of rows forever, each row once per pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order_N = torch.randperm(len(tokens_NL), generator=generator)
        for index_B in order_N.split(rows):
            yield tokens_NL[index_B]


def _next_token_loss(network: Any, token_BL: Tensor) -> Tensor:
    """Return the mean next-token loss."""
    logit_BLV = network(input_ids=token_BL, use_cache=False).logits
    # Position t predicts token t + 1. fp32, because softmax over a vocabulary loses precision in
    # bf16.
    return cross_entropy(logit_BLV[:, :-1].flatten(0, 1).float(), token_BL[:, 1:].flatten())
