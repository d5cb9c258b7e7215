"""Training methods for image classifiers: sparse training with any solver, and WGSEF.

A method consists of its options and its solver; those of WGSEF's competitors are in `competitors`.
`Train` is the same training without any removal.

Shapes: M groups of all families.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from bench.data import image_catalogue
from bench.errors import UserError
from bench.method import (
    BudgetUnit,
    Context,
    Effect,
    InputSize,
    Method,
    MethodReport,
    MethodWork,
    RecipeConfig,
    RepeatedStep,
)
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import Classifier, VisionConfig
from bench.models.hashing import network_hash
from methods.wgsef.groups import choice
from methods.wgsef.groups.choice import ClassifierGroups, GroupChoice
from methods.wgsef.groups.costs import REMOVABLE_KINDS, GroupCosts, refuse_uncosted
from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.removal import smaller_classifier
from methods.wgsef.solvers import envelope
from methods.wgsef.solvers.allocation import (
    Allocation,
    BudgetScope,
    CostAllocation,
    GlobalAllocation,
    IsomorphicAllocation,
    LayerAllocation,
    PatternAllocation,
    refuse_impossible_sparsity,
)
from methods.wgsef.solvers.solver import Solver, SolverContext
from methods.wgsef.trainer import Trainer, TrainingJob, TrainingOutcome, refuse_untrainable

if TYPE_CHECKING:
    from bench.data.image_sets import Splits
    from bench.models.model import Model
    from bench.models.structure.model_structure import ModelStructure

_FEW_IMAGES = 16


class ClassifierTraining(Method):
    """Training of an image classifier, with or without sparsity.

    `data` is the image set, normally that of the benchmark. `split=validation` trains without the
    held-out images and reports the accuracy on them. With `restart` training starts from fresh
    weights, otherwise from those of the model. An interrupted run resumes from its checkpoints,
    which are in the folder `checkpoints` or by default in that of the run.
    """

    data: str = "digits"
    data_folder: str | None = None
    split: Literal["test", "validation"] = "test"
    recipe: RecipeConfig = RecipeConfig()
    restart: bool = True
    checkpoints: str | None = None

    @property
    def restarts(self) -> bool:
        """Whether training starts from fresh weights."""
        return self.restart

    def check(self, structure: ModelStructure) -> None:
        """Refuse models that are not image classifiers, and images that do not fit the model."""
        self._require_classifier(structure)

    def _require_classifier(self, structure: ModelStructure) -> VisionConfig:
        """Return the classifier's config; raise if there is none or the images cannot train it."""
        config = structure.vision
        if config is None:
            raise UserError(
                "this training needs an image classifier, but the model is "
                f"{structure.architecture}: choose one such as model=micro_resnet"
            )
        known = image_catalogue.image_shape(self.data, self.data_folder, size=config.size)
        # An ImageNet folder may hold only a subset of the classes.
        given = replace(known, classes=config.classes) if self.data == "imagenet" else known
        config.refuse_mismatched_images(self.data, given)
        quick = self.data in image_catalogue.QUICK_SETS
        refuse_untrainable(config, self.recipe.batch, self._splits(config) if quick else None)
        return config

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Return one training step, and one of few images, for steps that are too large to time.

        How many steps follow is up to the recipe and the data.
        """
        config = structure.vision
        if config is None:
            return super().work(structure, inputs)
        batch = self.recipe.batch
        sizes = (batch, _FEW_IMAGES) if batch > _FEW_IMAGES else (batch,)
        return MethodWork(steps=tuple(self._step(config, images) for images in sizes))

    def _step(self, config: VisionConfig, images: int) -> RepeatedStep:
        """Return a training step of `images`, which counts as often as fills a batch."""

        def prepare(device: torch.device, _: torch.dtype) -> Callable[[], object]:
            network = _fresh_classifier(config, 0, device)
            job = self._planned(network, self._splits(config), Context(seed=0))
            recipe = job.recipe.model_copy(update={"batch": images})
            return Trainer(replace(job, folder=None, recipe=recipe)).rehearsal()

        knobs = self.model_dump_json(exclude={"checkpoints"})
        key = f"train {type(self).__name__} {knobs} {config} {images} images"
        return RepeatedStep(key, self.recipe.batch / images, prepare)

    @abstractmethod
    def _planned(self, network: Classifier, splits: Splits, context: Context) -> TrainingJob:
        """Return the training of a network, with its groups and their budget."""

    def _network(self, model: Model, seed: int) -> Classifier:
        """Return the classifier to train, in float32, with fresh weights if `restart` is set."""
        network = model.network
        if not isinstance(network, Classifier):
            raise UserError(f"{model.name} is not an image classifier")
        if self.restart:
            return _fresh_classifier(network.config, seed, model.device)
        return network.float()

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Train; `model.network` becomes the result, in the data type that it had."""
        # Steps are too small for half precision.
        dtype = next(model.network.parameters()).dtype
        network = self._network(model, context.seed)
        job = self._planned(network, self._splits(network.config), context)
        result, report = self._result(network, job, Trainer(job).run())
        model.network = result.to(dtype)
        model.invalidate_structure()
        return report

    @abstractmethod
    def _result(
        self, network: Classifier, job: TrainingJob, outcome: TrainingOutcome
    ) -> tuple[Classifier, MethodReport]:
        """Return the network that a training leaves, and what to report about it."""

    def _splits(self, config: VisionConfig) -> Splits:
        # Images of the user's own are scaled to the input of the network.
        splits = image_catalogue.load_image_set(self.data, self.data_folder, size=config.size)
        config.refuse_mismatched_images(splits.name, splits.shape)
        return splits if self.split == "test" else splits.for_selection()

    def _job(
        self,
        network: Classifier,
        splits: Splits,
        partition: GroupPartition,
        allocation: Allocation,
        solver: Callable[[SolverContext], Solver],
        context: Context,
    ) -> TrainingJob:
        folder = Path(self.checkpoints) if self.checkpoints else context.folder
        return TrainingJob(
            network=network,
            splits=splits,
            partition=partition,
            allocation=allocation,
            solver=solver,
            recipe=self.recipe,
            seed=context.seed,
            folder=folder,
            # Without a folder there are no checkpoints, and all images need not be hashed.
            identity=self._identity(network, splits) if folder else "",
            progress=context.progress,
        )

    def _identity(self, network: Classifier, splits: Splits) -> str:
        """Return what a checkpoint must agree on to be resumed."""
        # Renaming a method class invalidates the checkpoints of interrupted runs. Their folder is
        # no part of it. Network and images are, because a folder of the user's own may be given to
        # any run.
        parts = (
            type(self).__name__,
            self.model_dump_json(exclude={"checkpoints"}),
            network.config.model_dump_json(),
            network_hash(network),
            splits.train.fingerprint(),
        )
        return " ".join(parts)


