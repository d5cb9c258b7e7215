"""Exact multiply-adds of the engine for a prompt: every matmul of its decoder layers.

The count uses the same `AttentionMasks` as the engine itself, and the same slices of the weights,
so it holds for any plan and for later changes to the weights. Which tokens a pruning step keeps is
unknown without running it: the first ones of each frame stand for them, which affects windows only.

Shapes: B samples, T text rows, N visual rows, K keys, H query heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from bench.models.multimodal import DecoderLayer, locate
from bench.models.multimodal.planned import Inputs, VisualLayer
from bench.models.products import Product, attended, feed_forward, matrices, weights
from methods.visual_tokens.attendance import EVERY, Attendance, attendance
from methods.visual_tokens.engine import Engine, streams_of
from methods.visual_tokens.frames import Frames
from methods.visual_tokens.passage import Present, present
from methods.visual_tokens.plan import Selection
from methods.visual_tokens.rows import Rows, rows_where
from methods.visual_tokens.sizes import sizes_of
from methods.visual_tokens.weights import GatedSlice, VisualWeights


@dataclass(frozen=True)
class Stage:
    """One layer of a call: its rows, its masks, and the cost of pruning steps before it."""

    layer: DecoderLayer
    weights: VisualWeights
    text: Rows
    visual: Present
    who: Attendance
    chosen: tuple[Product, ...]

    @property
    def samples(self) -> int:
        """Number of samples of the call, B."""
        return self.text.index_BR.shape[0]

    @property
    def rows(self) -> tuple[int, int]:
        """Text rows and visual rows of one sample, T and N."""
        return self.text.count, self.visual.rows.count


class Told:
    """The FLOPs of one engine; implements `FlopsProvider`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def untold(self) -> tuple[str, ...]:
        """Names of the pruning steps that do not report the cost of choosing."""
        quiet = (each.name for each in self.engine.plan.selections if each.macs is None)
        return tuple(dict.fromkeys(quiet))

    def prefill(self, inputs: Inputs) -> list[Product] | None:
        """Return the decoder's matmuls for a prompt; None if the original decoder runs."""
        if self.engine.plan.form != "skip" or locate(self.engine.network, inputs) is None:
            return None
        products: list[Product] = []
        for stage in self._stages(inputs):
            products += stage.chosen
            products += self._text_rows(stage.layer, stage.samples * stage.text.count)
            products += self._layer(stage)
        return products

    def token(self, inputs: Inputs) -> list[Product] | None:
        """Return the matmuls of the first generated token; None if the original decoder runs."""
        if self.engine.plan.form != "skip" or locate(self.engine.network, inputs) is None:
            return None
        products: list[Product] = []
        for stage in self._stages(inputs):
            batch, (text, visual) = stage.samples, stage.rows
            seen = stage.visual.rows.validity.sum() / batch
            kept = self._kept(stage)
            heads = stage.weights.view.heads
            products += self._text_rows(stage.layer, batch)
            # The kernel multiplies with padded visual rows as well, which `pairs` counts; `real`
            # counts the keys that are attended to.
            pairs = batch * (heads * (text + 1) + kept * visual)
            real = batch * (heads * (text + 1) + kept * float(seen))
            products.append(attended("text", pairs, real, _width(stage)))
        return products

    def layers(self, inputs: Inputs) -> list[VisualLayer]:
        """Return visual tokens and kept shares of every layer."""
        found = []
        for stage in self._stages(inputs):
            plan, total = self.engine.plan.layers[stage.layer.index], stage.weights.view.heads
            heads = total if plan.heads is None else len(plan.heads)
            neurons = 1.0
            if plan.neurons is not None:
                width = sum(unit.width for unit in stage.layer.units())
                neurons = sum(len(kept) for kept in plan.neurons) / width
            reached = stage.layer.index < self.engine.plan.cut
            tokens = int(stage.visual.rows.validity.sum()) if reached else 0
            windowed = self.engine.plan.window is not None
            found.append(VisualLayer(tokens, heads / total, neurons, windowed))
        return found

    def _stages(self, inputs: Inputs) -> Iterator[Stage]:
        """Yield every layer with its rows, in the order of `VisualEngine._through_layers`."""
        engine, plan = self.engine, self.engine.plan
        tokens = locate(engine.network, inputs)
        ids_BS: Tensor = inputs["input_ids"]
        text, visual = streams_of(ids_BS[..., None], tokens, inputs.get("attention_mask"))
        if tokens is None or visual is None:
            return
        # Angles and DeepStack rows do not affect any count, so zero-width tensors stand in for
        # them.
        nothing = torch.zeros(*visual.index_BR.shape, 0, device=ids_BS.device)
        here = present(tokens, visual, (nothing, nothing), [])
        whole = Frames.of(here.cells).counts
        who = attendance(text, here.rows, here.cells, plan.window, None, 0)
        waiting = list(plan.selections)
        for layer in engine.decoder.layers:
            chosen: list[Product] = []
            while waiting and waiting[0].after <= layer.index < plan.cut:
                selection = waiting.pop(0)
                chosen += self._choosing(selection, text, here, whole)
                here = _after(selection, here, whole)
                who = attendance(text, here.rows, here.cells, plan.window, None, 0)
            ready = engine.prepared.layer(layer.index)
            yield Stage(layer, ready, text, here, who, tuple(chosen))

    def _choosing(
        self, selection: Selection, text: Rows, here: Present, whole: tuple[int, ...]
    ) -> list[Product]:
        """Return the cost of choosing, if the method reports it and something is chosen."""
        sizes = sizes_of(self.engine, selection, text, here, whole)
        if selection.macs is None or sizes.kept == sizes.counts:
            return []
        return [Product("method", selection.macs(sizes), "visual")]

    def _text_rows(self, layer: DecoderLayer, rows: int) -> list[Product]:
        """Return the linear layers of text rows, which run through the original layer."""
        own = Product("rows", rows * weights(layer.attention))
        return [own, *feed_forward(layer.feed_forward, rows, "text", self._top_k)]

    def _layer(self, stage: Stage) -> Iterator[Product]:
        """Yield attention of text rows and all matmuls of visual rows in one layer."""
        cut, index = self.engine.plan.cut, stage.layer.index
        if index >= cut:
            yield _text_alone(stage, stage.weights.view.heads)
            return
        last = index == cut - 1
        yield from self._visual_rows(stage, last=last)
        kept, dropped = self._kept(stage), len(stage.weights.heads.dropped)
        if not kept:
            yield _text_alone(stage, stage.weights.view.heads)
        # The branches mirror `two_stream_layer` and `_attend_streams`; a case added there must be
        # added here.
        elif stage.who.order is not None and not last:
            yield from _jointly(stage, kept)
        else:
            yield _text_to_all(stage, kept)
            if not last:
                yield from _blocks(stage, kept)
        if kept and dropped:
            yield _text_alone(stage, dropped)
        if not last and self.engine.plan.dropped == "text" and dropped:
            yield _visual_to_text(stage, dropped)

    def _visual_rows(self, stage: Stage, *, last: bool) -> Iterator[Product]:
        """Yield the linear layers of visual rows; in their last layer only keys and values."""
        ready, rows = stage.weights, stage.samples * stage.visual.rows.count
        yield Product("rows", rows * matrices(ready.k.weight, ready.v.weight), "visual")
        if last:
            return
        yield Product("rows", rows * matrices(ready.q.weight, ready.o.weight), "visual")
        if isinstance(ready.feed_forward, GatedSlice):
            view = ready.feed_forward.view
            yield Product("rows", rows * matrices(view.gate, view.up, view.down), "visual")
        else:
            yield from feed_forward(ready.feed_forward, rows, "visual", self._top_k)

    def _kept(self, stage: Stage) -> int:
        """Return the number of heads that attend to visual tokens in a layer."""
        return len(stage.weights.heads.kept) if stage.layer.index < self.engine.plan.cut else 0

    @property
    def _top_k(self) -> int | None:
        return cast(int | None, getattr(self.engine.decoder.config, "num_experts_per_tok", None))


