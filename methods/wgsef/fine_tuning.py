"""WGSEF during the fine-tuning of a language model: micro-experts fade out while others learn.

Shapes: B rows of text, L tokens per row, M routed micro-experts of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.errors import UserError
from bench.method import Context, InputSize, MethodReport, MethodWork
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure
from methods import checkpoint
from methods.checkpoint import Checkpoint, CheckpointManager
from methods.moe.calibration import Activations, WalkOptions, require_finite, walk_blocks
from methods.moe.pruning import (
    MicroExpertPruning,
    refuse_offloaded,
    require_calibration,
    require_experts,
)
from methods.moe.ranking import magnitudes
from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.groups.transformer import micro_experts
from methods.wgsef.solvers.allocation import LayerAllocation
from methods.wgsef.solvers.envelope import DebiasedSolver
from methods.wgsef.solvers.optimizers import ProximalAdam
from methods.wgsef.solvers.schedules import learning_rate_factor
from methods.wgsef.solvers.solver import FrozenSolver, Solver, SolverContext, select_alive

HistoryLine = dict[str, float]
ADAM_OPERATORS = 9
"""Operators of AdamW per tensor of weights."""
FADE_OPERATORS, PASS_OPERATORS = 50, 38
"""Operators of the homotopy in one step besides those per tensor and block, and of each pass of its
search for the root."""
PASSES = 5
"""Passes of that search, which usually takes three to six (`methods.wgsef.prox.root`)."""
TOKEN_CHUNK = 4096
"""Tokens passed to one expert at a time; bounds memory and changes no result."""
UNSEEN_ENERGY = 1e-6
"""Relative energy of a micro-expert that was never active: above 0, or it would count as empty."""


class WgsefFinetune(MicroExpertPruning):
    """Train the routed experts on calibration text while the debiased WGSEF removes micro-experts.

    Groups are micro-experts: a row of gate, a row of up and a column of down. Each step is one
    AdamW step on `rows` rows of text, followed by the debiased operator, applied to each layer
    under a budget of its own. The budget is taken entirely from the routed experts, and only they
    are trained. Norms are scaled so that a group's initial norm is its energy RMS(phi) ||w||,
    because weights alone do not show how strongly text activates a neuron (specification section
    7, 6). After the fraction `sparse_share` of the `steps` the mask is frozen. Use float32: the
    steps are too small for half precision.
    """

    uses_calibration: ClassVar[bool] = True

    steps: int = Field(default=60, ge=2)
    rows: int = Field(default=8, ge=1)
    rate: float = Field(default=5e-4, gt=0)
    sparse_share: float = Field(default=0.7, ge=0.1, le=1)

    def check(self, structure: ModelStructure) -> None:
        """Also refuse a model without experts, and a budget larger than its routed experts."""
        require_experts(structure, type(self).__name__, "trains")
        super().check(structure)
        self._share_of_routed(structure)

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Return the pass that measures units, and the training of the routed experts."""
        blocks, rows = structure.moe, max(1, inputs.rows)
        # Batches take every row once per round, and the last of a round may be smaller.
        rounds, left = divmod(self.steps, math.ceil(rows / self.rows))
        trained = rounds * rows + left * min(self.rows, rows)
        routed = sum(sum(b.widths) * b.matrices * b.d_model for b in blocks)
        # Of the weights that a token meets, those of its experts get a gradient.
        met = sum(b.top_k * b.d_ff * b.matrices * b.d_model for b in blocks)
        rest = sum(p.numel() for layer in structure.layers for p in layer.parameters()) - routed
        tensors = sum(1 for b in blocks for _ in b.experts.parameters())
        # Every step scales the groups, by two operators per block; only a sparse one measures them.
        step = ADAM_OPERATORS * tensors + 2 * len(blocks)
        fade = FADE_OPERATORS + tensors + len(blocks)
        # The last of them selects without a search.
        search = PASSES * PASS_OPERATORS
        return MethodWork(
            forwards=1.0,
            observed=1.0,
            trained=float(trained),
            updated=met / (met + rest),
            together=self.rows,
            # AdamW reads weight, gradient and two moments and writes three of them; the operator
            # reads the weights for their norms and writes them.
            elements=float(self.steps * routed * 10),
            operators=float(
                self.steps * step + self._sparse_steps * fade + (self._sparse_steps - 1) * search
            ),
            # Gradients and two moments in float32.
            memory=12.0 * routed,
        )

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Train, freeze, fine-tune and remove."""
        calibration = require_calibration(context)
        structure = model.structure
        refuse_offloaded(structure.moe)
        partition = GroupPartition(model.network, micro_experts(model.network))
        history, alive = self._train(model, partition, calibration.tokens, context)
        dead = [~part for part in partition.split(partition.alive())]
        layers = [
            # Flat indices of a block start with the shared experts, which have no groups.
            self.remove_micro_experts(block, block.d_shared + dead_M.nonzero().flatten())
            for block, dead_M in zip(structure.moe, dead, strict=True)
        ]
        more = {
            "calibration": calibration.fingerprint,
            "alive_before_selection": alive,
            "history": history,
        }
        return self.build_report(model, structure, layers, **more)

    @property
    def _sparse_steps(self) -> int:
        return max(1, round(self.sparse_share * self.steps))

    def _share_of_routed(self, structure: ModelStructure) -> float:
        """Return the fraction of routed micro-experts that each layer loses."""
        shares = {
            budget / sum(block.widths)
            for block, budget in zip(structure.moe, self.budgets(structure), strict=True)
        }
        if len(shares) > 1:
            raise UserError(
                "wgsef_finetune needs the same number of routed micro-experts in every MoE layer; "
                f"those of {structure.architecture} differ"
            )
        share = shares.pop()
        if share >= 1:
            raise UserError(
                f"ratio={self.ratio} would remove all routed experts: use a lower ratio"
            )
        return share

    def _units(
        self, model: Model, partition: GroupPartition, tokens_NL: Tensor, context: Context
    ) -> Tensor:
        """Return energy divided by norm, [M]; energies are relative to the mean of their layer."""
        options, energies = WalkOptions(self.rows, TOKEN_CHUNK), []
        observed = walk_blocks(model, tokens_NL, Activations, options, context.progress)
        for block, observer in observed:
            energy_N = (observer.square_sum() * magnitudes(block)).sqrt()[block.d_shared :]
            require_finite(block, energy_N)
            # A micro-expert that no token reached must rank last. Its energy must not be 0, though:
            # operators treat that as an empty group and drop it even if the budget could keep it.
            energies.append((energy_N / energy_N.mean()).clamp(min=UNSEEN_ENERGY))
        return torch.cat(energies) / partition.norms().clamp(min=torch.finfo(torch.float32).tiny)

    def _train(
        self, model: Model, partition: GroupPartition, tokens_NL: Tensor, context: Context
    ) -> tuple[list[HistoryLine], int]:
        """Train; return the history, one line per tenth of the steps, and the number of groups.

        The number is that of the groups alive just before the mask is frozen.
        """
        sparse = self._sparse_steps
        share = self._share_of_routed(model.structure)
        # A budget per layer, because energies are relative to the mean of their layer and cannot be
        # compared between layers.
        allocation = LayerAllocation(partition, share, floor=0.0)
        solver_context = SolverContext(
            model.network, partition, allocation, sparse, self.steps, tokens_NL[:1]
        )
        manager = CheckpointManager(context.folder, context.progress)
        saved = manager.latest()
        solver = DebiasedSolver(solver_context)
        # Measured on the untrained weights; a resumed run restores the units with the solver.
        if saved is None:
            solver.unit_M = self._units(model, partition, tokens_NL, context)
        run = _FineTuning(solver_context, solver, self.rate)
        if saved is not None:
            run.resume(saved)
        # The order of rows depends only on the seed, so a resumed run skips the batches it has had.
        batches = islice(_row_batches(tokens_NL, self.rows, context.seed), run.step, None)
        for weight in run.trained:
            weight.requires_grad_(True)
        for step in context.progress.track(range(run.step, self.steps), "fine-tuning"):
            if step == sparse:
                run.select_groups()
            factor = learning_rate_factor((step + 1) / self.steps, self.sparse_share)
            run.train_step(next(batches).to(model.device), self.rate * factor)
            if run.step % max(1, self.steps // 10) == 0:
                run.append_history()
            manager.save_if_due(run.checkpoint)
        # A run that is killed later, in removal or evaluation, must not train again.
        manager.save(run.checkpoint)
        model.network.requires_grad_(False)
        run.optimizer.zero_grad()
        return run.history, run.alive


class _FineTuning:
    """State of a training: everything that later steps and the report depend on."""

    def __init__(self, context: SolverContext, solver: Solver, rate: float) -> None:
        self._context, self._solver = context, solver
        self.trained = list(context.partition.owned_parameters().values())
        self.optimizer = ProximalAdam(self.trained, solver, rate)
        self.alive = context.partition.groups
        self.step = 0
        self.history: list[HistoryLine] = []
        self._keep_M: Tensor | None = None
        self._losses: list[float] = []

    def train_step(self, token_BL: Tensor, rate: float) -> None:
        """Take one step of the optimizer and its solver."""
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        loss = _next_token_loss(self._context.network, token_BL)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        self._losses.append(float(loss.detach()))

    def append_history(self) -> None:
        """Append a line of history with the mean loss since the last one."""
        line = {"epoch": self.step, "loss": sum(self._losses) / len(self._losses)}
        self.history.append(line | {"alive": int(self._context.partition.alive().sum())})
        self._losses = []

    def select_groups(self) -> None:
        """Select the groups to keep, zero all others, and keep them at zero in later steps."""
        keep_M, self.alive = select_alive(self._context, self._solver.score())
        self._freeze_groups(keep_M)

    def _freeze_groups(self, keep_M: Tensor) -> None:
        self._keep_M = keep_M
        self._solver = self.optimizer.solver = FrozenSolver(self._context, keep_M)

    def checkpoint(self) -> Checkpoint:
        """Return the state as tensors and JSON values."""
        tensors = checkpoint.prefixed_tensors(
            weights={str(number): weight for number, weight in enumerate(self.trained)},
            optimizer=checkpoint.optimizer_tensors(self.optimizer),
            solver=self._solver.state(),
            frozen={} if self._keep_M is None else {"keep": self._keep_M},
        )
        state = {"alive": self.alive, "losses": self._losses, "history": self.history}
        return Checkpoint(self.step, tensors, state)

    @torch.no_grad()
    def resume(self, saved: Checkpoint) -> None:
        """Restore the state of an interrupted training."""
        for number, weight in saved.tensors_of("weights").items():
            self.trained[int(number)].copy_(weight)
        checkpoint.load_optimizer(self.optimizer, saved.tensors_of("optimizer"))
        if frozen := saved.tensors_of("frozen"):
            # First, because the state loaded below is that of the frozen solver.
            self._freeze_groups(frozen["keep"].to(self._context.partition.device))
        self._solver.load(saved.tensors_of("solver"))
        self.step, self.alive = saved.step, saved.state["alive"]
        self._losses, self.history = saved.state["losses"], saved.state["history"]


def _row_batches(tokens_NL: Tensor, rows: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of rows forever, each row once per pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order_N = torch.randperm(len(tokens_NL), generator=generator)
        for index_B in order_N.split(rows):
            yield tokens_NL[index_B]


def _next_token_loss(network: nn.Module, token_BL: Tensor) -> Tensor:
    """Return the mean next-token loss."""
    logit_BLV = network(input_ids=token_BL, use_cache=False).logits
    # Position t predicts token t + 1. A softmax over the vocabulary needs fp32.
    return cross_entropy(logit_BLV[:, :-1].flatten(0, 1).float(), token_BL[:, 1:].flatten())
