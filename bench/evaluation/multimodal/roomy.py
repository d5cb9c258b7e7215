"""Keys and values with room behind them, so that a token does not move all that came before it.

transformers' own cache makes new tensors for each token of an answer. With many rows that each
have an image's hundreds of tokens, this copying takes longer than the network.

Suffixes: I beginnings, B rows, G key-value heads, C tokens so far, T tokens of a call, d width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens that a row may grow by before it is moved: a question and a short answer."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """One layer's keys and values, a row [G, C, d] for each owner of a beginning.

    They are only ever added to: greedy answers neither reorder rows nor take tokens back.
    """

    def __init__(self, keys_IGCd: Tensor, values_IGCd: Tensor, owner_B: Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys_IGCd.dtype, keys_IGCd.device
        self.is_initialized = True
        self._keys = _with_room(keys_IGCd, owner_B, ROOM)
        self._values = _with_room(values_IGCd, owner_B, ROOM)
        self._show(keys_IGCd.shape[-2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a call's keys and values [B, G, T, d] behind the others; return all."""
        before = self.keys.shape[-2]
        after = before + key_states.shape[-2]
        if after > self._keys.shape[-2]:
            self._keys = _with_room(self.keys, None, after - before + ROOM)
            self._values = _with_room(self.values, None, after - before + ROOM)
        self._keys[..., before:after, :] = key_states
        self._values[..., before:after, :] = value_states
        self._show(after)
        return self.keys, self.values

    def _show(self, length: int) -> None:
        self.keys = self._keys[..., :length, :]
        self.values = self._values[..., :length, :]


def roomy(layer: Any, owner_B: Tensor) -> Any:
    """Return a layer with a row for each owner; one of another kind is given its rows in place."""
    if type(layer) is DynamicLayer and layer.is_initialized:
        return RoomyLayer(layer.keys, layer.values, owner_B)
    layer.batch_select_indices(owner_B)
    return layer


def _with_room(states_IGCd: Tensor, owner_B: Tensor | None, room: int) -> Tensor:
    """Copy rows, chosen by their owners, to where so many tokens more have room."""
    _, heads, length, width = states_IGCd.shape
    rows = len(states_IGCd) if owner_B is None else len(owner_B)
    kept = states_IGCd.new_empty(rows, heads, length + room, width)
    kept[:, :, :length] = states_IGCd if owner_B is None else states_IGCd[owner_B]
    return kept
