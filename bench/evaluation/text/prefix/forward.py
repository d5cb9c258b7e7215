"""One forward of packed sequences: tree mask, frozen prefix cache, logits at scored positions.

Tokens are packed depth first, so the descendants of k are at the positions after k and before its
`subtree_end`. Therefore two comparisons, k <= q < subtree_end[k], hold exactly for k itself and its
descendants: the ancestor mask of tree attention (SpecInfer, Miao et al. 2024; Medusa, Cai et al.
2024) without traversing the tree.

Suffixes: B sequences, T positions (q queries, k keys), R positions read, D d_model, V vocabulary, C
tokens of the prefix, K = C + T keys, G key-value heads, d width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from bench.evaluation.networks import CacheLayer, KeyValueCache, LanguageModel
from bench.evaluation.text.prefix.packing import PackedBatch

if TYPE_CHECKING:
    # Needed only by networks with FlexAttention, hence imported at run time where it is used.
    from torch.nn.attention.flex_attention import BlockMask


class Forward:
    """A network that computes logits of packed sequences at chosen positions."""

    def __init__(self, network: LanguageModel, device: torch.device) -> None:
        self._network = network
        self._device = device
        self._head = network.get_output_embeddings()

    def __call__(self, batch: PackedBatch, read_R: Tensor, cache: KeyValueCache | None) -> Tensor:
        """Return the logits [R, V] at `read_R`, indices into the flattened batch; extend the cache.

        Scaling or soft-capping that the network applies after its head is included.
        """
        prefix = 0 if cache is None else int(cache.get_seq_length())
        # Without branches the network's own causal mask and positions are correct, and attention
        # can use a causal kernel, which is faster than with an explicit mask. Padding is on the
        # right, where no other token attends to it.
        inputs: dict[str, object] = {"use_cache": False}
        if batch.subtree_end_BT is not None:
            subtree_end_BT = torch.from_numpy(batch.subtree_end_BT).to(self._device)
            inputs["attention_mask"] = mask_for_network(self._network, subtree_end_BT, prefix)
            inputs["position_ids"] = torch.from_numpy(batch.depths_BT).to(self._device)
        if cache is not None:
            inputs |= {"past_key_values": cache, "use_cache": True}
        ids_BT = torch.from_numpy(batch.tokens_BT).to(self._device)

        # `logits_to_keep` selects the same range or indices for all rows, but rows have different
        # positions, so the hidden states are selected before the head. The head gets 3-D input.
        def cut(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden_BTD, *others = args
            return hidden_BTD.flatten(0, 1)[read_R.to(hidden_BTD.device)][None], *others

        hook = self._head.register_forward_pre_hook(cut)
        try:
            return self._network(input_ids=ids_BT, **inputs).logits[0]
        finally:
            hook.remove()


def additive_tree_mask(subtree_end_BT: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    """Return 0 where q attends to k and the lowest finite value elsewhere, [B, 1, T, C + T].

    All tokens attend to the prefix; k is visible only to itself and its descendants.
    """
    rows, width = subtree_end_BT.shape
    position_T = torch.arange(width, device=subtree_end_BT.device)
    causal_TT = position_T[None, :] <= position_T[:, None]
    seen_BTT = causal_TT & (position_T[:, None] < subtree_end_BT[:, None, :])
    # The lowest finite value as in transformers' own masks, because -inf makes a fully masked row
    # NaN. The columns of the prefix stay 0.
    mask_B1TK = torch.zeros(
        rows, 1, width, prefix + width, dtype=dtype, device=subtree_end_BT.device
    )
    mask_B1TK[:, 0, :, prefix:].masked_fill_(~seen_BTT, torch.finfo(dtype).min)
    return mask_B1TK


def flex_block_mask(subtree_end_BT: Tensor, prefix: int) -> BlockMask:
    """Return the same mask for FlexAttention, whose kernel skips fully masked blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, width = subtree_end_BT.shape

    def sees(row: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # For keys of the prefix, k - C is negative and would be an index from the end of the row,
        # or out of bounds if C > T. Both sides of `|` are evaluated for every pair, so the index is
        # clamped although its result is not used.
        own = (k - prefix).clamp(min=0)
        return (k < prefix) | ((own <= q) & (q < subtree_end_BT[row, own]))

    return create_block_mask(
        sees, rows, None, width, prefix + width, device=str(subtree_end_BT.device)
    )


def mask_for_network(
    network: LanguageModel, subtree_end_BT: Tensor, prefix: int
) -> Tensor | BlockMask:
    """Return the mask in the form that the network's attention requires."""
    if network.config._attn_implementation == "flex_attention":
        return flex_block_mask(subtree_end_BT, prefix)
    return additive_tree_mask(subtree_end_BT, prefix, network.dtype)


class FrozenPrefixLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """One layer's keys and values [1, G, C, d], which precede those of each call and stay fixed."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Return the prefix's and the call's keys and values, [B, G, C + T, d]."""
        # The call's are not stored, because any number of batches use the same prefix, and a
        # sequence is complete after one forward.
        return _prepend_prefix(self.keys, key_states), _prepend_prefix(self.values, value_states)


def extend_prefix(parent: KeyValueCache | None) -> KeyValueCache:
    """Return a cache that appends new tokens to the contents of `parent`, which does not change."""
    cache: KeyValueCache = DynamicCache()
    if parent is not None:
        for layer in parent.layers:
            own: CacheLayer = DynamicLayer()
            # DynamicLayer appends by `cat`, which creates new tensors, so the parent's do not
            # change.
            own.update(layer.keys, layer.values)
            cache.layers.append(own)
    return cache


def freeze_prefix(cache: KeyValueCache) -> KeyValueCache:
    """Return a cache that any number of sequences can read and none changes."""
    layers = [FrozenPrefixLayer(layer.keys, layer.values) for layer in cache.layers]
    return cast("KeyValueCache", Cache(layers=layers))


def _prepend_prefix(prefix_1GCd: Tensor, own_BGTd: Tensor) -> Tensor:
    # expand copies nothing. cat copies the prefix once per layer and batch, because attention
    # kernels need all keys in one tensor.
    prefix_BGCd = prefix_1GCd.expand(own_BGTd.shape[0], -1, -1, -1)
    return torch.cat([prefix_BGCd, own_BGTd], dim=-2)
