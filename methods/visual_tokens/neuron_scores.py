"""Contribution of each feed-forward neuron to visual rows: E|a_j| · ‖Wdown[:, j]‖.

Shapes: B samples, S tokens, X visual tokens of a call, D d_model, F a feed-forward's width, Y
tokens of one expert. Neuron j adds a_j · Wdown[:, j] to a row, with a = act(Wgate x) ⊙ Wup x, times
the router's weight in an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench.models.anatomy import MoEBlock
from bench.models.multimodal import DecoderLayer
from bench.models.observation import observing


class NeuronScores:
    """Sums of |a_j| over the visual tokens of all calls, for every feed-forward of every layer."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        self.layers = layers
        self._sums = [[torch.zeros(unit.width) for unit in layer.units()] for layer in layers]
        self._tokens = 0

    @contextmanager
    def watching(self, visual_BS: Tensor) -> Iterator[None]:
        """Record the network's next forward; `visual` marks the visual tokens of the call."""
        with ExitStack() as stack:
            for layer in self.layers:
                sums = self._sums[layer.index]
                moe = layer.moe
                if moe is None:
                    down = cast(nn.Linear, layer.feed_forward.down_proj)
                    handle = down.register_forward_pre_hook(_dense(sums[0], visual_BS))
                else:
                    hook = _experts(moe, sums, visual_BS)
                    handle = moe.block.register_forward_hook(hook)
                stack.callback(handle.remove)
            yield
        self._tokens += int(visual_BS.sum())

    def scores(self) -> list[list[Tensor]]:
        """Return E|a_j| · ‖Wdown[:, j]‖ of every neuron, [F] for each feed-forward."""
        return [
            [
                # Experts, too, are divided by all visual tokens, not by those routed to them: a
                # rarely used expert contributes less.
                total_F / max(1, self._tokens) * unit.down.detach().float().norm(dim=0).cpu()
                for total_F, unit in zip(sums, layer.units(), strict=True)
            ]
            for sums, layer in zip(self._sums, self.layers, strict=True)
        ]


def _dense(sum_F: Tensor, visual_BS: Tensor) -> Callable[..., None]:
    """Return a hook on a down projection that accumulates its input on visual rows."""

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        sum_F.add_(args[0][visual_BS].abs().float().sum(dim=0).cpu())

    return before


class _Adder:
    """Accumulator of expert activations in one block, times the router's weight."""

    def __init__(self, sums: list[Tensor], routed: int) -> None:
        self.sums, self.number = sums, routed

    def routed(self, expert: int, x_YD: Tensor, hidden_YF: Tensor, weight_Y: Tensor) -> None:
        self.sums[expert].add_((hidden_YF * weight_Y[:, None]).abs().float().sum(dim=0).cpu())

    def shared(self, x_YD: Tensor, hidden_YF: Tensor, weight_Y: Tensor) -> None:
        self.routed(self.number, x_YD, hidden_YF, weight_Y)

    def output(self, y_YD: Tensor) -> None:
        """Ignore the block's output."""


def _experts(block: MoEBlock, sums: list[Tensor], visual_BS: Tensor) -> Callable[..., None]:
    """Return a hook on a block that runs its experts again on the visual rows alone."""
    # Observers of experts see tokens grouped by expert and cannot tell which are visual, so the
    # block runs a second time on visual rows only. That call triggers this hook again: the flag
    # stops the recursion.
    inside = False

    def after(module: nn.Module, args: tuple[Any, ...], _: Any) -> None:
        nonlocal inside
        if inside:
            return
        inside = True
        try:
            with observing({block: _Adder(sums, block.num_experts)}):
                module(args[0][visual_BS][None])
        finally:
            inside = False

    return after
