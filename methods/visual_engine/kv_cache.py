"""A KV cache with a separate visual part: fewer heads, fewer layers, written once per image.

Shapes: B samples, G key-value heads, V key-value heads kept for visual tokens, T cached text
tokens, N cached visual tokens, n of them that a generated token reads, d a head's width.

The text part grows as in transformers' DynamicLayer. A layer reports the number of all text and
visual tokens as its length, removed ones included, because positions of new tokens start from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache, DynamicLayer

from bench.errors import UserError
from methods.visual_engine.settings import DecodePruning
from methods.visual_engine.token_index import TokenRows


@dataclass(frozen=True)
class CachedPositions:
    """Positions of cached tokens of one kind in their sequences, int64 [B, R], and which are real.

    `uniform` means that all are real and at the same positions in every sample, `full` only that
    all are real. `weight_BR` is the number of tokens that each one stands for in attention; None
    means 1.
    """

    index_BR: Tensor
    valid_BR: Tensor
    uniform: bool = True
    full: bool = True
    weight_BR: Tensor | None = None

    @staticmethod
    def empty(batch: int, device: torch.device) -> CachedPositions:
        """Return an empty set of positions."""
        index_BR = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        return CachedPositions(index_BR, index_BR.bool())

    def extended_by(
        self, rows: TokenRows, offset: int, weight_BR: Tensor | None = None
    ) -> CachedPositions:
        """Append the rows of a call that starts `offset` tokens into its sequences."""
        # All rows of a call are appended to the cache at once, including readout rows, which count
        # as padding here.
        plain = rows.readout_BR is None
        return CachedPositions(
            torch.cat([self.index_BR, rows.index_BR + offset], dim=1),
            torch.cat([self.valid_BR, rows.keys_valid], dim=1),
            self.uniform and rows.valid_BR is None and plain,
            self.full and rows.full and plain,
            key_weights(self, weight_BR, *rows.index_BR.shape),
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> CachedPositions:
        """Reorder, repeat or select samples: apply `change` to all tensors."""
        weight_BR = None if self.weight_BR is None else change(self.weight_BR)
        return replace(
            self,
            index_BR=change(self.index_BR),
            valid_BR=change(self.valid_BR),
            weight_BR=weight_BR,
        )


def key_weights(
    past: CachedPositions | None, weight_BR: Tensor | None, batch: int, count: int
) -> Tensor | None:
    """Return the weights of cached tokens and of `count` new ones, [B, K]; None if all are one."""
    before = None if past is None else past.weight_BR
    known = before if weight_BR is None else weight_BR
    if known is None:
        return None
    cached = 0 if past is None else past.index_BR.shape[1]
    before = known.new_ones(batch, cached) if before is None else before
    return torch.cat([before, known.new_ones(batch, count) if weight_BR is None else weight_BR], 1)


@dataclass(frozen=True)
class CacheSelection:
    """Cached visual tokens that the newest token reads, and the attention that chose them.

    `attention_BN` is the attention to all cached visual tokens. `index_Bn` are indices of those
    that are read; None means all. `valid_Bn` marks real ones; None means that all are real.
    """

    attention_BN: Tensor
    index_Bn: Tensor | None = None
    valid_Bn: Tensor | None = None

    def take(self, x_BVNd: Tensor) -> Tensor:
        """Return a copy of the keys or values that are read, [B, V, n, d]."""
        if self.index_Bn is None:
            return x_BVNd
        if len(self.index_Bn) == 1:
            return x_BVNd.index_select(2, self.index_Bn[0])
        index = self.index_Bn[:, None, :, None].expand(-1, x_BVNd.shape[1], -1, x_BVNd.shape[3])
        return x_BVNd.gather(2, index)

    def map(self, change: Callable[[Tensor], Tensor]) -> CacheSelection:
        """Reorder, repeat or select samples: apply `change` to all tensors."""
        return replace(
            self,
            attention_BN=change(self.attention_BN),
            index_Bn=None if self.index_Bn is None else change(self.index_Bn),
            valid_Bn=None if self.valid_Bn is None else change(self.valid_Bn),
        )


def select_cached(
    pruning: DecodePruning,
    attention_BN: Tensor,
    tokens: CachedPositions,
    before: CacheSelection | None,
) -> CacheSelection:
    """Choose the cached visual tokens that a generated token reads, by its attention to all.

    `before` is the selection of the preceding token. Every sequence of a batch has its own choice.
    """
    attention_BN = attention_BN.detach()
    found = CacheSelection(attention_BN)
    length = attention_BN.shape[1]
    width = pruning.read(length)
    count_B = None
    if not tokens.full:
        real_B = tokens.valid_BR.sum(dim=1)
        # The same as `pruning.read`, without a transfer to the CPU.
        count_B = ((1 - pruning.drop) * real_B.double()).long().clamp(min=1).minimum(real_B)
    similar_B = None
    if before is not None:
        cosine_B = functional.cosine_similarity(attention_BN, before.attention_BN, dim=1)
        similar_B = cosine_B >= pruning.similarity
        # The only transfer to the CPU per generated token; the number of keys must be known.
        if not pruning.repeats and bool(similar_B.any()):
            if bool(similar_B.all()):
                return found
            real_B = tokens.valid_BR.sum(dim=1)
            chosen_B = torch.full_like(real_B, width) if count_B is None else count_B
            count_B, width = torch.where(similar_B, real_B, chosen_B), length
    index_Bn = attention_BN.masked_fill(~tokens.valid_BR, -1).topk(width, dim=1).indices
    valid_Bn = None
    if count_B is not None:
        valid_Bn = torch.arange(width, device=index_Bn.device) < count_B[:, None]
    if before is not None and before.index_Bn is not None and pruning.repeats:
        index_Bn = torch.where(cast(Tensor, similar_B)[:, None], before.index_Bn, index_Bn)
    return replace(found, index_Bn=index_Bn, valid_Bn=valid_Bn)


@dataclass
class CachedTokens:
    """Positions of cached text, and of the visual tokens left in each stage of the plan.

    `closed_B` is, for each stage, the number of tokens removed by pruning steps that renumber,
    which is subtracted from the positions of later tokens. `selection` are the visual tokens of the
    last stage that the newest generated token read; None means all.
    """

    text: CachedPositions
    visual: list[CachedPositions]
    closed_B: list[Tensor]
    selection: CacheSelection | None = None

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Reorder, repeat or select samples: apply `change` to everything."""
        self.text = self.text.map(change)
        self.visual = [stage.map(change) for stage in self.visual]
        self.closed_B = [change(closed_B) for closed_B in self.closed_B]
        self.selection = self.selection and self.selection.map(change)

    def clear(self) -> None:
        """Forget all tokens."""
        self.text = self.text.map(lambda part: part[:, :0])
        self.visual = [stage.map(lambda part: part[:, :0]) for stage in self.visual]
        self.closed_B = [torch.zeros_like(closed_B) for closed_B in self.closed_B]
        self.selection = None


class SplitCacheLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """Keys and values of one layer: text [B, G, T, d] as usual, visual [B, V, N, d] separately.

    The first layer of a cache also holds the positions of all cached tokens. `unread` is the number
    of visual rows, over all samples, that the newest token did not read.
    """

    def __init__(self, cached_tokens: CachedTokens | None) -> None:
        super().__init__()
        self.visual_keys: Tensor | None = None
        self.visual_values: Tensor | None = None
        self.cached_tokens = cached_tokens
        self.length = 0
        self.unread = 0

    def add_visual(self, keys_BVNd: Tensor, values_BVNd: Tensor) -> tuple[Tensor, Tensor]:
        """Append an image's keys and values to those of earlier images; return all of them."""
        if self.visual_keys is not None:
            keys_BVNd = torch.cat([self.visual_keys, keys_BVNd], dim=2)
            values_BVNd = torch.cat([cast(Tensor, self.visual_values), values_BVNd], dim=2)
        self.visual_keys, self.visual_values, self.unread = keys_BVNd, values_BVNd, 0
        return keys_BVNd, values_BVNd

    def read_visual(self, selection: CacheSelection | None) -> tuple[Tensor, Tensor] | None:
        """Return the visual keys and values that a call without images reads, or None."""
        self.unread = 0
        if self.visual_keys is None:
            return None
        found = self.visual_keys, cast(Tensor, self.visual_values)
        if selection is None:
            return found
        keys, values = selection.take(found[0]), selection.take(found[1])
        batch, _, count, _ = found[0].shape
        self.unread = batch * (count - keys.shape[2])
        return keys, values

    def get_seq_length(self) -> int:
        """Return the number of cached tokens, visual ones included."""
        return self.length

    def side_bytes(self) -> int:
        """Return the bytes of visual keys and values that the newest token did not read."""
        if not self.unread:
            return 0
        keys = cast(Tensor, self.visual_keys)
        return 2 * self.unread * keys.shape[1] * keys.shape[3] * keys.element_size()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, which must be text.

        Raises:
            UserError: an image is among them.
        """
        count = abs(tokens_to_remove)
        # Only the first layer, which is cropped first, knows the positions. Its first stage has
        # every visual token.
        if self.cached_tokens is not None:
            images = self.cached_tokens.visual[0]
            cut_BN = images.valid_BR & (images.index_BR >= self.length - count)
            if bool(cut_BN.any()):
                raise UserError(
                    f"cannot crop the cache by {count} tokens: the range contains an image"
                )
        super().crop(tokens_to_remove)
        self.length -= count
        if self.cached_tokens is not None and count:
            self.cached_tokens.text = self.cached_tokens.text.map(lambda part: part[:, :-count])

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self.visual_keys = self.visual_values = None
        self.length = self.unread = 0
        if self.cached_tokens is not None:
            self.cached_tokens.clear()

    def offload(self) -> None:
        """Raise, since transformers would offload the text part only."""
        raise UserError(
            "visual token strategies do not support an offloaded cache: use a DynamicCache on the "
            "device"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder samples, as in beam search."""
        self._change(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        self._change(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the selected samples."""
        self._change(lambda part: part[indices])

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("keys", "values", "visual_keys", "visual_values"):
            part = getattr(self, name)
            if part is not None:
                setattr(self, name, change(part))
        if self.cached_tokens is not None:
            self.cached_tokens.apply(change)


def is_split_cache(cache: DynamicCache | None) -> bool:
    """Whether a cache has a separate visual part."""
    return bool(cache is not None and cache.layers and isinstance(cache.layers[0], SplitCacheLayer))


def split_cache(
    cache: DynamicCache,
    depth: int,
    stages: int,
    batch: int,
    mask_BP: Tensor | None,
    device: torch.device,
) -> None:
    """Give a cache, in place, a separate visual part; its text is kept.

    `depth` is the number of layers, `stages` the number of stages of the plan. `mask_BP` marks the
    cached tokens that are real; None means all.

    Raises:
        UserError: the cache is not a growing cache of full attention.
    """
    # In place, because `generate` has its own reference to the cache and passes it to later calls.
    if not isinstance(cache, DynamicCache) or cache.offloading:
        kind = type(cache).__name__
        raise UserError(f"visual token strategies need a DynamicCache on the device, not {kind}")
    past = cache.get_seq_length()
    if any(layer.is_initialized and type(layer) is not DynamicLayer for layer in cache.layers):
        raise UserError("visual token strategies need a cache of full attention layers only")
    places_BP = torch.arange(past, device=device).expand(batch, past)
    real_BP = torch.ones_like(places_BP, dtype=torch.bool) if mask_BP is None else mask_BP.bool()
    full = mask_BP is None or bool(real_BP.all())
    text = CachedPositions(places_BP, real_BP, uniform=full, full=full)
    # transformers applies crop, reset and reordering layer by layer. Only the first layer holds the
    # shared positions, so that each operation changes them exactly once.
    none_closed_B = torch.zeros(batch, dtype=torch.int64, device=device)
    cached_tokens = CachedTokens(
        text, [CachedPositions.empty(batch, device)] * stages, [none_closed_B] * stages
    )
    before = cache.layers
    cache.layers = [
        SplitCacheLayer(cached_tokens if index == 0 else None) for index in range(depth)
    ]
    for old, new in zip(before, cache.layers, strict=False):
        if old.is_initialized:
            new.lazy_initialization(old.keys, old.values)
            new.keys, new.values, new.length = old.keys, old.values, past
