"""WGSEF without training on dense decoders: FFN neurons or heads that best reconstruct each layer.

Shapes: B prompts or rows, S tokens, T tokens in all, M activations a layer reads out (an FFN's
neurons, or all heads side by side), D d_model, A atoms, K kept activations.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from bench.errors import UserError
from bench.method import ALL_FORMS, Context, LayerReport, Method, MethodReport, WeightForm
from bench.models.model import Model
from bench.models.offload import is_offloaded
from bench.models.structure.dense_layer import find_heads, weight_of
from bench.models.structure.model_structure import ModelStructure
from methods.moe.calibration import Gram, observe_inputs
from methods.moe.least_squares import refit_columns, refit_error
from methods.moe.pruning import LayerEntry, require_calibration
from methods.wgsef.groups import transformer
from methods.wgsef.groups.partition import GroupFamily
from methods.wgsef.layerwise.moe_layers import SELECTORS
from methods.wgsef.layerwise.reconstruction import Reconstruction
from methods.wgsef.removal import refuse_unstated_heads, smaller_language_model

ModelInputs = Mapping[str, Tensor]
LAYERS_AT_ONCE = 4
"""Layers measured per pass; the [M, M] Gram matrices are float64, too large to hold all at once."""


class WgsefDecoder(Method):
    """Keep the neurons, or heads, of each layer that reconstruct its output best.

    With grouped queries a head is a KV head with its query heads. Each layer loses the fraction
    `ratio`, since transformers builds all layers with one config; at least one atom stays.
    `selector` is that of `wgsef_layerwise`. `refit` fits the remaining columns by least squares.
    With `sequential`, layers are measured `LAYERS_AT_ONCE` at a time on what the pruned layers
    before them produce.
    """

    accepts: ClassVar[frozenset[WeightForm]] = ALL_FORMS - {"packed"}

    atoms: Literal["neurons", "heads"]
    ratio: float = Field(ge=0, lt=1)
    selector: Literal["debiased", "greedy", "energy"] = "debiased"
    refit: bool = True
    refit_damping: float = Field(default=1e-4, gt=0)
    sequential: bool = True
    state: Literal["zeroed", "removed"] = "removed"

    def check(self, structure: ModelStructure) -> None:
        """Refuse networks whose layers have no such atoms."""
        if not structure.layers:
            raise UserError(
                f"{structure.architecture} has no decoder layers to prune {self.atoms} in"
            )
        # A fused mixture of experts would pass below with its shared expert as the only FFN.
        if self.atoms == "neurons" and structure.moe:
            raise UserError(
                f"{structure.architecture} has experts in its layers, but this method needs one "
                "dense FFN per layer: use wgsef_layerwise for mixtures of experts"
            )
        for layer in structure.layers:
            self._family(layer, structure.architecture)
            if self.atoms == "heads" and self.state == "removed":
                refuse_unstated_heads(cast(Any, find_heads(layer)[0].owner).config)

    @torch.no_grad()
    def apply(self, model: Model, context: Context) -> MethodReport:
        """Measure, select and refit a few layers at a time, then remove all dead atoms at once."""
        # Atoms are zeroed in memory; offloaded weights would be fetched again as they were.
        if is_offloaded(model.network):
            raise UserError(
                "this method needs the weights of the whole model in memory: "
                "set model.device_map=null"
            )
        structure, names = model.structure, {m: name for name, m in model.network.named_modules()}
        found = [self._family(layer, structure.architecture) for layer in structure.layers]
        families = [
            _qualified(family, names[layer])
            for family, layer in zip(found, structure.layers, strict=True)
        ]
        inputs, fingerprint = self._inputs(context, model)
        step = LAYERS_AT_ONCE if self.sequential else len(families)
        layers, dead = list[LayerEntry](), list[Tensor]()
        starts = list(range(0, len(families), step))
        for start in context.progress.track(starts, f"choosing {self.atoms}"):
            group = families[start : start + step]
            readouts = [self._readout(model.network, family) for family in group]
            grams, tokens = _grams(model, inputs, readouts)
            for family, readout in zip(group, readouts, strict=True):
                gone_A, entry = self._choose(family, readout, grams[readout], tokens)
                # Zeroed now, so that the next layers are measured behind a pruned one; cut at the
                # end, since shapes must agree with the config as long as the network runs.
                _zero_atoms(model.network, family, gone_A)
                dead.append(gone_A)
                layers.append({"layer": len(layers), **entry})
        removed = sum(int(gone_A.sum()) for gone_A in dead)
        if removed and self.state == "removed":
            model.network = smaller_language_model(model.network, families, dead)
            model.invalidate_structure()
        details = {
            "requested": {"ratio": self.ratio},
            f"removed_{self.atoms}": removed,
            self.atoms: sum(family.groups for family in families),
            "calibration": fingerprint,
        }
        effect = self.state if removed else "none"
        return MethodReport(effect, details, [LayerReport(**layer) for layer in layers])

    def planned_removals(self, structure: ModelStructure) -> list[int]:
        """Return the number of atoms to remove per layer."""
        return [
            self._removed(self._family(layer, structure.architecture).groups)
            for layer in structure.layers
        ]

    def _removed(self, atoms: int) -> int:
        """Return how many of a layer's atoms go; one stays."""
        # Rounded down, so that no layer loses more than `ratio`; as a fraction of the decimal as
        # typed, since in floating point 0.29 * 100 is 28.999...
        return min(atoms - 1, math.floor(Fraction(repr(self.ratio)) * atoms))

    @abstractmethod
    def _inputs(self, context: Context, model: Model) -> tuple[Sequence[ModelInputs], str]:
        """Return the inputs on which activations are measured, and their fingerprint."""

    def _family(self, layer: nn.Module, architecture: str) -> GroupFamily:
        """Return the atoms of one layer; names are relative to it."""
        make = transformer.neurons if self.atoms == "neurons" else transformer.heads
        try:
            found = make(layer)
        except UserError as missing:
            raise UserError(f"{architecture} has no {self.atoms} to remove: {missing}") from None
        if len(found) != 1:
            raise UserError(
                f"{architecture} has {len(found)} modules with {self.atoms} in a layer, but this "
                "method needs one"
            )
        return found[0]

    def _readout(self, network: nn.Module, family: GroupFamily) -> nn.Module:
        # The weight of the output projection is the last slice of neurons and of heads alike.
        return network.get_submodule(family.owned_slices[-1].tensor.removesuffix(".weight"))

    def _choose(
        self, family: GroupFamily, readout: nn.Module, gram_MM: Tensor, tokens: int
    ) -> tuple[Tensor, LayerEntry]:
        """Return a mask [A] of the atoms to remove from a layer, after refitting all others."""
        if not bool(gram_MM.isfinite().all()):
            raise UserError(
                f"calibration produced NaN or infinite activations in {family.name}: try "
                "model.dtype=float32 or different calibration data"
            )
        weight_DM = weight_of(readout)
        width = weight_DM.shape[1] // family.groups
        count = family.groups - self._removed(family.groups)
        problem = Reconstruction.from_gram(gram_MM / tokens, weight_DM.T, width)
        (kept_A,) = SELECTORS[self.selector]([problem], count)
        entry: LayerEntry = {"kept": kept_A.nonzero().flatten().tolist()}
        kept_K = kept_A.repeat_interleave(width).nonzero().flatten()
        if self.refit and len(kept_K) < weight_DM.shape[1]:
            # The selection works on zeroed atoms; the columns that stay can take over part of the
            # lost output.
            columns_DK = refit_columns(gram_MM, weight_DM, kept_K, self.refit_damping).to(weight_DM)
            entry["refit"] = {
                "error_before": refit_error(gram_MM, weight_DM, kept_K, weight_DM[:, kept_K]),
                "error_after": refit_error(gram_MM, weight_DM, kept_K, columns_DK),
            }
            weight_DM[:, kept_K] = columns_DK
        return ~kept_A, entry


