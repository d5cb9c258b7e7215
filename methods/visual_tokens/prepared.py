"""Weight slices for visual rows, cut once per layer and refreshed when plan or network change.

Shapes: H query heads, F a feed-forward's width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.models.multimodal.decoder import Decoder, DecoderLayer
from methods.visual_tokens.neuron_order import NeuronOrder
from methods.visual_tokens.plan import VisualPlan
from methods.visual_tokens.reorder import front_heads, move_heads, move_neurons
from methods.visual_tokens.weights import VisualWeights, cut_out

Version = tuple[int, ...]


class Prepared:
    """Cached per-layer weight slices and the current position of each original head and neuron."""

    def __init__(self, decoder: Decoder, plan: VisualPlan) -> None:
        self.decoder = decoder
        self.plan = plan
        self._heads = [list(range(layer.attention_view().heads)) for layer in decoder.layers]
        self._neurons = [[NeuronOrder(unit) for unit in layer.units()] for layer in decoder.layers]
        self._kept: dict[int, tuple[Version, VisualWeights]] = {}

    def layer(self, index: int) -> VisualWeights:
        """Return one layer's weights for visual rows.

        They are cut again if the plan or a weight has changed since, and at every call while
        weights are being trained, so that gradients reach the network.
        """
        layer = self.decoder.layers[index]
        version = (self.plan.revision, *_versions(layer))
        known = self._kept.get(index)
        if known is not None and known[0] == version:
            return known[1]
        weights = cut_out(
            layer,
            self.plan.layers[index],
            self._heads[index],
            self.places(layer),
            self.plan.dropped,
            self.plan.repairs.get(index),
        )
        # Slices of trained weights belong to one autograd graph, which backward frees: a cached
        # slice would fail in the next backward.
        if not torch.is_grad_enabled() or not _trained(layer):
            self._kept[index] = (version, weights)
        return weights

    def head_order(self) -> list[list[int]]:
        """Return the number of the head at each position, for every layer."""
        return [list(order) for order in self._heads]

    def numbered(self, layer: int, unit: int, value_F: Tensor) -> Tensor:
        """Order values of a feed-forward's neurons by their numbers in the loaded network."""
        order = self._neurons[layer][unit]
        return torch.zeros(order.width).scatter(0, order.now(len(value_F)), value_F)

    def reorder(self) -> None:
        """Move kept heads and neurons of every layer to the front of its weights."""
        for layer, plan in zip(self.decoder.layers, self.plan.layers, strict=True):
            if plan.heads is not None:
                self._front_heads(layer, set(plan.heads))
            if plan.neurons is not None:
                self._front_neurons(layer, plan.neurons)

    def _front_heads(self, layer: DecoderLayer, kept: set[int]) -> None:
        view, order = layer.attention_view(), self._heads[layer.index]
        places = front_heads(kept, order, view.heads // view.groups)
        if places != list(range(view.heads)):
            move_heads(view, places)
            self._heads[layer.index] = [order[place] for place in places]

    def _front_neurons(self, layer: DecoderLayer, kept: Sequence[Tensor]) -> None:
        orders = self._neurons[layer.index]
        for unit, order, chosen in zip(layer.units(), orders, kept, strict=True):
            now_F = order.follow(unit)
            # A stable sort of 0 (kept) and 1 (dropped): kept neurons come first, both kinds in
            # their present order, so a second call with the same plan moves nothing.
            moved_F = (~torch.isin(now_F, chosen.cpu())).to(torch.uint8).argsort(stable=True)
            if bool((moved_F[1:] < moved_F[:-1]).any()):
                move_neurons(unit, moved_F)
                order.moved(moved_F)

    def places(self, layer: DecoderLayer) -> tuple[Tensor, ...] | None:
        """Return the present positions of each feed-forward's kept neurons; None for all."""
        kept = self.plan.layers[layer.index].neurons
        if kept is None:
            return None
        orders = zip(layer.units(), self._neurons[layer.index], kept, strict=True)
        return tuple(
            torch.isin(order.follow(unit), chosen.cpu()).nonzero()[:, 0]
            for unit, order, chosen in orders
        )


def _versions(layer: DecoderLayer) -> Version:
    """Return numbers that change if a weight of the layer is replaced or written to."""
    # Both are needed: `id` changes if a weight is replaced by another tensor, `_version` if it is
    # changed in place. Writes through `.data` change neither, so code that makes them must call
    # `increment_version`.
    weights = layer.module.parameters()
    return tuple(number for weight in weights for number in (id(weight), weight._version))


def _trained(layer: DecoderLayer) -> bool:
    return any(weight.requires_grad for weight in layer.module.parameters())
