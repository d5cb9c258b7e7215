"""Masked mode: everything is computed, and attention weights are zeroed after the softmax.

Reproduces the paper's released LLaVA code, for its released checkpoints and for comparison; no work
is saved. Zeroing a weight after the softmax equals zeroing the value, which PyTorch's fused kernel
supports. Two faults of the release are not reproduced: a text-only prompt is left unchanged here,
and samples of a batch are handled separately during generation.

Shapes: B samples, Q new tokens, K all tokens so far, H query heads, G key-value heads, d a head's
width, F a feed-forward's width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.models.vlm.decoder_view import Decoder, DecoderLayer
from bench.models.vlm.visual_tokens import VisualTokens
from methods.visual_engine.masks import window_mask
from methods.visual_engine.plan import VisualPlan
from methods.visual_engine.settings import LayerPlan
from methods.visual_engine.token_index import Cells

MASKED_ATTENTION = "slimbench_visual_official"

# Attribute of a cache that marks its visual tokens, and of an attention module that names its
# owner. Attributes, so that they are copied with a cache or a network.
SEEN_ATTRIBUTE, OWNER_ATTRIBUTE = "slimbench_visual_seen", "slimbench_visual_owner"


class MaskedMode:
    """Carries out a plan in masked mode on the network's own layers."""

    def __init__(self, network: nn.Module, decoder: Decoder, plan: VisualPlan) -> None:
        self.network, self.decoder, self.plan = network, decoder, plan
        self._tokens: VisualTokens | None = None
        self._seen_BK: Tensor | None = None
        self._installed = False

    def run(
        self, stock: Callable[..., Any], tokens: VisualTokens | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the decoder's own forward on one call under the plan."""
        cache = kwargs.get("past_key_values")
        past_BP = getattr(cache, SEEN_ATTRIBUTE, None)
        if tokens is None and past_BP is None:
            return stock(*args, **kwargs)
        self._install()
        new_BQ = _visual_marks(tokens, kwargs["inputs_embeds"])
        past_BP = _past_visual_marks(past_BP, cache, new_BQ)
        self._tokens, self._seen_BK = tokens, torch.cat([past_BP, new_BQ], dim=1)
        try:
            output = stock(*args, **kwargs)
        finally:
            seen_BK, self._tokens, self._seen_BK = self._seen_BK, None, None
        if output.past_key_values is not None:
            setattr(output.past_key_values, SEEN_ATTRIBUTE, seen_BK)
        return output

    def _install(self) -> None:
        """Install masked attention and feed-forward hooks in the network, once."""
        if self._installed:
            return
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(MASKED_ATTENTION, _masked_attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(MASKED_ATTENTION, sdpa_mask)
        cast(Any, self.network).set_attn_implementation({"text_config": MASKED_ATTENTION})
        for layer in self.decoder.layers:
            setattr(layer.attention, OWNER_ATTRIBUTE, self)
            down = cast(nn.Linear, layer.feed_forward.down_proj)
            down.register_forward_pre_hook(_NeuronMaskHook(self, layer))
        self._installed = True

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Return attention of one layer, [B, H, Q, d], masked by the plan."""
        heads = q.shape[1]
        k, v = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (k, v))
        if self._seen_BK is None:
            causal = mask is None and q.shape[2] > 1
            return functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=scaling
            )
        index, seen_BK = module.layer_idx, self._seen_BK
        lost_H = self._dropped_heads(self.plan.layers[index], heads, q.device)
        # Past the cut every head loses its visual values. The outputs of visual rows need no
        # zeroing there, since no text row reads them any more.
        gone_H = torch.ones_like(lost_H) if index >= self.plan.cut else lost_H
        v = v.masked_fill((gone_H[:, None] & seen_BK[:, None, :])[..., None], 0)
        allowed = self._attention_mask(mask, q.shape[2])
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scaling)
        new_BQ = seen_BK[:, -q.shape[2] :]
        return out.masked_fill((lost_H[:, None] & new_BQ[:, None, :])[..., None], 0)

    def _dropped_heads(self, plan: LayerPlan, heads: int, device: torch.device) -> Tensor:
        """Mark the heads that a layer drops, bool [H]."""
        lost_H = torch.zeros(heads, dtype=torch.bool, device=device)
        if plan.heads is not None:
            lost_H[[head for head in range(heads) if head not in set(plan.heads)]] = True
        return lost_H

    def _attention_mask(self, mask: Tensor | None, new: int) -> Tensor:
        """Return the attention mask, [B or 1, 1, Q, K]: causal, plus windows of visual tokens."""
        seen_BK = cast(Tensor, self._seen_BK)
        length = seen_BK.shape[1]
        if mask is None:
            places = torch.arange(length, device=seen_BK.device)
            mask = (places[length - new :, None] >= places[None, :])[None, None]
        window, tokens = self.plan.window, self._tokens
        if window is None or tokens is None:
            return mask
        cells = Cells(tokens.frame_BS, tokens.row_BS, tokens.column_BS)
        near_BQQ = window_mask(cells, cells, window)
        visual_BQ = tokens.mask
        # Columns of earlier calls are False for pairs of visual tokens: frames are numbered per
        # call, so the same number would be a different image, and a window never extends beyond its
        # own frame. With a window, visual rows therefore attend to no image of an earlier call.
        past = torch.zeros_like(near_BQQ[..., :1]).expand(-1, -1, length - new)
        pairs = visual_BQ[:, :, None] & seen_BK[:, None, :]
        return torch.where(pairs, torch.cat([past, near_BQQ], dim=-1), mask[:, 0])[:, None]

    def zero_dropped_neurons(self, layer: DecoderLayer, hidden_BQF: Tensor) -> Tensor:
        """Zero the activations of dropped neurons on visual rows of a feed-forward."""
        kept = self.plan.layers[layer.index].neurons
        if kept is None or self._tokens is None:
            return hidden_BQF
        lost_F = torch.ones(hidden_BQF.shape[-1], dtype=torch.bool, device=hidden_BQF.device)
        lost_F[kept[0].to(lost_F.device)] = False
        return hidden_BQF.masked_fill(self._tokens.mask[..., None] & lost_F, 0)


class _NeuronMaskHook:
    """Hook on a down projection; an object, so that a copied network gets its own."""

    def __init__(self, owner: MaskedMode, layer: DecoderLayer) -> None:
        self.owner, self.layer = owner, layer

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # A deep copy of the network copies this object with its owner; a closure would keep
        # pointing to the original network's plan.
        return (self.owner.zero_dropped_neurons(self.layer, args[0]),)


def _masked_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Forward a layer's attention to the owner of the layer."""
    owner: MaskedMode = getattr(module, OWNER_ATTRIBUTE)
    return owner.attend(module, q, k, v, mask, scaling).transpose(1, 2).contiguous(), None


def _visual_marks(tokens: VisualTokens | None, x_BQD: Tensor) -> Tensor:
    if tokens is not None:
        return tokens.mask
    return torch.zeros(x_BQD.shape[:2], dtype=torch.bool, device=x_BQD.device)


def _past_visual_marks(past_BP: Tensor | None, cache: Any, new_BQ: Tensor) -> Tensor:
    """Mark the cached tokens that are visual, [B, P]."""
    length = 0 if cache is None else cache.get_seq_length()
    known = new_BQ[:, :0] if past_BP is None else past_BP
    # Calls before the first image leave no marks; their tokens are text, hence False. After a crop
    # the padding is negative and cuts the marks.
    return functional.pad(known, (0, length - known.shape[1]))
