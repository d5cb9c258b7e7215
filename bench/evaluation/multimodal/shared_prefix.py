"""Prefixes of questions about one image, computed once, in a preallocated KV cache.

transformers' own cache concatenates new tensors for every token of an answer. For many rows with
hundreds of image tokens each, this copying takes longer than the network. The cache here has space
for an answer, so that appending a token does not copy all previous ones.

Suffixes: I prefixes, B rows (one per question), G key-value heads, C tokens so far, T tokens of a
call, d width of a head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from bench.evaluation.multimodal.prompts import EncodedPrompt
from bench.evaluation.networks import CacheLayer, KeyValueCache, LanguageModel
from bench.models.model import Model
from bench.models.network import NetworkConfig, non_attention_layer, sliding_window
from bench.models.vlm.visual_tokens import BIDIRECTIONAL

GROWTH = 64
"""Tokens by which a row may grow before it is copied: a question and a short answer."""


@dataclass(frozen=True)
class ImagePrefix:
    """The first `length` tokens, including images, of the prompts at `rows` of a batch."""

    rows: tuple[int, ...]
    length: int


def unsupported_reason(model: Model) -> str | None:
    """Return why every prompt must be computed as a whole, or None if prefixes can be shared."""
    if model.needs_prompt:
        return "a method needs whole prompts"
    if BIDIRECTIONAL.get(str(getattr(model.network.config, "model_type", ""))) == "prompt":
        return "the network's images attend to the question after them"
    layer, window = non_attention_layer(model.network), sliding_window(model.network)
    if layer is not None:
        return f"the network has {layer} layers"
    # A sliding cache keeps only the last `window` tokens, so a row would not have its whole prefix.
    # A window as long as the model's context has no effect.
    if window is not None and window < model.max_length:
        return f"the network has sliding attention over {window} tokens"
    return None


def find_image_prefixes(
    encoded: Sequence[EncodedPrompt], hashes: Sequence[str | None], config: NetworkConfig
) -> list[ImagePrefix]:
    """Return the prefixes that two or more prompts about the same images share.

    A prefix contains all images of its prompts and leaves at least one token of each prompt.
    """
    rows_by_image: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(hashes):
        if key is not None:
            rows_by_image[key].append(row)
    prefixes = []
    for rows in rows_by_image.values():
        first, *others = [encoded[row]["input_ids"][0] for row in rows]
        # Every prompt keeps at least one token, because the first token of an answer is predicted
        # by a forward over the rest of the prompt, which must not be empty.
        length = min(len(ids) - 1 for ids in (first, *others))
        for ids in others:
            differs = (ids[:length] != first[:length]).nonzero()
            length = int(differs[0]) if len(differs) else length
        # All image tokens must be in the prefix, because the rest of a prompt is passed only as
        # token ids, without pixels or features.
        image_tokens = (first == config.image_token_id).nonzero()
        if others and len(image_tokens) and int(image_tokens[-1]) < length:
            prefixes.append(ImagePrefix(tuple(rows), length))
    return prefixes


def prefill(
    network: LanguageModel, tokens: dict[str, Tensor], visual: dict[str, object]
) -> KeyValueCache:
    """Return the KV cache of prompts that are padded on the left."""
    inputs: dict[str, object] = {**tokens, **visual}
    del inputs["input_ids"]
    # A forward counts positions from 0 at the padding; only `generate` derives them from the mask.
    # Padding is on the left, so they are counted from the first real token. M-RoPE networks compute
    # their own positions, of three components, from the same mask.
    if mrope_decoder(network) is None:
        position_IT = tokens["attention_mask"].cumsum(-1) - 1
        inputs["position_ids"] = position_IT.clamp(min=0)
    # All by keyword, because methods that hook a forward look for its arguments by name.
    output = network(input_ids=tokens["input_ids"], **inputs, use_cache=True, logits_to_keep=1)
    return output.past_key_values


def expand_prefix_cache(network: LanguageModel, cache: KeyValueCache, owner_B: Tensor) -> None:
    """Give each question its prefix, in place, so that the cache has one row per question."""
    cache.layers = [preallocated(layer, owner_B) for layer in cache.layers]
    # The offset between tokens and M-RoPE positions is state of the model instead of the cache, one
    # per row of the last prefill. It must follow the rows, or decoding would continue at the
    # position of another prompt.
    decoder = mrope_decoder(network)
    if decoder is not None:
        decoder.rope_deltas = decoder.rope_deltas[owner_B]


class MRopeDecoder(Protocol):
    """A decoder with M-RoPE, which computes its own positions and stores their offset per row."""

    rope_deltas: Tensor


def mrope_decoder(network: LanguageModel) -> MRopeDecoder | None:
    """Return the part of a network that computes M-RoPE positions, None if it has none."""
    decoder = getattr(network, "model", None)
    return cast("MRopeDecoder", decoder) if hasattr(decoder, "rope_deltas") else None


class PreallocatedCacheLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """One layer's keys and values, one row [G, C, d] per owner of a prefix."""

    def __init__(self, keys_IGCd: Tensor, values_IGCd: Tensor, owner_B: Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys_IGCd.dtype, keys_IGCd.device
        self.is_initialized = True
        # `keys` and `values` are views of the buffers. Inherited methods that reorder or crop rows
        # replace the views but not the buffers; greedy decoding calls neither.
        self._keys = _copy_with_capacity(keys_IGCd, owner_B, GROWTH)
        self._values = _copy_with_capacity(values_IGCd, owner_B, GROWTH)
        self._show(keys_IGCd.shape[-2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Append a call's keys and values [B, G, T, d] in place; return all."""
        before = self.keys.shape[-2]
        after = before + key_states.shape[-2]
        # Growth by a fixed amount instead of a factor: prefixes have hundreds of tokens and answers
        # a few, so doubling could waste half of the memory.
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


def preallocated(layer: CacheLayer, owner_B: Tensor) -> CacheLayer:
    """Return a layer with one row per owner."""
    if type(layer) is DynamicLayer and layer.is_initialized:
        return cast("CacheLayer", PreallocatedCacheLayer(layer.keys, layer.values, owner_B))
    # A layer of another type, for example of a method, keeps its class and selects its rows in
    # place, which is only slower.
    layer.batch_select_indices(owner_B)
    return layer


def _copy_with_capacity(states_IGCd: Tensor, owner_B: Tensor | None, extra: int) -> Tensor:
    """Copy the rows selected by `owner_B` into a buffer with space for `extra` more tokens."""
    _, heads, length, width = states_IGCd.shape
    rows = len(states_IGCd) if owner_B is None else len(owner_B)
    buffer = states_IGCd.new_empty(rows, heads, length + extra, width)
    buffer[:, :, :length] = states_IGCd if owner_B is None else states_IGCd[owner_B]
    return buffer
