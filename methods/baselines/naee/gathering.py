"""Inputs and outputs of MoE blocks on calibration text.

Shapes: B rows, L tokens per row, P of them kept, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.models.anatomy import MoEBlock
from bench.models.layerwise import LayerStream
from bench.models.model import Model
from bench.progress import Progress
from methods.baselines.naee.evidence import Evidence
from methods.baselines.whole_experts import Form


@dataclass(frozen=True)
class Passed:
    """Inputs and outputs of a block for some tokens of every row."""

    x_BPD: Tensor
    y_BPD: Tensor


def gather(
    model: Model,
    tokens_BL: Tensor,
    batch: int,
    progressive: bool,
    kept: int,
    form: Form,
    told: Progress,
) -> Iterator[tuple[MoEBlock, Evidence]]:
    """Yield the error model of every block in layer order; the caller may modify the block.

    `kept` tokens of each row are used, evenly spaced. With `progressive` inputs come from the
    already pruned earlier layers, while the target is still the output of the unpruned model, for
    which a second set of hidden states is advanced in parallel.
    """
    anatomy = model.anatomy
    last = anatomy.moe[-1].layer
    unchanged = None
    if progressive:
        unchanged = LayerStream(model.network, anatomy.layers, tokens_BL, batch)
    with LayerStream(model.network, anatomy.layers, tokens_BL, batch) as stream:
        for index in told.track(range(last + 1), "searching for experts to drop"):
            blocks = [block for block in anatomy.moe if block.layer == index]
            # As in the calibration walk: the layer runs again after pruning, unless nothing
            # follows.
            again = progressive and bool(blocks) and index < last
            # Both streams share the network. The layer is still unpruned when the reference stream
            # passes it, so it must advance here, before the caller prunes the layer.
            targets = _run(unchanged, index, blocks, kept, advance=True) if unchanged else {}
            passed = _run(stream, index, blocks, kept, advance=not again)
            for block in blocks:
                seen = passed[block]
                target_BPD = targets.get(block, seen).y_BPD
                yield block, Evidence(block, seen.x_BPD, seen.y_BPD, target_BPD, form)
            if again:
                stream.run(index, advance=True)


def _run(
    stream: LayerStream, index: int, blocks: list[MoEBlock], kept: int, *, advance: bool
) -> dict[MoEBlock, Passed]:
    """Run all rows through a layer; return the inputs and outputs of its blocks."""
    with _listening(blocks, kept) as heard:
        stream.run(index, advance=advance)
    return {block: _joined(pieces) for block, pieces in heard.items()}


def _joined(pieces: list[Passed]) -> Passed:
    x, y = ([getattr(piece, name) for piece in pieces] for name in ("x_BPD", "y_BPD"))
    return Passed(torch.cat(x), torch.cat(y))


@contextmanager
def _listening(blocks: list[MoEBlock], kept: int) -> Iterator[dict[MoEBlock, list[Passed]]]:
    """Record evenly spaced tokens at the input and output of some blocks."""
    heard: dict[MoEBlock, list[Passed]] = {block: [] for block in blocks}
    entered: dict[MoEBlock, Tensor] = {}

    def thinned(state_BLD: Tensor) -> Tensor:
        length = state_BLD.shape[1]
        # Integer arithmetic: evenly spaced, distinct, and the same on every device.
        place_P = torch.arange(kept, device=state_BLD.device) * length // kept
        return state_BLD[:, place_P] if kept < length else state_BLD

    with ExitStack() as stack:
        for block in blocks:
            # `block=block` binds the current block; a closure would see the last one of the loop.
            def enter(_: nn.Module, args: tuple[Tensor, ...], block: MoEBlock = block) -> None:
                entered[block] = thinned(args[0])

            def leave(_: nn.Module, __: Any, y_BLD: Tensor, block: MoEBlock = block) -> None:
                heard[block].append(Passed(entered.pop(block), thinned(y_BLD)))

            stack.callback(block.block.register_forward_pre_hook(enter).remove)
            stack.callback(block.block.register_forward_hook(leave).remove)
        yield heard