def _fresh_classifier(config: VisionConfig, seed: int, device: torch.device) -> Classifier:
    # Initialisation draws from the global CPU generator. A seeded fork makes the weights
    # independent of methods applied earlier in the run, and restores the generator's state.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build_classifier(config).to(device)


class Train(ClassifierTraining):
    """Train a classifier with the recipe of sparse training but keep all weights.

    This is the dense baseline of tables whose networks are trained from fresh weights.
    """

    def _result(
        self, network: Classifier, job: TrainingJob, outcome: TrainingOutcome
    ) -> tuple[Classifier, MethodReport]:
        details = {
            "data": job.splits.provenance,
            "accuracy": outcome.history[-1]["accuracy"],
            "history": [{key: line[key] for key in TRAINING_CURVES} for line in outcome.history],
        }
        return network, MethodReport("none", details, trained=True)

    def _planned(self, network: Classifier, splits: Splits, context: Context) -> TrainingJob:
        # The trainer selects groups at the end; at sparsity 0 it keeps all of them. Rows need no
        # trace of the forward, which fails for some networks.
        families = choice.families_of(network, GroupChoice(groups=("rows",)))
        partition = GroupPartition(network, families)
        whole = GlobalAllocation(partition, sparsity=0.0)
        return self._job(network, splits, partition, whole, Solver, context)


TRAINING_CURVES = ("epoch", "loss", "rate", "accuracy")
"""Entries of a history line that have a meaning without sparsity."""


