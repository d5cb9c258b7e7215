"""Weight slices for visual rows, cut once per layer and again when the plan or network changes.

Kept heads and neurons can be moved to the front of their weights, which does not change the
function of the network, so that slices are views. The cache therefore tracks the number that each
head and neuron had in the loaded network, even after other methods have removed some.

Shapes: D d_model, H query heads, G key-value heads, d a head's width, F neurons of the loaded
feed-forward, N neurons that are left, P values of a fingerprint.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from bench.errors import UserError
from bench.models.structure.expert_view import ExpertView
from bench.models.vlm.decoder_view import AttentionView, Decoder, DecoderLayer, Projection
from methods.visual_engine.plan import VisualPlan
from methods.visual_engine.weight_slices import VisualWeights, head_channels, slice_weights

Version = tuple[int, ...]


class WeightCache:
    """Cached weight slices per layer, and the current position of each original head and neuron."""

    def __init__(self, decoder: Decoder, plan: VisualPlan) -> None:
        self.decoder = decoder
        self.plan = plan
        self._heads = [list(range(layer.attention_view().heads)) for layer in decoder.layers]
        self._neurons = [[NeuronOrder(unit) for unit in layer.units()] for layer in decoder.layers]
        self._kept: dict[int, tuple[Version, VisualWeights]] = {}

    def layer(self, index: int) -> VisualWeights:
        """Return one layer's weights for visual rows.

        They are cut again if the plan or a weight has changed, and at every call while weights are
        being trained, so that gradients reach the network.
        """
        layer = self.decoder.layers[index]
        version = (self.plan.revision, *_weight_versions(layer))
        known = self._kept.get(index)
        if known is not None and known[0] == version:
            return known[1]
        weights = slice_weights(
            layer,
            self.plan.layers[index],
            self._heads[index],
            self.places(layer),
            self.plan.dropped_heads,
            self.plan.repairs.get(index),
        )
        # Slices of trained weights belong to an autograd graph, which the backward pass frees, so a
        # cached slice would fail in the next one.
        if not torch.is_grad_enabled() or not _is_trained(layer):
            self._kept[index] = (version, weights)
        return weights

    def head_order(self) -> list[list[int]]:
        """Return the original number of the head at each position, for every layer."""
        return [list(order) for order in self._heads]

    def by_loaded_number(self, layer: int, unit: int, value_F: Tensor) -> Tensor:
        """Order values of a feed-forward's neurons by their numbers in the loaded network."""
        order = self._neurons[layer][unit]
        # Another method may have removed neurons since the order was last needed.
        numbers_N = order.update(self.decoder.layers[layer].units()[unit])
        return torch.zeros(order.width).scatter(0, numbers_N, value_F)

    def reorder(self) -> None:
        """Move kept heads and neurons of every layer to the front of its weights."""
        for layer, plan in zip(self.decoder.layers, self.plan.layers, strict=True):
            if plan.heads is not None:
                self._front_heads(layer, set(plan.heads))
            if plan.neurons is not None:
                self._front_neurons(layer, plan.neurons)

    def _front_heads(self, layer: DecoderLayer, kept: set[int]) -> None:
        view, order = layer.attention_view(), self._heads[layer.index]
        places = kept_heads_first(kept, order, view.heads // view.groups)
        if places != list(range(view.heads)):
            permute_heads(view, places)
            self._heads[layer.index] = [order[place] for place in places]

    def _front_neurons(self, layer: DecoderLayer, kept: Sequence[Tensor]) -> None:
        orders = self._neurons[layer.index]
        for unit, order, chosen in zip(layer.units(), orders, kept, strict=True):
            now_F = order.update(unit)
            # A stable sort of 0 (kept) and 1 (dropped), so that a second call with the same plan
            # moves nothing.
            moved_F = (~torch.isin(now_F, chosen.cpu())).to(torch.uint8).argsort(stable=True)
            if bool((moved_F[1:] < moved_F[:-1]).any()):
                permute_neurons(unit, moved_F)
                order.record_permutation(moved_F)

    def places(self, layer: DecoderLayer) -> tuple[Tensor, ...] | None:
        """Return the current positions of each feed-forward's kept neurons; None for all."""
        kept = self.plan.layers[layer.index].neurons
        if kept is None:
            return None
        orders = zip(layer.units(), self._neurons[layer.index], kept, strict=True)
        return tuple(
            torch.isin(order.update(unit), chosen.cpu()).nonzero()[:, 0]
            for unit, order, chosen in orders
        )


def _weight_versions(layer: DecoderLayer) -> Version:
    """Return numbers that change if a weight of the layer is replaced or modified in place."""
    # `id` changes if a weight is replaced by another tensor, `_version` if it is modified in place.
    # Writes through `.data` change neither, so such code must call `increment_version`.
    weights = layer.module.parameters()
    return tuple(number for weight in weights for number in (id(weight), weight._version))


def _is_trained(layer: DecoderLayer) -> bool:
    return any(weight.requires_grad for weight in layer.module.parameters())


def kept_heads_first(kept: Collection[int], order: Sequence[int], per_group: int) -> list[int]:
    """Return positions of heads with kept ones first, as far as key-value groups allow.

    `order` is the head at each position, `kept` the heads to keep. Groups stay together: groups
    with a kept head come first, and within each group its kept heads come first.
    """
    # Groups must stay together because query head i reads key-value head i // per_group. K and V
    # are therefore sliced by group, and kept query heads are contiguous only within a group.
    groups = [range(first, first + per_group) for first in range(0, len(order), per_group)]
    inside = [sorted(group, key=lambda place: order[place] not in kept) for group in groups]
    inside.sort(key=lambda group: order[group[0]] not in kept)
    return [place for group in inside for place in group]


@torch.no_grad()
def permute_heads(view: AttentionView, places: Sequence[int]) -> None:
    """Permute a layer's heads in place; `places` [H] are the old positions in new order."""
    per_group = view.heads // view.groups
    # Query heads of a group stay adjacent, so the first one determines the group's new position.
    groups = [places[first] // per_group for first in range(0, view.heads, per_group)]
    for projection, record_permutation in ((view.q, places), (view.k, groups), (view.v, groups)):
        _permute_rows(projection, head_channels(record_permutation, view.head_dim))
    o_DE = view.o.weight
    o_DE.copy_(o_DE[:, head_channels(places, view.head_dim).to(o_DE.device)])


@torch.no_grad()
def permute_neurons(unit: ExpertView, places_F: Tensor) -> None:
    """Permute the neurons of a gated feed-forward in place."""
    places_F = places_F.to(unit.gate.device)
    unit.gate.copy_(unit.gate[places_F])
    unit.up.copy_(unit.up[places_F])
    unit.down.copy_(unit.down[:, places_F])


def _permute_rows(projection: Projection, rows: Tensor) -> None:
    for part in (projection.weight, projection.bias):
        if part is not None:
            part.copy_(part[rows.to(part.device)])


# Number of leading values of a gate row that identify a neuron. It suffices for trained weights
# even in half precision, and takes little memory for all experts of a network.
FINGERPRINT_LENGTH = 8


class NeuronOrder:
    """The order of one feed-forward's neurons, by their numbers in the loaded network.

    After another method has removed or permuted neurons, they are identified by their gate rows,
    whose values such methods do not change.
    """

    def __init__(self, unit: ExpertView) -> None:
        self.width = unit.width
        self._rows_FP = _fingerprints(unit).clone()
        self._order_N = torch.arange(self.width)

    def record_permutation(self, places_N: Tensor) -> None:
        """Record a permutation; `places_N` are the old positions in their new order."""
        self._order_N = self._order_N[places_N]

    def update(self, unit: ExpertView) -> Tensor:
        """Return the original numbers of the neurons that a feed-forward currently has, [N].

        Raises:
            UserError: a neuron is not one of the loaded ones.
        """
        same_width = unit.width == len(self._order_N)
        # Training changes values but moves nothing, and comparing them would wait for the device in
        # every call.
        if same_width and unit.gate.requires_grad:
            return self._order_N
        rows_NP = _fingerprints(unit)
        if same_width and torch.equal(rows_NP, self._rows_FP[self._order_N]):
            return self._order_N
        matched = self._match_by_gate_rows(rows_NP)
        if matched is not None:
            self._order_N = matched
        elif not same_width:
            raise UserError(
                "a method changed the neurons of a feed-forward, a part of which visual tokens "
                "use, in a way that cannot be tracked: list that method before the visual token "
                "strategies"
            )
        # Otherwise values were changed in place (zeroed, quantized) and no neuron was moved.
        return self._order_N

    def _match_by_gate_rows(self, rows_NP: Tensor) -> Tensor | None:
        """Find each neuron's number by the first values of its gate row; None if one is unknown."""
        # Exact values are the keys, because moving a neuron copies its row. Neurons with equal rows
        # (such as zeros) get their numbers in order, each number once.
        numbers: dict[tuple[float, ...], deque[int]] = defaultdict(deque)
        for number, row in enumerate(self._rows_FP.tolist()):
            numbers[tuple(row)].append(number)
        found = [numbers[tuple(row)] for row in rows_NP.tolist()]
        try:
            return torch.tensor([left.popleft() for left in found], dtype=torch.int64)
        except IndexError:
            return None


def _fingerprints(unit: ExpertView) -> Tensor:
    """Return the first values of the gate rows of a feed-forward's neurons, [N, P], on the CPU."""
    return unit.gate.detach()[:, :FINGERPRINT_LENGTH].cpu()
