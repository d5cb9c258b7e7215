"""Hooks that show what experts compute during a network's own forward.

Shapes: T tokens, K experts per token, S tokens routed to one expert (a chunk of them), D d_model, F
an expert's width.

Fused experts of transformers 5 do not expose their hidden states, so their forward is replaced
through transformers' experts interface: the same sum is computed expert by expert, and hidden
states are passed to an observer. Our own ragged experts are replaced likewise. Experts in lists and
in flat form are observed by a hook on their inputs, and a dense feed-forward by hooks on its
matrices. The weights passed are those that the model applies, whatever its router computes
(normalised, scaled, sparsemixer), unless the caller requests renormalised ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from bench.errors import UserError
from bench.models.network import replaced_forward
from bench.models.structure.expert_view import ExpertView, sort_slots
from bench.models.structure.moe_block import MoEBlock

# Number of tokens on which a dense feed-forward is compared with its formula, and the relative
# difference allowed: half precision rounds to 1e-2.
SAMPLE = 16
DECOMPOSITION_TOLERANCE = 0.03

# Name of our forward in transformers' table of experts implementations.
EXPERTS_IMPLEMENTATION = "slimbench_observed"


class ExpertObserver(Protocol):
    """Receiver of what one MoE block computes; every token is passed once, in chunks."""

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Receive tokens of one routed expert: inputs, act(gate)·up, and router weights."""

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Receive tokens of the shared experts; the weights are those of their gate, or 1."""

    def output(self, y_TD: Tensor) -> None:
        """Receive the block's output."""


@runtime_checkable
class TokenObserver(ExpertObserver, Protocol):
    """An observer that also receives which tokens reach an expert."""

    def places(self, expert: int, token_S: Tensor) -> None:
        """Receive the rows of the block's input [T, D] for the next call of `routed`."""


_ExpertsForward = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class _DecoratedForward(Protocol):
    """The decorated forward of fused experts, and the original that it wraps."""

    __wrapped__: _ExpertsForward


class _ExpertsConfig(Protocol):
    """The setting by which transformers selects how experts are computed."""

    _experts_implementation: str | None


class _ConfiguredExperts(Protocol):
    """Fused experts of transformers, whose config selects how they are computed."""

    config: _ExpertsConfig


@dataclass(frozen=True)
class RoutedTokens:
    """Some tokens of one expert: indices [S], router weights [S], hidden states [S, F]."""

    view: ExpertView
    token: Tensor
    weight: Tensor
    hidden: Tensor


RouterWeights = Literal["applied", "renormalised"]


@contextmanager
def observe_experts(
    watched: Mapping[MoEBlock, ExpertObserver],
    chunk: int = 4096,
    weights: RouterWeights = "applied",
) -> Iterator[None]:
    """Pass the values that MoE blocks compute inside the `with` to their observers.

    At most `chunk` tokens are passed at a time, to limit the memory for hidden states. With
    `weights=renormalised` the observers get router weights that sum to 1 over the experts of a
    token; the network's own computation does not change.
    """
    with ExitStack() as stack:
        how = _Show(chunk, weights)
        _hook_fused([b for b in watched if b.layout == "fused"], watched, how, stack)
        for block, observer in watched.items():
            if block.layout == "ragged":
                _hook_ragged(block, observer, how, stack)
            if block.layout in ("list", "flat"):
                hook = _input_hook(block, observer, how)
                handle = block.experts.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            if block.layout == "dense":
                _hook_dense(block, observer, chunk, stack)
            if block.shared is not None:
                _hook_shared(block, observer, chunk, stack)
            _hook_output(block, observer, stack)
        yield


@dataclass(frozen=True)
class _Show:
    """How tokens are passed to observers."""

    chunk: int
    weights: RouterWeights

    def shown(self, block: MoEBlock, weight_TK: Tensor) -> Tensor:
        """Return the router weights for observers, including the block's own scaling factor."""
        if self.weights == "renormalised":
            weight_TK = weight_TK / weight_TK.sum(dim=1, keepdim=True)
        return weight_TK if block.routed_scale == 1 else weight_TK * block.routed_scale