class SparseTraining(ClassifierTraining):
    """Train a classifier with a sparsifying solver, select the groups to keep, remove the others.

    `groups` is one kind of group, or several that do not overlap; `layers`, `block` and `masks` are
    those of `GroupChoice`. `ratio` is the fraction to remove, measured in `unit`: groups,
    multiply-adds, bytes or seconds.

    `scope` says how the budget is shared: `global` is one budget for all layers, `layer` removes
    the same fraction of the groups of every layer, and `isomorphic` does so for all layers of the
    same form together. With `pattern`, `pattern=[N, M]` keeps N of every M consecutive groups of a
    layer. `k`, if given, is the number of groups to keep in the whole network. `k` and `pattern`
    replace `ratio`, which is set to null.

    `floor` is the minimum fraction kept per layer, and the number of groups kept is rounded up to a
    `multiple`.
    """

    writes = ("checkpoints",)
    coupled_filters: ClassVar[bool] = False
    """Whether the solver is torch-pruning's, which knows coupled filters only."""

    ratio: float | None = Field(default=0.7, gt=0, lt=1)
    groups: ClassifierGroups | tuple[ClassifierGroups, ...] = "filters"
    layers: dict[ClassifierGroups, str] = Field(default_factory=dict)
    block: tuple[int, int] = (4, 4)
    masks: str | None = None
    scope: BudgetScope = "global"
    pattern: tuple[int, int] | None = None
    unit: BudgetUnit = "groups"
    floor: float = Field(default=0.05, ge=0, lt=1)
    k: int | None = Field(default=None, ge=1)
    multiple: int = Field(default=1, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _ratio_of_use(cls, knobs: Any) -> Any:
        """Set `ratio` to null if `k` or `pattern` replaces it.

        Otherwise runs would be named after it, and equal runs would be repeated.
        """
        if isinstance(knobs, dict) and (knobs.get("k"), knobs.get("pattern")) != (None, None):
            return {**knobs, "ratio": None}
        return knobs

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        self._choice()  # Raises if the group options contradict each other.
        if self.coupled_filters and self._choice().groups != ("filters",):
            raise ValueError("this method couples filters by torch-pruning: set groups=filters")
        if self.unit != "groups" and self.scope != "global":
            raise ValueError(
                f"scope={self.scope} counts groups, not unit={self.unit}: set scope=global or "
                "unit=groups"
            )
        uncosted = [kind for kind in self._choice().groups if kind not in REMOVABLE_KINDS]
        if self.unit != "groups" and uncosted:
            raise ValueError(
                f"unit={self.unit} needs groups whose removal makes layers smaller "
                f"({', '.join(REMOVABLE_KINDS)}), got {uncosted[0]}: set unit=groups"
            )
        if self.scope == "isomorphic" and self.groups not in ("filters", ("filters",)):
            raise ValueError(
                "scope=isomorphic compares how filters are coupled, so it needs groups=filters"
            )
        if (self.scope == "pattern") != (self.pattern is not None):
            raise ValueError("scope=pattern and pattern=[N,M] need each other: set both")
        if self.ratio is None and self.k is None and self.pattern is None:
            raise ValueError("ratio=null needs k or pattern: give a ratio between 0 and 1")
        if self.pattern is not None and not 0 < self.pattern[0] < self.pattern[1]:
            raise ValueError(
                f"pattern={list(self.pattern)} must be [N,M] with 0 < N < M, such as [2,4]"
            )
        if self.k is not None and (self.scope, self.unit) != ("global", "groups"):
            raise ValueError(
                "k is the number of groups in the whole network: it needs scope=global and "
                "unit=groups"
            )
        return self

    def _choice(self) -> GroupChoice:
        kinds = (self.groups,) if isinstance(self.groups, str) else self.groups
        return GroupChoice(groups=kinds, layers=self.layers, block=self.block, masks=self.masks)

    @abstractmethod
    def solver(self, context: SolverContext) -> Solver:
        """Return the method's solver."""

    def check(self, structure: ModelStructure) -> None:
        """Also refuse groups that the budget does not fit, and one below the floors."""
        families = choice.outlines(self._require_classifier(structure), self._choice())
        sizes = [family.groups for family in families]
        if self.unit != "groups":
            refuse_uncosted(families, self.unit)
        elif self.pattern is not None:
            choice.refuse_unfit_pattern(families, *self.pattern)
        elif self.scope == "global":
            refuse_impossible_sparsity(sizes, self._sparsity(sum(sizes)), self.floor)

    def planned_removals(self, structure: ModelStructure) -> list[int] | None:
        """Return the groups to remove, in all or per layer; None if the budget is a cost."""
        config = structure.vision
        if config is None or self.unit != "groups":
            return None
        sizes = [family.groups for family in choice.outlines(config, self._choice())]
        parts = sizes if self.scope == "layer" else [sum(sizes)]
        # 1e-9 corrects products that are slightly below a whole number, such as 0.29 * 100.
        return [int(self._sparsity(sum(sizes)) * size + 1e-9) for size in parts]

    def _sparsity(self, groups: int) -> float:
        """Return the fraction to remove, of `groups` or of their cost."""
        if self.pattern is not None:
            return 1 - self.pattern[0] / self.pattern[1]
        if self.k is None:
            assert self.ratio is not None  # `_check_budget` refuses null.
            return self.ratio
        if self.k > groups:
            raise UserError(f"k={self.k} is too large: the network has {groups} {self.groups}")
        return 1 - self.k / groups

    def _result(
        self, network: Classifier, job: TrainingJob, outcome: TrainingOutcome
    ) -> tuple[Classifier, MethodReport]:
        """Remove the groups that were not selected; return the smaller network and its report."""
        partition, families = job.partition, job.partition.families
        # Groups that cannot be removed stay zeroed.
        removable, dead = [], []
        for family, dead_M in zip(families, partition.split(~outcome.keep), strict=True):
            if family.unremovable_reason is None:
                removable.append(family)
                dead.append(dead_M)
        if removable:
            network = smaller_classifier(network, removable, dead, self.multiple)
        details = self._details(partition, outcome, job.splits)
        details["budget"] = job.allocation.used(outcome.keep)
        removed = any(bool(dead_M.any()) for dead_M in dead)
        effect: Effect = "removed" if removed else "zeroed"
        return network, MethodReport(effect, details, trained=True)

    def _planned(self, network: Classifier, splits: Splits, context: Context) -> TrainingJob:
        partition = GroupPartition(network, choice.families_of(network, self._choice()))
        allocation = self._allocation(network, splits, partition)
        return self._job(network, splits, partition, allocation, self.solver, context)

    def _allocation(
        self, network: Classifier, splits: Splits, partition: GroupPartition
    ) -> Allocation:
        if self.pattern is not None:
            return PatternAllocation(partition, *self.pattern)
        sparsity = self._sparsity(partition.groups)
        if self.unit == "groups":
            allocations = {"layer": LayerAllocation, "isomorphic": IsomorphicAllocation}
            return allocations.get(self.scope, GlobalAllocation)(partition, sparsity, self.floor)
        # Multiply-adds depend on the image size, so costs are counted on a real example.
        image, _ = splits.test.fetch(torch.zeros(1, dtype=torch.long), None)
        costs = GroupCosts(network, partition.families, image.to(partition.device), self.unit)
        return CostAllocation(partition, sparsity, costs, self.floor)

    def _details(
        self, partition: GroupPartition, outcome: TrainingOutcome, splits: Splits
    ) -> dict[str, Any]:
        """Return the details for the record: counts before and after the selection, and history."""
        parts = partition.split(outcome.keep)
        kept, groups = [int(part.sum()) for part in parts], [len(part) for part in parts]
        names = [family.name for family in partition.families]
        return {
            "data": splits.provenance,
            "groups": partition.groups,
            "kept": int(outcome.keep.sum()),
            "alive_before_selection": outcome.alive,
            "fractional_before_selection": outcome.fractional,
            "total_strength": outcome.total_strength,
            "kept_by_layer": dict(zip(names, kept, strict=True)),
            "groups_by_layer": dict(zip(names, groups, strict=True)),
            "only_zeroed": {
                family.name: family.unremovable_reason
                for family in partition.families
                if family.unremovable_reason is not None
            },
            "accuracy": outcome.history[-1]["accuracy"],
            "history": outcome.history,
        }


class Wgsef(SparseTraining):
    """WGSEF with one of three algorithms.

    `envelope` is the paper's Algorithm 2, `hspg` adds half-space steps to it, and `debiased` is the
    homotopy, which by construction ends with at most k groups. `strength`, `metric`, `ridge` and
    `every` are options of the first two (see `EnvelopeForm`); `strength=0.3 metric=euclidean
    ridge=true` follows the paper to the letter. `reach` is the value of lambda d at which the
    homotopy ends: 1, the maximum, is hard selection, and a smaller value leaves more to the final
    selection.
    """

    algorithm: Literal["envelope", "hspg", "debiased"] = "debiased"
    strength: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    metric: envelope.EnvelopeMetric = "unit"
    ridge: bool = False
    every: int = Field(default=1, ge=1)
    reach: float = Field(default=1.0, gt=0, le=1)

    def solver(self, context: SolverContext) -> Solver:
        """Return the solver of the chosen algorithm."""
        form = envelope.EnvelopeForm(self.strength, self.metric, self.ridge, self.every)
        if self.algorithm == "envelope":
            return envelope.EnvelopeSolver(context, form)
        if self.algorithm == "hspg":
            return envelope.EnvelopeHalfSpaceSolver(context, form)
        return envelope.DebiasedSolver(context, self.reach)
