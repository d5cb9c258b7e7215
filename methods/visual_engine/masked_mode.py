"""Masked mode: compute everything, and zero attention weights after the softmax.

This reproduces the paper's released LLaVA code, for its released checkpoints and for comparison; it
saves no work. Zeroing a weight after the softmax equals zeroing the value, which works with
PyTorch's fused kernel. Two faults of the release are not reproduced: text-only prompts are left
unchanged, and the samples of a batch are handled separately during generation.

Shapes: B samples, Q new tokens, K all tokens so far, H query heads, G key-value heads, d a head's
width, F a feed-forward's width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from bench.models.vlm.decoder_view import Decoder, DecoderLayer
from bench.models.vlm.visual_tokens import VisualTokens
from methods.visual_engine.masks import window_mask
from methods.visual_engine.plan import VisualPlan
from methods.visual_engine.settings import LayerPlan
from methods.visual_engine.token_index import Cells, last_positions

MASKED_ATTENTION = "slimbench_visual_masked_mode"

# Attribute of a cache with the marks of its visual tokens, and of an attention module with its
# `MaskedMode`. As attributes they are copied with the cache or the network.
MARKS_ATTRIBUTE, OWNER_ATTRIBUTE = "slimbench_visual_marks", "slimbench_visual_owner"


class AttentionModule(Protocol):
    """The module that transformers passes to an attention function."""

    layer_idx: int


@dataclass(frozen=True)
class MaskedCall:
    """The current call: its visual tokens, and marks of all visual tokens so far, bool [B, K].

    `reduced_BQ` marks the new rows whose work the plan reduces: visual rows, except one that ends
    its prompt, because the next token is predicted from it. As a key that row is still visual.
    """

    tokens: VisualTokens | None
    visual_BK: Tensor
    reduced_BQ: Tensor


class MaskedMode:
    """Carries out a plan in masked mode on the network's own layers."""

    def __init__(self, network: nn.Module, decoder: Decoder, plan: VisualPlan) -> None:
        self.network, self.decoder, self.plan = network, decoder, plan
        self._call: MaskedCall | None = None
        self._installed = False

    def run(
        self,
        forward: Callable[..., BaseModelOutputWithPast],
        tokens: VisualTokens | None,
        *args: object,
        inputs_embeds: Tensor,
        past_key_values: DynamicCache | None = None,
        attention_mask: Tensor | None = None,
        **rest: object,
    ) -> BaseModelOutputWithPast:
        """Run the decoder's own forward on one call under the plan."""
        inputs = {
            "inputs_embeds": inputs_embeds,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            **rest,
        }
        past_BP = getattr(past_key_values, MARKS_ATTRIBUTE, None)
        if tokens is None and past_BP is None:
            return forward(*args, **inputs)
        self._install()
        new_BQ = _visual_marks(tokens, inputs_embeds)
        past_BP = _past_visual_marks(past_BP, past_key_values, new_BQ)
        visual_BK = torch.cat([past_BP, new_BQ], dim=1)
        real_BQ = _real_positions(attention_mask, new_BQ)
        self._call = MaskedCall(tokens, visual_BK, new_BQ & ~last_positions(real_BQ))
        try:
            output = forward(*args, **inputs)
        finally:
            self._call = None
        if output.past_key_values is not None:
            setattr(output.past_key_values, MARKS_ATTRIBUTE, visual_BK)
        return output

    def _install(self) -> None:
        """Install masked attention and feed-forward hooks in the network, once."""
        if self._installed:
            return
        use_attention(self.network, MASKED_ATTENTION, _masked_attention)
        for layer in self.decoder.layers:
            setattr(layer.attention, OWNER_ATTRIBUTE, self)
            down = cast(nn.Linear, layer.feed_forward.down_proj)
            down.register_forward_pre_hook(_NeuronMaskHook(self, layer))
        self._installed = True

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Return attention of one layer, [B, H, Q, d], masked by the plan."""
        heads = q.shape[1]
        k, v = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (k, v))
        if self._call is None:
            causal = mask is None and q.shape[2] > 1
            return functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=scaling
            )
        visual_BK = self._call.visual_BK
        dropped_H = _dropped_heads(self.plan.layers[layer], heads, q.device)
        # From the cut on, all heads lose their visual values. The outputs of visual rows need no
        # zeroing, since no text row reads them.
        hidden_H = torch.ones_like(dropped_H) if layer >= self.plan.cut else dropped_H
        v = v.masked_fill((hidden_H[:, None] & visual_BK[:, None, :])[..., None], 0)
        allowed = self._attention_mask(self._call, mask, q.shape[2])
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scaling)
        reduced_BQ = self._call.reduced_BQ
        return out.masked_fill((dropped_H[:, None] & reduced_BQ[:, None, :])[..., None], 0)

    def _attention_mask(self, call: MaskedCall, mask: Tensor | None, new: int) -> Tensor:
        """Return the attention mask, [B or 1, 1, Q, K]: causal, plus windows of visual tokens."""
        visual_BK = call.visual_BK
        length = visual_BK.shape[1]
        if mask is None:
            places = torch.arange(length, device=visual_BK.device)
            mask = (places[length - new :, None] >= places[None, :])[None, None]
        window, tokens = self.plan.window, call.tokens
        if window is None or tokens is None:
            return mask
        cells = Cells(tokens.frame_BS, tokens.row_BS, tokens.column_BS)
        window_BQQ = window_mask(cells, cells, window)
        # Columns of earlier calls are False for pairs of visual tokens, because a window never
        # extends beyond its frame: with a window, visual rows attend to no image of earlier calls.
        past = torch.zeros_like(window_BQQ[..., :1]).expand(-1, -1, length - new)
        pairs = call.reduced_BQ[:, :, None] & visual_BK[:, None, :]
        return torch.where(pairs, torch.cat([past, window_BQQ], dim=-1), mask[:, 0])[:, None]

    def zero_dropped_neurons(self, layer: DecoderLayer, hidden_BQF: Tensor) -> Tensor:
        """Zero the activations of dropped neurons on visual rows of a feed-forward."""
        kept, call = self.plan.layers[layer.index].neurons, self._call
        if kept is None or call is None or call.tokens is None:
            return hidden_BQF
        dropped_F = torch.ones(hidden_BQF.shape[-1], dtype=torch.bool, device=hidden_BQF.device)
        dropped_F[kept[0].to(dropped_F.device)] = False
        return hidden_BQF.masked_fill(call.reduced_BQ[..., None] & dropped_F, 0)


class _NeuronMaskHook:
    """Hook on a down projection that zeroes dropped neurons."""

    def __init__(self, owner: MaskedMode, layer: DecoderLayer) -> None:
        self.owner, self.layer = owner, layer

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # An object instead of a closure, because a deep copy of the network copies it with its
        # owner; a closure would still use the plan of the original network.
        return (self.owner.zero_dropped_neurons(self.layer, args[0]),)


def use_attention(network: nn.Module, name: str, attention: Callable[..., object]) -> str:
    """Let a network's text decoder attend with this function; return the name of the former one.

    Registered attention functions get queries and keys after rotation, in every architecture of
    transformers; hooks do not.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    former: str = cast(PreTrainedModel, network).get_decoder().config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    # Without a mask function of the same name, transformers makes no padding mask.
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)
    set_attention(network, name)
    return former


