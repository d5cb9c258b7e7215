"""Base class of the methods that train a classifier towards few groups, with any solver.

Shapes: M groups of all families.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator

from bench.data import images
from bench.errors import UserError
from bench.method import Context, Method, MethodReport
from bench.models.vision import Classifier, build
from methods.wgsef.export.classifier import smaller_classifier
from methods.wgsef.groups import choice
from methods.wgsef.groups.choice import ConvolutionGroups
from methods.wgsef.groups.costs import Costs
from methods.wgsef.groups.partition import Partition
from methods.wgsef.solvers.solver import Scene, Solver
from methods.wgsef.training.allocation import Allocation, Scope, refuse_impossible
from methods.wgsef.training.recipe import Recipe
from methods.wgsef.training.trainer import Outcome, Task, Trainer

if TYPE_CHECKING:
    from bench.data.images import Splits
    from bench.models.anatomy import Anatomy
    from bench.models.model import Model


class SparseTraining(Method):
    """Train a classifier with a solver until few groups are left, then remove all others.

    `ratio` is the fraction of groups to remove (of that cost with scope `macs` or `bytes`); `k`, if
    given, is the number of groups to keep in the whole network instead. `floor` is the minimum
    fraction kept per layer. `split: validation` trains without the held-out images and reports
    accuracy on them. `restart` draws fresh weights; otherwise training starts from the model's own.
    Kept counts are rounded up to `multiple`. An interrupted run resumes; `checkpoints` names a
    folder to use for that instead of the run's own.
    """

    ratio: float = Field(default=0.7, gt=0, lt=1)
    groups: ConvolutionGroups = "filters"
    scope: Scope = "global"
    floor: float = Field(default=0.05, ge=0, lt=1)
    data: str = "digits"
    data_folder: str | None = None
    split: Literal["test", "validation"] = "test"
    k: int | None = Field(default=None, ge=1)
    recipe: Recipe = Recipe()
    restart: bool = True
    multiple: int = Field(default=1, ge=1)
    checkpoints: str | None = None

    @field_validator("groups", mode="before")
    @classmethod
    def _one_kind(cls, groups: Any) -> Any:
        if isinstance(groups, list | tuple):
            kinds = " and ".join(str(kind) for kind in groups)
            raise ValueError(f"{kinds} overlap in their weights: choose one kind of group")
        return groups

    @field_validator("k")
    @classmethod
    def _counts_groups(cls, k: int | None, others: ValidationInfo) -> int | None:
        # `others.data` holds only fields declared above `k`, so `scope` must stay above it.
        if k is not None and others.data.get("scope") != "global":
            raise ValueError(
                "k is the number of groups in the whole network: it needs scope=global"
            )
        return k

    @abstractmethod
    def solver(self, scene: Scene) -> Solver:
        """Return the method's solver."""

    def check(self, anatomy: Anatomy) -> None:
        """Refuse other models, mismatched images, and budgets that the network cannot keep."""
        config = anatomy.vision
        if config is None:
            raise UserError(
                f"sparse training needs an image classifier; this model is {anatomy.architecture}"
            )
        known = images.shape(self.data)
        # An ImageNet folder may hold only a subset of the classes.
        given = replace(known, classes=config.classes) if self.data == "imagenet" else known
        config.refuse_other_images(self.data, given)
        sizes = choice.sizes(config, self.groups)
        refuse_impossible(sizes, self._sparsity(sum(sizes)), self.scope, self.floor)

    def _sparsity(self, groups: int) -> float:
        """Return the fraction to remove, of `groups` or of their cost."""
        if self.k is None:
            return self.ratio
        if self.k > groups:
            raise UserError(f"k={self.k} is too large: the network has {groups} {self.groups}")
        return 1 - self.k / groups

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Train, select, fine-tune and remove; `model.network` becomes the smaller network."""
        network = self._network(model, context.seed)
        splits = self._splits()
        network.config.refuse_other_images(splits.name, splits.shape)
        families = choice.chosen(network, self.groups)
        partition = Partition(network, families)
        outcome = Trainer(self._task(network, splits, partition, context)).run()
        removable = all(family.removable is None for family in families)
        if removable:
            dead = partition.split(~outcome.keep)
            network = smaller_classifier(network, families, dead, self.multiple)
        model.network = network
        # The cached structure describes the old network.
        model.__dict__.pop("anatomy", None)
        details = self._details(partition, outcome, splits)
        return MethodReport(saving="removed" if removable else "zeroed", details=details)

    def _network(self, model: Model, seed: int) -> Classifier:
        """Return the classifier to train, with fresh weights if `restart` is set."""
        network = model.network
        if not isinstance(network, Classifier):
            raise UserError(f"{model.name} is not an image classifier")
        if self.restart:
            # Initialisation draws from the global generator. Seeding it here makes the weights
            # independent of methods applied earlier in the same run.
            torch.manual_seed(seed)
            network = build(network.config).to(model.device)
        return network

    def _splits(self) -> Splits:
        splits = images.load(self.data, self.data_folder)
        return splits if self.split == "test" else splits.for_choosing()

    def _task(
        self, network: Classifier, splits: Splits, partition: Partition, context: Context
    ) -> Task:
        costs = None
        if self.scope in ("macs", "bytes"):
            # Multiply-adds depend on the image size, so costs are counted on a real example.
            image, _ = splits.test.fetch(torch.zeros(1, dtype=torch.long), None)
            costs = Costs(network, partition.families, image.to(partition.device), self.scope)
        return Task(
            network=network,
            splits=splits,
            partition=partition,
            allocation=Allocation(
                partition, self._sparsity(partition.groups), self.scope, self.floor, costs
            ),
            solver=self.solver,
            recipe=self.recipe,
            seed=context.seed,
            folder=Path(self.checkpoints) if self.checkpoints else context.folder,
            # The class name is part of the identity of a checkpoint: renaming a method class
            # invalidates the checkpoints of interrupted runs. Where they are stored is not.
            identity=f"{type(self).__name__} {self.model_dump_json(exclude={'checkpoints'})}",
            progress=context.progress,
        )

    def _details(self, partition: Partition, outcome: Outcome, splits: Splits) -> dict[str, Any]:
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
            "kept_by_layer": dict(zip(names, kept, strict=True)),
            "groups_by_layer": dict(zip(names, groups, strict=True)),
            "accuracy": outcome.history[-1]["accuracy"],
            "history": outcome.history,
        }