def _after(selection: Selection, here: Present, whole: tuple[int, ...]) -> Present:
    """Return what a pruning step leaves; the first tokens of each frame stand for the chosen."""
    frames = Frames.of(here.cells)
    left = [
        selection.quota.left(n, m) if selection.quota.kept(n, m) < m else m
        for n, m in zip(whole, frames.counts, strict=True)
    ]
    place_M = torch.arange(max(frames.counts), device=frames.valid_IM.device)
    keep_IM = place_M < torch.tensor(left, device=place_M.device)[:, None]
    return here.among(rows_where(frames.spread(keep_IM)))


def _width(stage: Stage) -> int:
    """Return the multiply-adds per query-key pair in one head: q·k and weight·v."""
    return 2 * stage.weights.view.head_dim


def _seen(mask: Tensor | None, samples: int, pairs: int) -> float:
    """Count the pairs that a mask leaves, over all samples."""
    if mask is None:
        return float(pairs)
    # A mask may have one row for the whole batch.
    return float(mask.sum()) * samples / mask.shape[0]


def _text_alone(stage: Stage, heads: int) -> Product:
    batch, (text, _) = stage.samples, stage.rows
    pairs = batch * text * text
    causal = batch * text * (text + 1) / 2
    seen = causal if stage.who.causal else _seen(stage.who.text_BTK, batch, pairs)
    return attended("text", heads * pairs, heads * seen, _width(stage))


def _text_to_all(stage: Stage, heads: int) -> Product:
    """Count text rows over visual and text keys under a mask."""
    batch, (text, visual) = stage.samples, stage.rows
    pairs = batch * text * (text + visual)
    seen = _seen(stage.who.mixed_BTK, batch, pairs)
    return attended("text", heads * pairs, heads * seen, _width(stage))


def _jointly(stage: Stage, heads: int) -> Iterator[Product]:
    """Yield both streams over both, in plain causal order without a mask."""
    batch, (text, visual) = stage.samples, stage.rows
    order = cast(Tensor, stage.who.order)
    # In causal order a row attends to all rows before it and to itself.
    rank = order.argsort() + 1
    parts: tuple[tuple[Any, int, Tensor], ...] = (
        ("text", text, rank[:text]),
        ("visual", visual, rank[text:]),
    )
    for rows, count, keys in parts:
        pairs = heads * batch * count * (text + visual)
        yield attended(rows, pairs, heads * batch * float(keys.sum()), _width(stage))


def _blocks(stage: Stage, heads: int) -> Iterator[Product]:
    """Yield visual rows over the keys of their blocks."""
    for block in stage.who.blocks:
        samples = stage.samples if block.samples == EVERY else 1
        queries, keys = block.mask.shape[-2:]
        pairs = samples * queries * keys
        seen = _seen(block.mask, samples, pairs)
        yield attended("visual", heads * pairs, heads * seen, _width(stage))


def _visual_to_text(stage: Stage, heads: int) -> Product:
    """Count what dropped heads of visual rows attend to under `dropped=text`.

    Rows before all text get all of it, and their result is discarded, as in `text_only_attention`.
    """
    batch, (text, visual) = stage.samples, stage.rows
    pairs = batch * visual * text
    before = cast(Tensor, stage.who.before_BNK)
    seen = _seen(before | ~before.any(dim=-1, keepdim=True), batch, pairs)
    return attended("visual", heads * pairs, heads * seen, _width(stage))
