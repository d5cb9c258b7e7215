"""Prefixes of questions about one image, computed once, in a preallocated KV cache.

Prefixes that questions about the same images share: found, computed once, given to each.

Suffixes: I prefixes, B questions, T padded length.

Preallocated KV cache: appending a token does not copy all that came before it.

transformers' own cache concatenates new tensors for every token of an answer. For many rows that
each hold the hundreds of tokens of an image, this copying takes longer than the network.

Suffixes: I prefixes, B rows, G key-value heads, C tokens so far, T tokens of a call, d width of a
head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from bench.models.model import Model
from bench.models.structure.attention_span import non_attention_layer, sliding_window

EncodedPrompt: TypeAlias = dict[str, Any]
"""A processor's output for one prompt."""
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""Outputs of processors with one entry per token; the remaining ones describe images."""


@dataclass(frozen=True)
class ImagePrefix:
    """The first `length` tokens, images included, of the questions at `places` of a batch."""

    places: tuple[int, ...]
    length: int


def unsupported_reason(model: Model) -> str | None:
    """Return why every prompt must be computed whole, or None if prefixes can be shared."""
    if model.needs_prompt:
        return "a method needs whole prompts"
    foreign, reach = non_attention_layer(model.network), sliding_window(model.network)
    if foreign is not None:
        return f"the network has {foreign} layers"
    # A sliding cache keeps the last `window` tokens only, so a row would not hold its whole prefix.
    # A window as long as the model's context never slides.
    if reach is not None and reach < model.max_length:
        return f"the network has sliding attention over {reach} tokens"
    return None


def find_image_prefixes(
    encoded: Sequence[EncodedPrompt], hashes: Sequence[str | None], config: Any
) -> list[ImagePrefix]:
    """Return the prefixes that two or more prompts about the same images share.

    A prefix contains all images of its prompts and leaves at least one token of each prompt.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place, seen in enumerate(hashes):
        if seen is not None:
            places[seen].append(place)
    found = []
    for alike in places.values():
        rows = [encoded[place]["input_ids"][0] for place in alike]
        # A token of its own for every prompt: the first token of an answer is predicted by a
        # forward over the rest of the prompt, which must not be empty.
        length = min(len(row) - 1 for row in rows)
        for row in rows[1:]:
            differs = (row[:length] != rows[0][:length]).nonzero()
            length = int(differs[0]) if len(differs) else length
        # All image tokens must lie in the prefix: the rest of a prompt is passed as token ids
        # alone, without pixels or features.
        shown = (rows[0] == config.image_token_id).nonzero()
        if len(alike) > 1 and len(shown) and int(shown[-1]) < length:
            found.append(ImagePrefix(tuple(alike), length))
    return found


def slice_tokens(row: EncodedPrompt, first: int, last: int | None) -> EncodedPrompt:
    """Return a prompt's tokens from `first` to `last`, together with all of its images."""
    return {n: value[:, first:last] if n in PER_TOKEN else value for n, value in row.items()}


def prefill(network: Any, inputs: dict[str, Any]) -> Any:
    """Return the KV cache of prompts that are padded on the left."""
    # forward counts positions from 0 at the padding; only `generate` derives them from the mask.
    # Since padding is on the left, they must be counted from the first real token. M-RoPE networks
    # compute their own positions, of three components, from the same mask.
    if not uses_mrope(network):
        count_IT = inputs["attention_mask"].cumsum(-1) - 1
        inputs = {**inputs, "position_ids": count_IT.clamp(min=0)}
    return network(**inputs, use_cache=True, logits_to_keep=1).past_key_values


def expand_prefix_cache(network: Any, cache: Any, owner_B: Tensor) -> None:
    """Give each question its prefix, in place: the cache then has one row per question."""
    cache.layers = [preallocated(layer, owner_B) for layer in cache.layers]
    # The offset between tokens and M-RoPE positions is state of the model, one row per row of the
    # last prefill, and not part of the cache: it must follow the rows, or decoding continues at
    # another prompt's position.
    if uses_mrope(network):
        network.model.rope_deltas = network.model.rope_deltas[owner_B]


def uses_mrope(network: Any) -> bool:
    """Whether the network uses M-RoPE, whose positions it computes itself."""
    return hasattr(getattr(network, "model", None), "rope_deltas")


def scatter_texts(texts: list[str], places: Sequence[int], answers: Sequence[str]) -> None:
    """Write answers into `texts` at the given places."""
    for place, answer in zip(places, answers, strict=True):
        texts[place] = answer


GROWTH = 64
"""Tokens by which a row may grow before it is copied: a question and a short answer."""


class PreallocatedCacheLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """One layer's keys and values, one row [G, C, d] per owner of a prefix."""

    def __init__(self, keys_IGCd: Tensor, values_IGCd: Tensor, owner_B: Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys_IGCd.dtype, keys_IGCd.device
        self.is_initialized = True
        # `keys` and `values` are views of the buffers, which the inherited methods replace when
        # they reorder or crop rows: the buffers would then be stale. Greedy decoding does neither.
        self._keys = _copy_with_capacity(keys_IGCd, owner_B, GROWTH)
        self._values = _copy_with_capacity(values_IGCd, owner_B, GROWTH)
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
            self._keys = _copy_with_capacity(self.keys, None, after - before + GROWTH)
            self._values = _copy_with_capacity(self.values, None, after - before + GROWTH)
        self._keys[..., before:after, :] = key_states
        self._values[..., before:after, :] = value_states
        self._show(after)
        return self.keys, self.values

    def _show(self, length: int) -> None:
        self.keys = self._keys[..., :length, :]
        self.values = self._values[..., :length, :]


def preallocated(layer: Any, owner_B: Tensor) -> Any:
    """Return a layer with one row per owner."""
    if type(layer) is DynamicLayer and layer.is_initialized:
        return PreallocatedCacheLayer(layer.keys, layer.values, owner_B)
    # A layer of a different type, such as one that a method installed, keeps its class and selects
    # its rows in place; it is only slower.
    layer.batch_select_indices(owner_B)
    return layer


def _copy_with_capacity(states_IGCd: Tensor, owner_B: Tensor | None, room: int) -> Tensor:
    """Copy the rows selected by `owner_B` into a buffer with space for `room` extra tokens."""
    _, heads, length, width = states_IGCd.shape
    rows = len(states_IGCd) if owner_B is None else len(owner_B)
    kept = states_IGCd.new_empty(rows, heads, length + room, width)
    kept[:, :, :length] = states_IGCd if owner_B is None else states_IGCd[owner_B]
    return kept
