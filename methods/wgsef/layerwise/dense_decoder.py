"""WGSEF without training on dense decoders: FFN neurons or heads that best reconstruct each layer.

Shapes: B prompts or rows, S tokens, T tokens in all, M activations a layer reads out (an FFN's
neurons, or all heads side by side), D d_model, A atoms, K kept activations.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from bench.data.prompts import ProcessedPrompts
from bench.errors import UserError
from bench.method import (
    ALL_FORMS,
    Context,
    InputSize,
    LayerReport,
    Method,
    MethodReport,
    MethodWork,
    WeightForm,
)
from bench.models.model import Model
from bench.models.offload import is_offloaded
from bench.models.structure.dense_layer import feed_forwards, find_heads, shape_of, weight_of
from bench.models.structure.model_structure import ModelStructure
from methods.moe.least_squares import refit_columns, refit_error, refit_flops
from methods.moe.pruning import LayerEntry, require_calibration
from methods.wgsef.groups import transformer
from methods.wgsef.groups.partition import GroupFamily
from methods.wgsef.layerwise.moe_layers import SELECTORS
from methods.wgsef.layerwise.observation import (
    LAYERS_AT_ONCE,
    LayerGram,
    observe_calls,
    observe_text,
)
from methods.wgsef.layerwise.reconstruction import (
    DROP_OPERATORS,
    Reconstruction,
    select_by_elimination,
    selection_flops,
)
from methods.wgsef.removal import refuse_unloadable_heads, shrink_language_model


class WgsefDecoder(Method):
    """Keep the neurons, or heads, of each layer that reconstruct its output best.

    In grouped-query attention a head is a KV head with its query heads. With `scope=layer` each
    layer loses the fraction `ratio`, so that one config describes all layers. With `global`, the
    budget is divided among the layers by backward elimination on the unpruned model, with errors
    relative to each layer's output; such a model can be run but not exported. Every layer keeps at
    least one atom. `selector` is that of `wgsef_layerwise`. `refit` fits the remaining columns by
    least squares. With `sequential`, layers are measured on the outputs of the pruned layers before
    them.
    """

    accepts: ClassVar[frozenset[WeightForm]] = ALL_FORMS - {"packed"}

    atoms: Literal["neurons", "heads"]
    ratio: float = Field(ge=0, lt=1)
    scope: Literal["layer", "global"] = "layer"
    selector: Literal["debiased", "greedy", "energy"] = "debiased"
    refit: bool = True
    refit_damping: float = Field(default=1e-4, gt=0)
    sequential: bool = True
    state: Literal["zeroed", "removed"] = "removed"

    def check(self, structure: ModelStructure) -> None:
        """Refuse networks whose layers do not have exactly one module with such atoms."""
        if not structure.layers:
            raise UserError(
                f"{structure.architecture} has no decoder layers to prune {self.atoms} in"
            )
        # A MoE layer would pass the check below with its shared expert as the only FFN.
        if self.atoms == "neurons" and structure.moe:
            raise UserError(
                f"{structure.architecture} has experts in its layers, but this method needs one "
                "dense FFN per layer: use wgsef_layerwise for MoE models"
            )
        for layer in structure.layers:
            heads = self._family(layer, structure.architecture).groups
            if self.atoms == "heads" and self.state == "removed" and self.scope == "layer":
                config = cast(Any, find_heads(layer)[0].owner).config
                refuse_unloadable_heads(config, heads - self._removed(heads))

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Return the observations, the Gram matrices, the selections and the refits.

        Only the upper triangle of a Gram matrix is computed, in bands: 9/16 of 2·T·M².
        """
        flops, dropped, widest = 0.0, 0, 0
        removed = self.planned_removals(structure)
        for index, layer in enumerate(structure.layers):
            family = self._family(layer, structure.architecture)
            width, d_model = _readout_size(layer, family)
            each = width // family.groups
            gone = removed[index] if self.scope == "layer" else removed[0] // len(structure.layers)
            observed = 1 + (self.scope == "global")
            flops += observed * 2 * 9 / 16 * inputs.tokens * width**2
            flops += selection_flops(self.selector, width, d_model, gone * each)
            if self.scope == "global":
                flops += selection_flops("greedy", width, d_model, gone * each)
            flops += refit_flops(width, width - gone * each, d_model) if self.refit else 0.0
            dropped += gone * ((self.selector == "greedy") + (self.scope == "global"))
            widest = max(widest, width)
        return MethodWork(
            forwards=self._passes(structure),
            readings=2.0,
            flops=flops,
            operators=float(DROP_OPERATORS * dropped),
            memory=4 * 8.0 * widest**2,
        )

    @abstractmethod
    def _passes(self, structure: ModelStructure) -> float:
        """Return the number of passes of the calibration inputs through the layers."""

    @torch.no_grad()
    def apply(self, model: Model, context: Context) -> MethodReport:
        """Measure, select and refit layer by layer, then remove all dead atoms at once."""
        # Atoms are zeroed in memory; offloaded weights would be loaded again unchanged.
        if is_offloaded(model.network):
            raise UserError(
                "this method needs the weights of the whole model in memory: "
                "set model.device_map=null"
            )
        structure, names = model.structure, {m: name for name, m in model.network.named_modules()}
        families = [
            _qualified(self._family(layer, structure.architecture), names[layer])
            for layer in structure.layers
        ]
        readouts = [self._readout(model.network, family) for family in families]
        counts = self._counts(model, context, families, readouts)
        observed = self._observe(model, context, readouts, sequential=self.sequential)
        layers, dead = list[LayerEntry](), list[Tensor]()
        for index in context.progress.track(range(len(families)), f"choosing {self.atoms}"):
            family, readout = families[index], readouts[index]
            gone_A, entry = self._choose(family, readout, next(observed), counts[index])
            # Zeroed here, so that later layers are measured behind a pruned one. Removed at the
            # end, since shapes must agree with the config as long as the network runs.
            _zero_atoms(model.network, family, gone_A)
            dead.append(gone_A)
            layers.append({"layer": index, **entry})
        observed.close()
        removed = sum(int(gone_A.sum()) for gone_A in dead)
        if removed and self.state == "removed":
            shrink_language_model(model.network, families, dead)
            model.invalidate_structure()
        details = {
            "requested": {"ratio": self.ratio, "scope": self.scope},
            f"removed_{self.atoms}": removed,
            self.atoms: sum(family.groups for family in families),
            "calibration": self._fingerprint(context),
        }
        effect = self.state if removed else "none"
        return MethodReport(effect, details, [LayerReport(**layer) for layer in layers])

    def _counts(
        self,
        model: Model,
        context: Context,
        families: Sequence[GroupFamily],
        readouts: Sequence[nn.Module],
    ) -> list[int]:
        """Return how many atoms each layer keeps."""
        sizes = [family.groups for family in families]
        if self.scope == "layer":
            return [size - self._removed(size) for size in sizes]
        observed = self._observe(model, context, readouts, sequential=False)
        problems = [
            self._problem(family, readout, gram.mean()).of_unit_output()
            for family, readout, gram in zip(families, readouts, observed, strict=True)
        ]
        # Elimination is used whatever the selector: only it assigns each atom an error that can be
        # compared between layers, and it can keep at least one atom in every layer.
        masks = select_by_elimination(problems, sum(sizes) - self._removed_of_all(sizes), floor=1)
        return [int(kept_A.sum()) for kept_A in masks]

    def planned_removals(self, structure: ModelStructure) -> list[int]:
        """Return the number of atoms to remove, per layer or, with scope `global`, in total."""
        sizes = [self._family(layer, structure.architecture).groups for layer in structure.layers]
        if self.scope == "global":
            return [self._removed_of_all(sizes)]
        return [self._removed(size) for size in sizes]

    def _removed_of_all(self, sizes: Sequence[int]) -> int:
        """Return the number of atoms to remove from all layers, each of which keeps one."""
        share = math.floor(Fraction(repr(self.ratio)) * sum(sizes))
        return min(sum(sizes) - len(sizes), share)

    def _removed(self, atoms: int) -> int:
        """Return the number of atoms to remove from a layer, which keeps at least one."""
        # Rounded down, so that no layer loses more than `ratio`. Computed from the decimal as
        # typed, since in floating point 0.29 * 100 is 28.999...
        return min(atoms - 1, math.floor(Fraction(repr(self.ratio)) * atoms))

    @abstractmethod
    def _observe(
        self, model: Model, context: Context, readouts: Sequence[nn.Module], *, sequential: bool
    ) -> Generator[LayerGram, None, None]:
        """Yield the statistics of each layer's output projection; see `observe_text`."""

    @abstractmethod
    def _fingerprint(self, context: Context) -> str:
        """Return the fingerprint of the calibration inputs."""

    def _family(self, layer: nn.Module, architecture: str) -> GroupFamily:
        """Return the atoms of one layer, with names relative to it."""
        make = transformer.neurons if self.atoms == "neurons" else transformer.heads
        try:
            families = make(layer)
        except UserError as missing:
            raise UserError(f"{architecture} has no {self.atoms} to remove: {missing}") from None
        if len(families) != 1:
            raise UserError(
                f"{architecture} has {len(families)} modules with {self.atoms} in a layer, but "
                "this method needs exactly one"
            )
        return families[0]

    def _readout(self, network: nn.Module, family: GroupFamily) -> nn.Module:
        # The last slice, of neurons as of heads, is the weight of the output projection.
        return network.get_submodule(family.owned_slices[-1].tensor.removesuffix(".weight"))

    def _problem(self, family: GroupFamily, readout: nn.Module, gram_MM: Tensor) -> Reconstruction:
        """Return the problem of one layer."""
        weight_DM = weight_of(readout)
        if not bool(gram_MM.isfinite().all()):
            raise UserError(
                f"calibration produced NaN or infinite activations in {family.name}: try "
                "model.dtype=float32 or different calibration data"
            )
        width = weight_DM.shape[1] // family.groups
        return Reconstruction.from_gram(gram_MM, weight_DM.T, width)

    def _choose(
        self, family: GroupFamily, readout: nn.Module, gram: LayerGram, count: int
    ) -> tuple[Tensor, LayerEntry]:
        """Return a mask [A] of the atoms to remove, and the report; the others are refitted."""
        gram_MM, weight_DM = gram.mean(), weight_of(readout)
        problem = self._problem(family, readout, gram_MM)
        (kept_A,) = SELECTORS[self.selector]([problem], count)
        entry: LayerEntry = {"kept": kept_A.nonzero().flatten().tolist()}
        kept_K = kept_A.repeat_interleave(problem.width).nonzero().flatten()
        if self.refit and len(kept_K) < weight_DM.shape[1]:
            # The remaining columns can make up for part of the lost output.
            gram_MM *= gram.tokens
            columns_DK = refit_columns(gram_MM, weight_DM, kept_K, self.refit_damping).to(weight_DM)
            entry["refit"] = {
                "error_before": refit_error(gram_MM, weight_DM, kept_K, weight_DM[:, kept_K]),
                "error_after": refit_error(gram_MM, weight_DM, kept_K, columns_DK),
            }
            weight_DM[:, kept_K] = columns_DK
        return ~kept_A, entry


