"""ShortGPT: remove the decoder layers that change the direction of the hidden state least.

Shapes: B rows, L tokens per row, D d_model.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from bench.errors import UserError
from bench.method import Context, LayerReport, Method, MethodReport
from bench.models.layer_stream import LayerStream
from bench.models.model import Model
from bench.models.network import text_config
from bench.models.structure.model_structure import ModelStructure
from bench.ui import Progress
from methods.dense.sparsity import count_zeroed
from methods.moe.pruning import require_calibration


class ShortGPT(Method):
    """Remove the layers with the lowest block influence (ShortGPT, arXiv 2403.03853).

    The influence of a layer is Σ over tokens of 1 - cos(input, output). All layers are scored once
    on the dense model, and the `count` lowest are removed together; without `count` their number is
    the share `ratio`, rounded down. The remaining layers keep their order.
    """

    uses_calibration: ClassVar[bool] = True
    ratio: float = Field(default=0.25, ge=0, lt=1)
    count: int | None = Field(default=None, ge=0)
    batch: int = Field(default=8, ge=1)

    def check(self, structure: ModelStructure) -> None:
        """Refuse a network without decoder layers, and a count that leaves none."""
        if not structure.layers:
            raise UserError(f"shortgpt needs a decoder; {structure.architecture} has no layers")
        if self.count is not None and self.count >= len(structure.layers):
            raise UserError(
                f"count={self.count} would remove all {len(structure.layers)} layers of "
                f"{structure.architecture}: set at most {len(structure.layers) - 1}"
            )

    def planned_removals(self, structure: ModelStructure) -> list[int] | None:
        """Return the number of layers to remove; None if `count` replaces the ratio."""
        return None if self.count is not None else [count_zeroed(self.ratio, len(structure.layers))]

    @torch.no_grad()
    def apply(self, model: Model, context: Context) -> MethodReport:
        """Score all layers, remove the lowest, and renumber the others."""
        calibration = require_calibration(context)
        layers = model.structure.layers
        influence = self._influences(model, calibration.tokens, context.progress)
        count = count_zeroed(self.ratio, len(layers)) if self.count is None else self.count
        # Stable, so that the earlier of equal layers is removed.
        lowest = sorted(range(len(layers)), key=lambda index: influence[index])[:count]
        kept = [index for index in range(len(layers)) if index not in lowest]
        if lowest:
            keep_layers(model, kept)
        details = {
            "requested": {"ratio": self.ratio, "count": self.count},
            "removed_layers": sorted(lowest),
            "calibration": calibration.fingerprint,
        }
        reports = [
            LayerReport.model_validate({"layer": index, "influence": value, "kept": index in kept})
            for index, value in enumerate(influence)
        ]
        return MethodReport("removed" if lowest else "none", details, reports)

    def _influences(self, model: Model, tokens_BL: Tensor, progress: Progress) -> list[float]:
        layers, found = model.structure.layers, [0.0] * len(model.structure.layers)

        def observe(
            layer: nn.Module,
            args: tuple[Tensor, ...],
            kwargs: dict[str, Any],
            output: Tensor | tuple[Tensor, ...],
        ) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            found[places[layer]] += float(block_influence(before, after).sum())

        # Hooks on the layers, because the last state of `output_hidden_states` is taken after the
        # final norm, which would inflate the influence of the last layer.
        places = {layer: index for index, layer in enumerate(layers)}
        handles = [layer.register_forward_hook(observe, with_kwargs=True) for layer in layers]
        try:
            with LayerStream(model.network, layers, tokens_BL, self.batch) as stream:
                # Reset, because entering the stream has called the hooks too, on layers that return
                # their input.
                found[:] = [0.0] * len(layers)
                for index in progress.track(range(len(layers)), "scoring layers"):
                    stream.run(index, advance=True)
        finally:
            for handle in handles:
                handle.remove()
        return found


def block_influence(before_BLD: Tensor, after_BLD: Tensor) -> Tensor:
    """Return 1 - cos of every token's state before and after a layer, [B, L] in float32.

    The cosine of a zero state is undefined and counts as 0.5, as in the release. Computed in
    float32 even for half-precision states: the resolution of float16 near 1 is 5e-4, with which
    layers would tie.
    """
    before_BLD, after_BLD = before_BLD.float(), after_BLD.float()
    product_BL = (before_BLD * after_BLD).sum(-1)
    cosine_BL = product_BL / (before_BLD.norm(dim=-1) * after_BLD.norm(dim=-1))
    influence_BL: Tensor = 1 - cosine_BL.nan_to_num(nan=0.5)
    return influence_BL


def keep_layers(model: Model, kept: list[int]) -> None:
    """Remove all decoder layers except those at the given indices, and update the config.

    This updates the config's number of layers, every list in it with one entry per layer (such as
    `layer_types`), and the `layer_idx` with which attention modules index the KV cache.
    """
    layers = model.structure.layers
    for module in model.network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and tuple(child) == layers:
                setattr(module, name, nn.ModuleList(layers[index] for index in kept))
    config: Any = text_config(model.network)  # fields depend on the architecture
    for key, value in list(vars(config).items()):
        if key.endswith("_only_layers") and isinstance(value, list):  # a list of layer numbers
            setattr(config, key, [kept.index(index) for index in value if index in kept])
        # By name and length, since a list of tokens could have the same length.
        elif "layer" in key and isinstance(value, list) and len(value) == len(layers):
            setattr(config, key, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)
    for place, index in enumerate(kept):
        for module in layers[index].modules():
            if getattr(module, "layer_idx", None) == index:
                module.layer_idx = place  # type: ignore[assignment]  # modules declare no fields
    model.invalidate_structure()
