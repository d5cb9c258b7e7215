"""Sparse training of a classifier: steps with a solver, a selection, then masked fine-tuning.

Shapes: B images, C channels, H height and width, K classes; M groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.data.image_sets import ImageSet, Splits, sequential_batches, training_batches
from bench.errors import UserError
from bench.method import RecipeConfig
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from bench.ui import SILENT, Progress
from methods import checkpoint
from methods.checkpoint import Checkpoint, CheckpointManager
from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.solvers.allocation import Allocation
from methods.wgsef.solvers.optimizers import ProximalAdam, ProximalSGD
from methods.wgsef.solvers.schedules import learning_rate_factor
from methods.wgsef.solvers.solver import FrozenSolver, Solver, SolverContext, select_alive

HistoryLine = dict[str, float]


@dataclass(frozen=True)
class TrainingJob:
    """Network, data, settings and budget of one training.

    `identity` describes everything else that the training depends on; a checkpoint with a different
    identity is refused. `on_epoch` is called with each line of the history.
    """

    network: nn.Module
    splits: Splits
    partition: GroupPartition
    allocation: Allocation
    solver: Callable[[SolverContext], Solver]
    recipe: RecipeConfig
    seed: int
    folder: Path | None = None
    identity: str = ""
    progress: Progress = SILENT
    on_epoch: Callable[[HistoryLine], None] | None = None


@dataclass
class TrainingOutcome:
    """Result of a training: `keep` [M] marks the groups kept by the selection.

    `alive` and `fractional` are the numbers of groups that were non-zero, and neither whole nor
    zero, before the selection. `total_strength` is the solver's sum of lambda over all steps.
    """

    keep: Tensor
    alive: int
    fractional: int
    total_strength: float
    history: list[HistoryLine] = field(default_factory=list)


def refuse_untrainable(config: VisionConfig, batch: int, splits: Splits | None) -> None:
    """Raise if known training images are fewer than a batch, or the network returns no logits.

    Some networks return a tuple in training mode, with the outputs of auxiliary heads.
    """
    if splits is not None:
        _refuse_few_images(splits, batch)
    with torch.device("meta"):
        network = build_classifier(config).train()
        try:
            logit_BK = network(torch.zeros(batch, config.channels, config.size, config.size))
        # What meta tensors do not support may still run on a device.
        except Exception:
            return
    shape = tuple(getattr(logit_BK, "shape", ()))
    if shape != (batch, config.classes):
        raise UserError(
            f"{config.architecture} returns {shape or type(logit_BK).__name__} in training mode, "
            f"but logits of shape {(batch, config.classes)} are needed: turn off its auxiliary "
            "outputs"
        )


def _refuse_few_images(splits: Splits, batch: int) -> None:
    if len(splits.train) < batch:
        raise UserError(
            f"recipe.batch={batch} is larger than the training set of {len(splits.train)} images "
            f"of {splits.name}: use a smaller batch"
        )


class Trainer:
    """Carries out a training job; call `run` once."""

    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        self._checkpoints = CheckpointManager(job.folder, job.progress)
        self._device = job.partition.device
        self._epoch_steps = len(job.splits.train) // job.recipe.batch
        _refuse_few_images(job.splits, job.recipe.batch)
        self._total = self._epoch_steps * job.recipe.epochs
        self._sparse_steps = max(1, round(job.recipe.sparse_share * self._total))
        # Networks are loaded in eval mode and without gradients, in which solvers cannot trace.
        job.network.requires_grad_(True)
        self._context = self._solver_context()
        self._solver: Solver = job.solver(self._context)
        self._optimizer = self._make_optimizer()
        self._step, self._epoch_loss = 0, 0.0
        self._outcome: TrainingOutcome | None = None
        self._history: list[HistoryLine] = []

    def run(self) -> TrainingOutcome:
        """Train to the end, resuming from the last checkpoint if there is one."""
        self._resume()
        job = self._job
        with job.progress.phase(f"training on {job.splits.name}", job.recipe.epochs):
            job.progress.resume(len(self._history))
            while self._step < self._total:
                self._train_epoch()
                job.progress.step()
        # With sparse_share=1 the solver acts until the last step, so no selection was made yet.
        outcome = self._outcome or self._select_groups()
        outcome.history = self._history
        job.network.eval()
        return outcome

    def rehearsal(self) -> Callable[[], object]:
        """Return a training step to be timed, after images were scored as at an epoch's end.

        It changes the network, and counts no step: `run` is not to be called any more.
        """
        job = self._job
        network = job.network.requires_grad_(False).eval()
        image_BCHH, _ = next(sequential_batches(job.splits.test, _EVALUATION_BATCH))
        network(image_BCHH.to(self._device))
        network.requires_grad_(True).train()
        batches = chain.from_iterable(
            training_batches(job.splits.train, job.recipe.batch, seed=job.seed, epoch=epoch)
            for epoch in count()
        )

        def step() -> None:
            image_BCHH, label_B = next(batches)
            with torch.enable_grad():
                self._train_step(self._placed(image_BCHH), label_B.to(self._device))
            self._step = 0

        return step

    def _solver_context(self) -> SolverContext:
        job = self._job
        image_1CHH, _ = job.splits.test.fetch(torch.zeros(1, dtype=torch.long), None)
        return SolverContext(
            network=job.network,
            partition=job.partition,
            allocation=job.allocation,
            steps=self._sparse_steps,
            epoch=self._epoch_steps,
            example=image_1CHH.to(self._device),
        )

    def _make_optimizer(self) -> ProximalSGD | ProximalAdam:
        """Return the optimizer, without weight decay for groups that the solver decays itself."""
        recipe, owned = self._job.recipe, self._job.partition.owned_parameters()
        named = dict(self._job.network.named_parameters())
        # The envelope contains 1/2 sum d_j ||v_j||^2, so weight decay would count it twice.
        exempt = set(owned) if self._solver.decays_groups else set()
        if not recipe.decay_norms:
            exempt |= {name for name, weight in named.items() if weight.ndim == 1}
        decayed = [weight for name, weight in named.items() if name not in exempt]
        groups: list[dict[str, Any]] = [{"params": decayed}]
        if exempt:
            groups.append({"params": [named[n] for n in named if n in exempt], "weight_decay": 0.0})
        if recipe.optimizer == "adam":
            return ProximalAdam(groups, self._solver, recipe.rate, weight_decay=recipe.decay)
        return ProximalSGD(
            groups, self._solver, recipe.rate, recipe.momentum, recipe.decay, recipe.nesterov
        )

    def _train_epoch(self) -> None:
        """Train one epoch, or what remains of it after a resume."""
        job, recipe = self._job, self._job.recipe
        # Batches are a function of seed, epoch and position, so a resumed epoch gets exactly the
        # batches that the interrupted one had left.
        epoch, start = divmod(self._step, self._epoch_steps)
        job.network.train()
        batches = training_batches(
            job.splits.train, recipe.batch, seed=job.seed, epoch=epoch, start=start
        )
        for image_BCHH, label_B in batches:
            if self._step == self._sparse_steps and self._outcome is None:
                self._select_groups()
            self._train_step(self._placed(image_BCHH), label_B.to(self._device))
            due = recipe.save_every and self._step % recipe.save_every == 0
            # The end of an epoch is saved below, with its line of the history.
            if due and self._step % self._epoch_steps:
                self._save()
        self._close_epoch(epoch)

    def _placed(self, image_BCHH: Tensor) -> Tensor:
        # Only the images: convolutions follow the format of their input, and safetensors saves
        # only weights in the usual one.
        last = self._job.recipe.channels_last
        memory_format = torch.channels_last if last else torch.contiguous_format
        return image_BCHH.to(self._device, memory_format=memory_format)

    def _train_step(self, image_BCHH: Tensor, label_B: Tensor) -> None:
        recipe = self._job.recipe
        rate = recipe.rate * learning_rate_factor(
            (self._step + 1) / self._total, recipe.sparse_share, recipe.warmup
        )
        # A function of the step, because the state of a torch scheduler would have to be part of
        # the checkpoint.
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
            logit_BK = self._job.network(image_BCHH)
        loss = cross_entropy(logit_BK.float(), label_B)
        loss.backward()
        self._optimizer.step()
        self._epoch_loss += float(loss.detach())
        self._step += 1

    def _close_epoch(self, epoch: int) -> None:
        """Append a line of history and save a checkpoint."""
        job, outcome = self._job, self._outcome
        line: HistoryLine = {
            "epoch": epoch + 1,
            "loss": self._epoch_loss / self._epoch_steps,
            "rate": self._optimizer.rate,
            "k": job.allocation.k(min(1.0, self._step / self._sparse_steps)),
            "alive": int(job.partition.alive().sum()),
            "fractional": self._solver.fractional,
            "total_strength": (outcome or self._solver).total_strength,
            "accuracy": accuracy(job.network, job.splits.test),
        }
        self._epoch_loss = 0.0
        self._history.append(line)
        self._save()
        if job.on_epoch is not None:
            job.on_epoch(line)

    def _select_groups(self) -> TrainingOutcome:
        """Select the groups to keep, zero all others, and keep them at zero in later steps."""
        # Read first, because the selection zeroes groups.
        fractional, total = self._solver.fractional, self._solver.total_strength
        keep_M, alive = select_alive(self._context, self._solver.score())
        self._outcome = TrainingOutcome(keep_M, alive, fractional, total)
        self._freeze_groups()
        return self._outcome

    def _freeze_groups(self) -> None:
        assert self._outcome is not None
        self._solver = FrozenSolver(self._context, self._outcome.keep)
        self._optimizer.solver = self._solver

    def _save(self) -> None:
        self._checkpoints.save(self._checkpoint)

    def _checkpoint(self) -> Checkpoint:
        tensors = checkpoint.prefixed_tensors(
            network=self._job.network.state_dict(),
            optimizer=checkpoint.optimizer_tensors(self._optimizer),
            solver=self._solver.state(),
            allocation=self._job.allocation.state(),
            outcome={"keep": self._outcome.keep} if self._outcome else {},
        )
        state: dict[str, Any] = {
            "identity": self._identity(),
            "loss": self._epoch_loss,
            "history": self._history,
        }
        if self._outcome:
            outcome = self._outcome
            state["before"] = [outcome.alive, outcome.fractional, outcome.total_strength]
        return Checkpoint(self._step, tensors, state)

    def _resume(self) -> None:
        """Continue from the last checkpoint in the folder, if it belongs to this training."""
        saved = self._checkpoints.latest()
        if saved is None:
            return
        if saved.state["identity"] != self._identity():
            raise UserError(
                f"checkpoints={self._job.folder} holds a checkpoint of a different run: remove it "
                "or choose another folder"
            )
        self._job.network.load_state_dict(saved.tensors_of("network"))
        measured = saved.tensors_of("allocation")
        for name, tensor in self._job.allocation.state().items():
            # A checkpoint of an older version has none.
            tensor.copy_(measured.get(name, tensor))
        checkpoint.load_optimizer(self._optimizer, saved.tensors_of("optimizer"))
        if kept := saved.tensors_of("outcome"):
            keep_M = kept["keep"].to(self._device)
            # First, because the state loaded below is that of the frozen solver.
            self._outcome = TrainingOutcome(keep_M, *saved.state["before"])
            self._freeze_groups()
        self._solver.load(saved.tensors_of("solver"))
        self._step, self._epoch_loss = saved.step, saved.state["loss"]
        self._history = saved.state["history"]

    def _identity(self) -> str:
        job = self._job
        recipe = job.recipe.model_dump_json()
        return f"{job.identity} {job.splits.name} seed {job.seed} {recipe}"


_EVALUATION_BATCH = 256


@torch.no_grad()
def accuracy(network: nn.Module, images: ImageSet) -> float:
    """Return the fraction of images whose highest logit is that of their label."""
    device = next(network.parameters()).device
    # The mode is restored below: between epochs, BatchNorm would otherwise stop updating.
    training = network.training
    network.eval()
    correct = 0
    for image_BCHH, label_B in sequential_batches(images, _EVALUATION_BATCH):
        logit_BK = network(image_BCHH.to(device))
        correct += int((logit_BK.argmax(-1).cpu() == label_B).sum())
    network.train(training)
    return correct / len(images)