class OnText(WgsefDecoder):
    """Variant that is calibrated on the run's calibration text."""

    uses_calibration: ClassVar[bool] = True
    batch: int = Field(default=8, ge=1)

    def _passes(self, structure: ModelStructure) -> float:
        unpruned = float(self.scope == "global")
        if not self.sequential:
            return unpruned + 1
        # A layer runs up to its readout and, once that is pruned, from there on (`LayerReplay`).
        # For heads it runs again from its beginning, so attention is computed twice.
        again = [
            1 - sum(_size(p) for f in feed_forwards(layer) for p in f.projections) / _size(layer)
            for layer in structure.layers
        ]
        return unpruned + 1 + (sum(again) / len(again) if self.atoms == "heads" else 0.0)

    def _observe(
        self, model: Model, context: Context, readouts: Sequence[nn.Module], *, sequential: bool
    ) -> Generator[LayerGram, None, None]:
        tokens_BS = require_calibration(context).tokens.to(model.device)
        return observe_text(model, readouts, tokens_BS, self.batch, sequential=sequential)

    def _fingerprint(self, context: Context) -> str:
        return require_calibration(context).fingerprint


class OnPrompts(WgsefDecoder):
    """Variant that is calibrated on the run's prompts with images, text and visual tokens alike."""

    @property
    def uses_prompts(self) -> bool:
        """This method always needs prompts with images."""
        return True

    def _passes(self, structure: ModelStructure) -> float:
        walks = math.ceil(len(structure.layers) / LAYERS_AT_ONCE) if self.sequential else 1
        return float(walks + (self.scope == "global"))

    def _observe(
        self, model: Model, context: Context, readouts: Sequence[nn.Module], *, sequential: bool
    ) -> Generator[LayerGram, None, None]:
        calls = _require_prompts(context).inputs
        return observe_calls(model, readouts, calls, sequential=sequential)

    def _fingerprint(self, context: Context) -> str:
        return _require_prompts(context).fingerprint


def _require_prompts(context: Context) -> ProcessedPrompts:
    if context.prompts is None:
        raise UserError("this method needs prompts with images: set prompts=NAME")
    return context.prompts


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _readout_size(layer: nn.Module, family: GroupFamily) -> tuple[int, int]:
    """Return the input and output widths of a layer's readout."""
    outputs, width = shape_of(
        layer.get_submodule(family.owned_slices[-1].tensor.removesuffix(".weight"))
    )
    return width, outputs


def _zero_atoms(network: nn.Module, family: GroupFamily, gone_A: Tensor) -> None:
    for part in family.owned_slices:
        weight = network.get_parameter(part.tensor)
        weight.data.movedim(part.axes[0], 0)[part.units_of(gone_A).to(weight.device)] = 0


def _qualified(family: GroupFamily, layer: str) -> GroupFamily:
    """Return a layer's atoms with names relative to the whole network."""
    owned = tuple(replace(part, tensor=f"{layer}.{part.tensor}") for part in family.owned_slices)
    # The name is empty if the feed-forward is the layer itself, as in OPT.
    name = f"{layer}.{family.name}" if family.name else layer
    return GroupFamily(name, family.kind, family.groups, owned)