def set_attention(network: nn.Module, name: str) -> None:
    """Set the attention function of a network's text decoder by its registered name."""
    cast(PreTrainedModel, network).set_attn_implementation({"text_config": name})


def _masked_attention(
    module: AttentionModule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Forward a layer's attention to the owner of the layer."""
    owner: MaskedMode = getattr(module, OWNER_ATTRIBUTE)
    out_BHQd = owner.attend(module.layer_idx, q, k, v, mask, scaling)
    return out_BHQd.transpose(1, 2).contiguous(), None


def _dropped_heads(plan: LayerPlan, heads: int, device: torch.device) -> Tensor:
    """Mark the heads that a layer drops, bool [H]."""
    dropped_H = torch.zeros(heads, dtype=torch.bool, device=device)
    if plan.heads is not None:
        dropped_H[[head for head in range(heads) if head not in set(plan.heads)]] = True
    return dropped_H


def _visual_marks(tokens: VisualTokens | None, x_BQD: Tensor) -> Tensor:
    if tokens is not None:
        return tokens.mask
    return torch.zeros(x_BQD.shape[:2], dtype=torch.bool, device=x_BQD.device)


def _real_positions(attention_mask: Tensor | None, new_BQ: Tensor) -> Tensor:
    """Mark the new rows that are not padding, bool [B, Q]."""
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.ones_like(new_BQ)
    return attention_mask[:, -new_BQ.shape[1] :].bool()


def _past_visual_marks(
    past_BP: Tensor | None, cache: DynamicCache | None, new_BQ: Tensor
) -> Tensor:
    """Mark the cached tokens that are visual, [B, P]."""
    length = 0 if cache is None else cache.get_seq_length()
    known = new_BQ[:, :0] if past_BP is None else past_BP
    # Calls before the first image leave no marks, so their tokens are padded with False (text).
    # After a crop the padding is negative and cuts the marks.
    return functional.pad(known, (0, length - known.shape[1]))
