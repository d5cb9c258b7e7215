"""Reference for two-stream execution: every row computed in full under masks.

Slow and direct, for tests. Attention is masked before the softmax; feed-forwards of visual rows run
on copies whose dropped neurons are zero. Shapes: B samples, Q new tokens, K all tokens so far, H
heads, d a head's width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.models.structure.model_structure import inspect_model
from bench.models.vlm.decoder_view import DecoderLayer, decoder_layers
from bench.models.vlm.visual_tokens import VisualTokens, locate_visual_tokens
from methods.visual_engine.masked_mode import set_attention, use_attention
from methods.visual_engine.plan import VisualPlan

REFERENCE_ATTENTION = "slimbench_visual_masked"


@dataclass(frozen=True)
class Removal:
    """Tokens [B, S] of the first call that are hidden from all other tokens from layer `after` on.

    `states_BSD` replaces hidden states at the input of that layer where they are not NaN. From
    there on a token counts for `weight_BS` keys in attention.
    """

    after: int
    gone_BS: Tensor
    states_BSD: Tensor | None = None
    weight_BS: Tensor | None = None


class MaskedReference:
    """Masked run of one conversation; keeps the positions of visual tokens over all its calls.

    The plan's own pruning steps are not carried out; `removals` gives what they would remove.
    """

    def __init__(
        self, network: nn.Module, plan: VisualPlan, removals: Sequence[Removal] = ()
    ) -> None:
        self.network, self.plan, self.removals = network, plan, removals
        self.layers = decoder_layers(inspect_model(network))
        self.thin = [self._thinned(layer) for layer in self.layers]
        self.tokens: VisualTokens | None = None
        self.real_BK: Tensor | None = None
        self.new = self.first = 0

    def _thinned(self, layer: DecoderLayer) -> nn.Module:
        """Copy a layer's feed-forward without the neurons that visual rows skip."""
        kept = self.plan.layers[layer.index].neurons
        units = () if kept is None else layer.units()
        # Units are views of the network's weights in any storage format, and a copy's are not
        # reachable the same way: the network is changed, copied and restored.
        gates = [unit.gate.detach().clone() for unit in units]
        for unit, indices in zip(units, kept or (), strict=True):
            lost = torch.ones(unit.width, dtype=torch.bool)
            lost[indices.cpu()] = False
            # act(0) is 0 for the activations in use, so a neuron without its gate is silent.
            unit.gate.detach()[lost] = 0
        twin = copy.deepcopy(layer.feed_forward)
        for unit, gate in zip(units, gates, strict=True):
            unit.gate.detach().copy_(gate)
        return twin

    def note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add a call's tokens to the conversation."""
        bound = inspect.signature(self.network.model.forward).bind_partial(*args, **kwargs)
        kwargs = bound.arguments | bound.arguments.pop("kwargs", {})
        found = locate_visual_tokens(self.network, kwargs)
        ids = kwargs["input_ids"]
        cache = kwargs.get("past_key_values")
        first = cache is None or cache.get_seq_length() == 0
        none = torch.full_like(ids, -1)
        found = found or VisualTokens(none, none, none)
        mask = kwargs.get("attention_mask")
        self.new = ids.shape[1]
        self.first = ids.shape[1] if first else self.first
        self.tokens = found if first or self.tokens is None else _followed_by(self.tokens, found)
        length = self.tokens.frame_BS.shape[1]
        self.real_BK = torch.ones(len(ids), length).bool() if mask is None else mask.bool()

    def attention(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        """Attend under a mask of every head over every pair of tokens."""
        allowed_BHQK, silent_BHQ = self._rule(module.layer_idx, q.shape[1])
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        scores = (q @ k.transpose(2, 3) * scaling).masked_fill(~allowed_BHQK, -torch.inf)
        for removal in self.removals:
            if removal.weight_BS is not None and module.layer_idx >= removal.after:
                log_BS = removal.weight_BS.log()
                later = scores.shape[-1] - log_BS.shape[1]
                scores = scores + functional.pad(log_BS, (0, later))[:, None, None]
        # A row without any allowed key, such as padding, is NaN, which becomes 0.
        out_BHQd = scores.softmax(-1).nan_to_num(0) @ v
        return out_BHQd.masked_fill(silent_BHQ[..., None], 0).transpose(1, 2), None

    def _rule(self, index: int, heads: int) -> tuple[Tensor, Tensor]:
        """Return the keys each query of each head attends to, and the queries that output zero."""
        tokens, real_BK = cast(VisualTokens, self.tokens), cast(Tensor, self.real_BK)
        plan, length = self.plan, tokens.frame_BS.shape[1]
        kept = plan.layers[index].heads
        kept = tuple(range(heads)) if kept is None else kept
        key = torch.arange(length)
        query = key[length - self.new :]
        vq, vk = tokens.mask[:, query][:, :, None], tokens.mask[:, None, :]
        seen_BQK = (query[:, None] >= key[None, :]).expand(len(real_BK), -1, -1)
        if tokens.attention == "frame":
            frame = tokens.frame_BS
            seen_BQK = seen_BQK | (vq & vk & (frame[:, query][:, :, None] == frame[:, None, :]))
        if tokens.attention == "prompt":
            # Answers see the whole prompt anyway, and each other in causal order.
            seen_BQK = seen_BQK | ((query < self.first)[:, None] & (key < self.first))
        seen_BQK = seen_BQK & real_BK[:, None, :]
        if plan.window is not None:
            seen_BQK = torch.where(vq & vk, self._near(tokens, query, key), seen_BQK)
        allowed = seen_BQK[:, None].repeat(1, heads, 1, 1)
        silent = torch.zeros(*allowed.shape[:3], dtype=torch.bool)
        for head in set(range(heads)) - set(kept):
            allowed[:, head] &= ~vk
            if plan.dropped_heads == "zero":
                silent[:, head] |= vq[..., 0]
        if index >= plan.cut:
            # After the cut only text rows are read, and they must not attend to visual keys; visual
            # rows keep each other, or their softmax would be empty.
            allowed &= ~(vk & ~vq)[:, None]
        for removal in self.removals:
            if index >= removal.after:
                gone = functional.pad(removal.gone_BS, (0, length - removal.gone_BS.shape[1]))
                # A removed token still attends to itself, so its row stays finite; nothing reads
                # it.
                allowed &= (~gone[:, None] | (query[:, None] == key))[:, None]
        return allowed, silent

    def _near(self, tokens: VisualTokens, query: Tensor, key: Tensor) -> Tensor:
        """Mark visual pairs that are neighbours in one frame."""
        window = self.plan.window
        assert window is not None
        apart = [
            (part[:, query][:, :, None] - part[:, None, :])
            for part in (tokens.frame_BS, tokens.row_BS, tokens.column_BS)
        ]
        near = (apart[0] == 0) & (apart[1].abs() <= window.radius)
        near &= apart[2].abs() <= window.radius
        return near & (query[:, None] >= key[None, :]) if window.causal else near

    def enter(self, index: int) -> Callable[..., Any]:
        """Return a hook that sets the states of tokens into which others were merged."""

        def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states_BSD = args[0]
            for removal in self.removals:
                new_BSD = removal.states_BSD
                if new_BSD is not None and removal.after == index and self._is_first():
                    states_BSD = torch.where(new_BSD.isnan(), states_BSD, new_BSD)
            return (states_BSD, *args[1:])

        return before

    def _is_first(self) -> bool:
        return self.new == cast(VisualTokens, self.tokens).frame_BS.shape[1]

    def feed_forward(self, index: int) -> Callable[..., Tensor]:
        """Return a hook that gives visual rows the output of the reduced copy."""

        def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            tokens = cast(VisualTokens, self.tokens)
            visual = tokens.mask[:, tokens.frame_BS.shape[1] - self.new :, None]
            return torch.where(visual, self.thin[index](args[0]), output)

        return after


@contextmanager
def masked_reference(
    network: Any, plan: VisualPlan, removals: Sequence[Removal] = ()
) -> Iterator[None]:
    """Run the network's own layers under the masks of a plan inside the block."""
    state = MaskedReference(network, plan, removals)
    former = use_attention(network, REFERENCE_ATTENTION, state.attention)
    hooks = [network.model.register_forward_pre_hook(state.note, with_kwargs=True)]
    hooks += [
        layer.feed_forward.register_forward_hook(state.feed_forward(layer.index))
        for layer in state.layers
    ]
    hooks += [
        layer.module.register_forward_pre_hook(state.enter(layer.index)) for layer in state.layers
    ]
    try:
        yield
    finally:
        set_attention(network, former)
        for hook in hooks:
            hook.remove()


def _followed_by(first: VisualTokens, then: VisualTokens) -> VisualTokens:
    """Append a call to a conversation; frames of different calls get different numbers."""
    moved = torch.where(then.mask, then.frame_BS + 1 + first.frame_BS.max(), then.frame_BS)
    return VisualTokens(
        torch.cat([first.frame_BS, moved], 1),
        torch.cat([first.row_BS, then.row_BS], 1),
        torch.cat([first.column_BS, then.column_BS], 1),
        attention=first.attention,
    )
