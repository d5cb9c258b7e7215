"""Seeing what experts compute while a network runs, in its own forward pass.

Shapes: T tokens, K experts a token, S tokens routed to one expert (a chunk of them), D d_model,
F an expert's width.

Fused experts of transformers 5 never expose their intermediate, so the pass is taken over through
its experts interface: the same sum, expert by expert, with the intermediate shown to an observer.
Ragged experts, which are our own, are taken over likewise. Expert lists are watched by a hook on
their inputs. In all cases the router's weights are the ones that the model really applies,
whatever its router does (normalised, scaled, sparsemixer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from bench.models.anatomy.expert import ExpertView, projections
from bench.models.anatomy.moe import MoEBlock

IMPLEMENTATION = "slimbench_observed"


class Observer(Protocol):
    """What one MoE block shows; every token that passes is shown once, in chunks."""

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Tokens of one routed expert: its input, act(gate)·up, and the router's weights."""

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """All tokens of the shared experts; the weight is their gate's, or one."""

    def output(self, y_TD: Tensor) -> None:
        """The block's output."""


@dataclass(frozen=True)
class Routed:
    """Some tokens of one expert: which ones [S], router weights [S], hidden states [S, F]."""

    view: ExpertView
    token: Tensor
    weight: Tensor
    hidden: Tensor


@contextmanager
def observing(watched: Mapping[MoEBlock, Observer], chunk: int = 4096) -> Iterator[None]:
    """Show the observers what passes through their blocks inside the `with`.

    At most `chunk` tokens are shown at once, which bounds the memory for intermediates.
    """
    with ExitStack() as stack:
        _take_over_fused([b for b in watched if b.layout == "fused"], watched, chunk, stack)
        for block, observer in watched.items():
            if block.layout == "ragged":
                _take_over_ragged(block, observer, chunk, stack)
            if block.layout == "list":
                hook = _input_hook(block, observer, chunk)
                handle = block.experts.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            if block.shared is not None:
                _watch_shared(block, observer, chunk, stack)
            handle = block.block.register_forward_hook(_output_hook(observer))
            stack.callback(handle.remove)
        yield


def _take_over_fused(
    blocks: list[MoEBlock],
    watched: Mapping[MoEBlock, Observer],
    chunk: int,
    stack: ExitStack,
) -> None:
    """Make transformers call our forward for fused experts until the stack is closed."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    owners = {block.experts: block for block in blocks}

    def forward(experts: nn.Module, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        block = owners.get(experts)
        if block is None:
            # Not watched, but of the same config: as transformers' own file computes it.
            plain: Tensor = cast(Any, type(experts).forward).__wrapped__(
                experts, x_TD, index_TK, weight_TK
            )
            return plain
        return _observed(block, watched[block], chunk, (x_TD, index_TK, weight_TK))

    if blocks:
        ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = forward
        stack.callback(ALL_EXPERTS_FUNCTIONS.pop, IMPLEMENTATION)
    for block in blocks:
        # The config object is shared by all layers; the first one sets it, all restore it.
        config = cast(Any, block.experts).config
        stack.callback(setattr, config, "_experts_implementation", config._experts_implementation)
        config._experts_implementation = IMPLEMENTATION


def _take_over_ragged(block: MoEBlock, observer: Observer, chunk: int, stack: ExitStack) -> None:
    """Put our forward before the one of the experts' class until the stack is closed."""
    instance = block.experts.__dict__
    before = instance.get("forward")

    def forward(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return _observed(block, observer, chunk, (x_TD, index_TK, weight_TK))

    def restore() -> None:
        del instance["forward"]
        if before is not None:
            instance["forward"] = before

    instance["forward"] = forward
    stack.callback(restore)


def _observed(
    block: MoEBlock, observer: Observer, chunk: int, inputs: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Return what the experts compute, [T, D], while the observer sees how."""
    y_TD = torch.zeros_like(inputs[0], dtype=torch.float32)
    for part in _by_expert(block, observer, chunk, inputs):
        y_SD = part.view.combine(part.hidden) * part.weight[:, None]
        y_TD.index_add_(0, part.token, y_SD.float())
    return y_TD.to(inputs[0].dtype)


def _by_expert(
    block: MoEBlock, observer: Observer, chunk: int, inputs: tuple[Tensor, Tensor, Tensor]
) -> Iterator[Routed]:
    """Compute and show each expert's hidden states for its tokens, and nothing for other tokens."""
    x_TD, index_TK, weight_TK = inputs
    flat = index_TK.flatten()
    # Stable, so that an expert sees its tokens in their order on every device.
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=block.num_experts).tolist()
    for expert, slots in enumerate(torch.split(order, counts)):
        view = block.expert(expert)
        for slots_S in torch.split(slots, chunk) if len(slots) else ():
            token_S = slots_S // index_TK.shape[1]
            x_SD, weight_S = x_TD[token_S], weight_TK.flatten()[slots_S]
            hidden_SF = view.hidden(x_SD)
            observer.routed(expert, x_SD, hidden_SF, weight_S)
            yield Routed(view, token_S, weight_S, hidden_SF)


def _input_hook(block: MoEBlock, observer: Observer, chunk: int) -> Callable[..., None]:
    """Return a hook that repeats what a list of experts is about to do, for the observer."""

    def before(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x_TD, index_TK, weight_TK = (*args, *kwargs.values())
        for _part in _by_expert(block, observer, chunk, (x_TD, index_TK, weight_TK)):
            pass

    return before


def _watch_shared(block: MoEBlock, observer: Observer, chunk: int, stack: ExitStack) -> None:
    """Show the shared experts' input, the input of their down projection, and their gate."""
    shared = cast(nn.Module, block.shared)
    linears = projections(shared)
    assert linears is not None
    entered: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        entered.append(args[0].flatten(0, -2))

    def hidden(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x_TD, hidden_TF = entered.pop(), args[0].flatten(0, -2)
        weight_T = _shared_weight(block, x_TD)
        pieces = (torch.split(part, chunk) for part in (x_TD, hidden_TF, weight_T))
        for x, h, weight in zip(*pieces, strict=True):
            observer.shared(x, h, weight)

    stack.callback(shared.register_forward_pre_hook(enter).remove)
    stack.callback(linears[2].register_forward_pre_hook(hidden).remove)


def _shared_weight(block: MoEBlock, x_TD: Tensor) -> Tensor:
    """Return what multiplies the shared experts' output, shape [T]."""
    if block.shared_gate is None:
        return x_TD.new_ones(x_TD.shape[0])
    return torch.sigmoid(block.shared_gate(x_TD)).squeeze(-1)


def _output_hook(observer: Observer) -> Callable[..., None]:
    """Return a hook that shows a block's output."""

    def after(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        observer.output(output.flatten(0, -2))

    return after