class OnText(WgsefDecoder):
    """Calibrated on the run's calibration text."""

    uses_calibration: ClassVar[bool] = True
    batch: int = Field(default=8, ge=1)

    def _inputs(self, context: Context, model: Model) -> tuple[Sequence[ModelInputs], str]:
        calibration = require_calibration(context)
        rows = calibration.tokens.to(model.device).split(self.batch)
        return [{"input_ids": rows_BS} for rows_BS in rows], calibration.fingerprint


class OnPrompts(WgsefDecoder):
    """Calibrated on the run's prompts with images, on text and visual tokens alike."""

    @property
    def uses_prompts(self) -> bool:
        """This method always needs prompts with images."""
        return True

    def _inputs(self, context: Context, model: Model) -> tuple[Sequence[ModelInputs], str]:
        if context.prompts is None:
            raise UserError("this method needs prompts with images: set prompts=NAME")
        return context.prompts.inputs, context.prompts.fingerprint


def _grams(
    model: Model, inputs: Sequence[ModelInputs], readouts: Sequence[nn.Module]
) -> tuple[dict[nn.Module, Tensor], int]:
    """Return ΦᵀΦ of the inputs of the projections, float64 [M, M], and the number of tokens."""
    found = {readout: Gram.of_inputs(readout, torch.float64) for readout in readouts}
    tokens = 0
    for call in inputs:
        mask = call.get("attention_mask")
        real_BS = torch.ones_like(call["input_ids"]) if mask is None else mask
        tokens += int(real_BS.sum())
        with observe_inputs(found, real_BS.bool()):
            # Only activations inside the layers are needed: logits of the last position are the
            # least the forward can compute.
            cast(Any, model.network)(**call, use_cache=False, logits_to_keep=1)
    return {readout: gram.total for readout, gram in found.items()}, tokens


def _zero_atoms(network: nn.Module, family: GroupFamily, gone_A: Tensor) -> None:
    for part in family.owned_slices:
        weight = network.get_parameter(part.tensor)
        weight.data.movedim(part.axes[0], 0)[part.units_of(gone_A).to(weight.device)] = 0


def _qualified(family: GroupFamily, layer: str) -> GroupFamily:
    """Return a layer's atoms with names relative to the whole network."""
    owned = tuple(
        type(part)(f"{layer}.{part.tensor}", part.axes, part.units, part.groups)
        for part in family.owned_slices
    )
    # OPT's feed-forward is the layer itself.
    name = f"{layer}.{family.name}" if family.name else layer
    return GroupFamily(name, family.kind, family.groups, owned)
