"""Preallocated KV cache: appending a token does not copy all that came before it.

transformers' own cache concatenates new tensors for every token of an answer. For many rows that
each hold the hundreds of tokens of an image, this copying takes longer than the network.

Suffixes: I prefixes, B rows, G key-value heads, C tokens so far, T tokens of a call, d width of a
head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens by which a row may grow before it is copied: a question and a short answer."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """One layer's keys and values, one row [G, C, d] per owner of a prefix."""

    def __init__(self, keys_IGCd: Tensor, values_IGCd: Tensor, owner_B: Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys_IGCd.dtype, keys_IGCd.device
        self.is_initialized = True
        # `keys` and `values` are views of the buffers, which the inherited methods replace when
        # they reorder or crop rows: the buffers would then be stale. Greedy decoding does neither.
        self._keys = _with_room(keys_IGCd, owner_B, ROOM)
        self._values = _with_room(values_IGCd, owner_B, ROOM)
        self._show(keys_IGCd.shape[-2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a call's keys and values [B, G, T, d] in place; return all."""
        before = self.keys.shape[-2]
        after = before + key_states.shape[-2]
        # Growth by a fixed amount rather than a factor: prefixes have hundreds of tokens and
        # answers a few, so doubling could waste half of the memory on room that is never used.
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
    """Return a layer with one row per owner."""
    if type(layer) is DynamicLayer and layer.is_initialized:
        return RoomyLayer(layer.keys, layer.values, owner_B)
    # A layer of a different type, such as one that a method installed, keeps its class and selects
    # its rows in place; it is only slower.
    layer.batch_select_indices(owner_B)
    return layer


def _with_room(states_IGCd: Tensor, owner_B: Tensor | None, room: int) -> Tensor:
    """Copy the rows selected by `owner_B` into a buffer with space for `room` extra tokens."""
    _, heads, length, width = states_IGCd.shape
    rows = len(states_IGCd) if owner_B is None else len(owner_B)
    kept = states_IGCd.new_empty(rows, heads, length + room, width)
    kept[:, :, :length] = states_IGCd if owner_B is None else states_IGCd[owner_B]
    return kept