def _hook_fused(
    blocks: list[MoEBlock],
    watched: Mapping[MoEBlock, ExpertObserver],
    how: _Show,
    stack: ExitStack,
) -> None:
    """Route transformers' calls of fused experts to our forward until the stack closes."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    owners = {block.experts: block for block in blocks}
    # The forward of an enclosing observation, whose observers must still be called.
    outer: _ExpertsForward | None = ALL_EXPERTS_FUNCTIONS.get(EXPERTS_IMPLEMENTATION)

    def forward(experts: nn.Module, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        block = owners.get(experts)
        if block is None and outer is not None:
            return outer(experts, x_TD, index_TK, weight_TK)
        if block is None:
            # Not observed, but called here because all layers share a config, so it computes the
            # forward of its class. `forward` of the class is decorated: it would select this
            # function by the config and recurse. `__wrapped__` is the original loop.
            plain = cast(_DecoratedForward, type(experts).forward).__wrapped__
            return plain(experts, x_TD, index_TK, weight_TK)
        return _observed_forward(block, watched[block], how, (x_TD, index_TK, weight_TK))

    if blocks:
        ALL_EXPERTS_FUNCTIONS[EXPERTS_IMPLEMENTATION] = forward
        if outer is None:
            stack.callback(ALL_EXPERTS_FUNCTIONS.pop, EXPERTS_IMPLEMENTATION)
        else:
            stack.callback(ALL_EXPERTS_FUNCTIONS.__setitem__, EXPERTS_IMPLEMENTATION, outer)
    for block in blocks:
        # All layers share one config object. The first block saves the original value, later ones
        # save ours; the stack unwinds in reverse, so that the original is restored last.
        config = cast(_ConfiguredExperts, block.experts).config
        stack.callback(setattr, config, "_experts_implementation", config._experts_implementation)
        config._experts_implementation = EXPERTS_IMPLEMENTATION


def _hook_ragged(block: MoEBlock, observer: ExpertObserver, how: _Show, stack: ExitStack) -> None:
    """Replace the experts' forward until the stack closes; weights must be onloaded."""

    def forward(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return _observed_forward(block, observer, how, (x_TD, index_TK, weight_TK))

    stack.enter_context(replaced_forward(block.experts, forward))


def _observed_forward(
    block: MoEBlock, observer: ExpertObserver, how: _Show, inputs: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Compute the output in the shape of x, expert by expert, and pass tokens to the observer."""
    x, index_TK, weight_TK = inputs
    x_TD = x.flatten(0, -2)
    # Summed in float32, so that half precision does not make the result depend on the order.
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    for part in _by_expert(block, observer, how, (x_TD, index_TK, weight_TK)):
        y_SD = part.view.combine(part.hidden) * part.weight[:, None]
        y_TD.index_add_(0, part.token, y_SD.float())
    return y_TD.to(x.dtype).view(x.shape)


def _by_expert(
    block: MoEBlock, observer: ExpertObserver, how: _Show, inputs: tuple[Tensor, Tensor, Tensor]
) -> Iterator[RoutedTokens]:
    """Compute and yield each expert's hidden states for its routed tokens only."""
    x_TD, index_TK, weight_TK = inputs
    order, counts = sort_slots(index_TK.flatten(), block.num_experts)
    applied, shown = weight_TK.flatten(), how.shown(block, weight_TK).flatten()
    for expert, slots in enumerate(torch.split(order, counts)):
        view = block.expert(expert)
        # `torch.split` of an empty tensor yields one empty chunk, but observers are not called
        # for experts without tokens.
        for slots_S in torch.split(slots, how.chunk) if len(slots) else ():
            token_S = slots_S // index_TK.shape[1]
            x_SD = x_TD[token_S]
            hidden_SF = view.hidden(x_SD)
            if isinstance(observer, TokenObserver):
                observer.places(expert, token_S)
            observer.routed(expert, x_SD, hidden_SF, shown[slots_S])
            yield RoutedTokens(view, token_S, applied[slots_S], hidden_SF)


def _input_hook(block: MoEBlock, observer: ExpertObserver, how: _Show) -> Callable[..., None]:
    """Return a hook that recomputes experts in a list or in flat form."""

    def before(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        # Architectures pass the router's choice by position or by keyword, but always in this
        # order.
        x, index_TK, weight_TK = (*args, *kwargs.values())
        for _part in _by_expert(block, observer, how, (x.flatten(0, -2), index_TK, weight_TK)):
            pass

    return before


def _hook_shared(block: MoEBlock, observer: ExpertObserver, chunk: int, stack: ExitStack) -> None:
    """Observe the shared experts' input, the input of their down projection, and their gate."""
    shared = cast(nn.Module, block.shared)
    feed_forward = block.shared_feed_forward
    assert feed_forward is not None
    unchecked = [block]

    def receive(x_TD: Tensor, hidden_TF: Tensor) -> None:
        while unchecked:
            view = unchecked.pop().shared_view()
            assert view is not None
            name = f"{block.name}'s shared expert"
            _require_decomposition(name, shared, view, x_TD[:SAMPLE], hidden_TF[:SAMPLE])
        weight_T = _shared_weight(block, x_TD)
        pieces = (torch.split(part, chunk) for part in (x_TD, hidden_TF, weight_T))
        for x, h, weight in zip(*pieces, strict=True):
            observer.shared(x, h, weight)

    _hook_feed_forward(shared, feed_forward.down, receive, stack)


def _hook_dense(block: MoEBlock, observer: ExpertObserver, chunk: int, stack: ExitStack) -> None:
    """Observe a dense feed-forward's input and the input of its down matrix, with weight 1."""
    feed_forward = block.feed_forward
    assert feed_forward is not None
    unchecked = [block]

    def receive(x_TD: Tensor, hidden_TF: Tensor) -> None:
        while unchecked:
            view = unchecked.pop().expert(0)
            _require_decomposition(block.name, block.block, view, x_TD[:SAMPLE], hidden_TF[:SAMPLE])
        row_T = torch.arange(len(x_TD), device=x_TD.device)
        pieces = (torch.split(part, chunk) for part in (row_T, x_TD, hidden_TF))
        for token_S, x_SD, hidden_SF in zip(*pieces, strict=True):
            if isinstance(observer, TokenObserver):
                observer.places(0, token_S)
            observer.routed(0, x_SD, hidden_SF, x_SD.new_ones(len(x_SD)))

    _hook_feed_forward(feed_forward.sources[0], feed_forward.down, receive, stack)


def _hook_feed_forward(
    entrance: nn.Module,
    down: nn.Module,
    receive: Callable[[Tensor, Tensor], None],
    stack: ExitStack,
) -> None:
    """Call `receive` in each forward with the input of `entrance`, x, and of `down`, act(gate)·up.

    Both are flattened to one row per token.
    """
    # One hook gets x and the other the hidden states of the same call. The list pairs them.
    entered: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        entered.append(args[0].flatten(0, -2))

    def hidden(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        # Popped, so that activations are freed after each forward.
        receive(entered.pop(), args[0].flatten(0, -2))

    stack.callback(entrance.register_forward_pre_hook(enter).remove)
    stack.callback(down.register_forward_pre_hook(hidden).remove)


@torch.no_grad()
def _require_decomposition(
    name: str, module: nn.Module, view: ExpertView, x_SD: Tensor, hidden_SF: Tensor
) -> None:
    """Raise if a feed-forward does not compute the formula of its view."""
    # The form is recognised by the names of its parts, but a class may do more, such as a top-k
    # over neurons (Gemma 3n), which would make every score wrong.
    apart = (view.hidden(x_SD) - hidden_SF).float().norm()
    if float(apart) > DECOMPOSITION_TOLERANCE * float(hidden_SF.float().norm()):
        raise UserError(
            f"{name} is a {type(module).__name__}, which computes its neurons in an "
            "unknown way: choose a method that does not need them, such as wanda"
        )


def _shared_weight(block: MoEBlock, x_TD: Tensor) -> Tensor:
    """Return the gate of the shared experts' output, [T]."""
    if block.shared_gate is None:
        return x_TD.new_full((x_TD.shape[0],), block.shared_scale)
    return torch.sigmoid(block.shared_gate(x_TD)).squeeze(-1) * block.shared_scale


def _hook_output(block: MoEBlock, observer: ExpertObserver, stack: ExitStack) -> None:
    """Observe the block's output, including shared experts."""
    parts = [block.output_module]
    if block.shared is not None and block.shared_owner is not block.block:
        parts.append(block.shared)
    seen: list[Tensor] = []

    def after(_: nn.Module, __: tuple[object, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        # Some blocks also return their router's logits.
        y = output[0] if isinstance(output, tuple) else output
        seen.append(y.flatten(0, -2))
        if len(seen) == len(parts):
            observer.output(torch.stack(seen).sum(dim=0) if len(seen) > 1 else seen[0])
            seen.clear()

    for part in parts:
        stack.callback(part.register_forward_hook(after).remove)
