"""Patches that leave a vision tower between its layers (CLIP in LLaVA).

Shapes: I images of a call, P patches of one, M of them that are left, S rows of an image (the class
token and the M patches), D tower width, H heads, d a head's width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TowerRows:
    """What one layer of the tower computed for the rows that reached it, before any leave.

    `until` is the number of layers that follow before the last one after which patches may leave,
    `patches` the number P that the image came with. `query_IHd` is the class token's query, scaled;
    `keys_ISHd` and `values_ISHd` are those of all rows. `valid_IM` marks real patches: images of a
    call may have different numbers of them left.
    """

    until: int
    patches: int
    query_IHd: Tensor
    keys_ISHd: Tensor
    values_ISHd: Tensor
    valid_IM: Tensor


# From a layer's rows, and the scores of these patches after the layer before [I, M] if there is
# one, to their scores now [I, M] and the number of patches of each image that stay [I].
RankPatches = Callable[[TowerRows, Tensor | None], tuple[Tensor, Tensor]]


class TowerPruning:
    """Removes the patches of lowest score after each of a tower's first layers.

    `last` is the last layer after which patches leave; every image has as many left then. Those
    that stay keep their order. Behind the projector each is at its place again, and the others are
    zero: what follows must remove them.
    """

    def __init__(
        self, layers: Sequence[nn.Module], projector: nn.Module, last: int, rank: RankPatches
    ) -> None:
        self.enabled = True
        self.rows: list[int] = []
        self.patches = 0
        self.last, self._rank = last, rank
        self._projected: dict[str, Tensor] = {}
        self._places_IM: Tensor | None = None
        self._valid_IM: Tensor | None = None
        self._score_IM: Tensor | None = None
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._enter, number), with_kwargs=False)
            if number > last:
                continue
            attention = cast(Any, layer).self_attn
            # The layer's own products are read: nothing is computed a second time.
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(attention, name).register_forward_hook(partial(self._keep, name))
            layer.register_forward_hook(partial(self._leave, number))
        projector.register_forward_hook(self._spread)

    def places(self) -> Tensor | None:
        """Return the places in their images of the patches on their way through, [I, M]."""
        return self._places_IM

    def _enter(self, number: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        states_ISD: Tensor = args[0]
        if not self.enabled:
            self._places_IM = None
            return None
        if number == 0:
            images, self.patches = states_ISD.shape[0], states_ISD.shape[1] - 1
            places_P = torch.arange(self.patches, device=states_ISD.device)
            self._places_IM = places_P.expand(images, -1)
            self._valid_IM = torch.ones_like(self._places_IM, dtype=torch.bool)
            self._score_IM, self.rows = None, []
        self.rows.append(states_ISD.shape[1])
        valid_IM = cast(Tensor, self._valid_IM)
        if bool(valid_IM.all()):
            return None
        # Additive, which every implementation but flash attention takes.
        hidden_IS = torch.cat([torch.zeros_like(valid_IM[:, :1]), ~valid_IM], dim=1)
        mask_IS = torch.zeros_like(hidden_IS, dtype=states_ISD.dtype)
        mask_IS = mask_IS.masked_fill(hidden_IS, torch.finfo(states_ISD.dtype).min)
        return states_ISD, mask_IS[:, None, None, :], *args[2:]

    def _keep(self, name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.enabled:
            self._projected[name] = output

    def _leave(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], states_ISD: Tensor
    ) -> Tensor | None:
        if not self.enabled:
            return None
        attention = cast(Any, layer).self_attn
        q_ISHd, k_ISHd, v_ISHd = (
            self._projected.pop(name).unflatten(-1, (attention.num_heads, -1)).float()
            for name in ("q_proj", "k_proj", "v_proj")
        )
        places_IM, valid_IM = cast(Tensor, self._places_IM), cast(Tensor, self._valid_IM)
        query_IHd = q_ISHd[:, 0] * attention.scale
        rows = TowerRows(
            self.last - number, self.patches, query_IHd, k_ISHd, v_ISHd, valid_IM
        )
        self._score_IM, left_I = self._rank(rows, self._score_IM)
        count = int(left_I.max())
        if bool((left_I >= valid_IM.sum(dim=1)).all()):
            return None
        # Ties go to the earlier patch, padding last; then back into raster order.
        score_IM = self._score_IM.masked_fill(~valid_IM, -torch.inf)
        best_IM = score_IM.argsort(dim=1, descending=True, stable=True)[:, :count]
        stay_IM = torch.arange(count, device=best_IM.device) < left_I[:, None]
        order_IM = best_IM.masked_fill(~stay_IM, self.patches).argsort(dim=1)
        best_IM = best_IM.gather(1, order_IM)
        self._valid_IM = stay_IM.gather(1, order_IM)
        self._places_IM = places_IM.gather(1, best_IM)
        self._score_IM = self._score_IM.gather(1, best_IM)
        row_IM1 = best_IM[..., None].expand(-1, -1, states_ISD.shape[-1])
        return torch.cat([states_ISD[:, :1], states_ISD[:, 1:].gather(1, row_IM1)], dim=1)

    def _spread(self, _: nn.Module, args: tuple[Any, ...], output_IMD: Tensor) -> Tensor | None:
        places_IM, self._places_IM = self._places_IM, None
        # A projector that is called again, for features of its own, is not part of a pass.
        if not self.enabled or places_IM is None:
            return None
        return spread(output_IMD, places_IM, self.patches)


def spread(values: Tensor, places_IM: Tensor, patches: int) -> Tensor:
    """Put values [I, M, ...] at their places among `patches`, zeros elsewhere: [I, P, ...]."""
    empty = values.new_zeros(values.shape[0], patches, *values.shape[2:])
    images_I1 = torch.arange(len(values), device=values.device)[:, None]
    empty[images_I1, places_IM] = values
    return empty
