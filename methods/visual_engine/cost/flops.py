"""Exact multiply-adds of the engine for a prompt: every matmul of its decoder layers.

The count uses the engine's own `AttentionMasks` and weight slices, so it is valid for any plan and
after later changes to the weights. Which tokens a pruning step keeps is unknown without running it;
the first ones of each frame are assumed, which affects windows only. How many tokens an adaptive
step keeps is also unknown, so for such a step the prompt is run and they are counted.

Shapes: B samples, T text rows, N visual rows, K keys, H query heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from bench.data.chat import ModelInputs
from bench.models.macs import (
    MatmulCost,
    TokenKind,
    VisualLayer,
    attention_cost,
    feed_forward_costs,
    matrix_weights,
    total_numel,
)
from bench.models.structure.moe_block import MoEBlock
from bench.models.vlm.decoder_view import DecoderLayer
from bench.models.vlm.visual_tokens import locate_visual_tokens
from methods.visual_engine.cost.closed_form import DecoderShape, LayerCost, last_visual_layer
from methods.visual_engine.decoder import VisualEngine, split_rows
from methods.visual_engine.forward_state import VisualTokensState, all_visual_tokens
from methods.visual_engine.masks import ALL, AttentionMasks, attention_masks
from methods.visual_engine.selection_step import SelectionSizes, TokenPruningStep
from methods.visual_engine.settings import LayerPlan, tokens_left
from methods.visual_engine.token_index import Frames, TokenRows, rows_after_images, rows_where
from methods.visual_engine.weight_slices import GatedSlice, VisualWeights


@dataclass(frozen=True)
class LayerCall:
    """One layer of a call: its rows, its masks, and the cost of pruning steps before it."""

    layer: DecoderLayer
    weights: VisualWeights
    text: TokenRows
    visual: VisualTokensState
    masks: AttentionMasks
    chosen: tuple[MatmulCost, ...]

    @property
    def samples(self) -> int:
        """Number of samples of the call, B."""
        return self.text.index_BR.shape[0]

    @property
    def rows(self) -> tuple[int, int]:
        """Text rows and visual rows of one sample, T and N."""
        return self.text.count, self.visual.rows.count


class VisualFlops:
    """The FLOPs of one engine; implements `FlopsProvider`."""

    def __init__(self, engine: VisualEngine) -> None:
        self.engine = engine

    @property
    def unaccounted(self) -> tuple[str, ...]:
        """Names of the pruning steps that do not report the cost of their choice."""
        quiet = (each.name for each in self.engine.plan.steps if each.macs is None)
        return tuple(dict.fromkeys(quiet))

    def prefill(self, inputs: ModelInputs) -> list[MatmulCost] | None:
        """Return the decoder's matmuls for a prompt; None if the original decoder runs."""
        if (
            self.engine.plan.execution != "skip"
            or locate_visual_tokens(self.engine.network, inputs) is None
        ):
            return None
        products: list[MatmulCost] = []
        for stage in self._stages(inputs):
            products += stage.chosen
            products += self._text_rows(stage.layer, stage.samples * stage.text.count)
            products += self._layer(stage)
        return products

    def token(self, inputs: ModelInputs) -> list[MatmulCost] | None:
        """Return the matmuls of the first generated token; None if the original decoder runs."""
        if (
            self.engine.plan.execution != "skip"
            or locate_visual_tokens(self.engine.network, inputs) is None
        ):
            return None
        products: list[MatmulCost] = []
        for stage in self._stages(inputs):
            batch, (text, visual) = stage.samples, stage.rows
            real_B = stage.visual.rows.validity.sum(dim=1).tolist()
            kept, heads = self._kept(stage), stage.weights.view.heads
            products += self._text_rows(stage.layer, batch)
            decode = self.engine.plan.decode
            if decode is not None and decode.layer <= stage.layer.index:
                if decode.layer == stage.layer.index:
                    products.append(self._choosing_cached(stage))
                visual, real_B = decode.read(visual), [decode.read(n) for n in real_B]
            # Padded visual rows are included, since the kernel multiplies them as well.
            pairs = batch * (heads * (text + 1) + kept * visual)
            real = batch * heads * (text + 1) + kept * sum(real_B)
            products.append(attention_cost("text", pairs, real, _pair_macs(stage)))
        return products

    def _choosing_cached(self, stage: LayerCall) -> MatmulCost:
        """Return the products with all keys by which a generated token chooses visual tokens."""
        before = self.engine.weight_cache.layer(stage.layer.index - 1)
        each = stage.samples * len(before.heads.kept) * before.view.head_dim
        return MatmulCost("method", each * (sum(stage.rows) + 1))

    def layers(self, inputs: ModelInputs) -> list[VisualLayer]:
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

    def tower_rows(self, inputs: ModelInputs) -> tuple[int, ...] | None:
        """Return the rows of an image in each layer of the vision tower; None if all stay."""
        if self.engine.tower_rows is None:
            return None
        with torch.no_grad():
            self.engine.last_logits(inputs)
        return self.engine.tower_rows

    def _stages(self, inputs: ModelInputs) -> Iterator[LayerCall]:
        """Yield every layer with its rows, in the order of `VisualEngine._through_layers`."""
        engine, plan = self.engine, self.engine.plan
        tokens = locate_visual_tokens(engine.network, inputs)
        ids_BS: Tensor = inputs["input_ids"]
        text, visual = split_rows(ids_BS[..., None], tokens, inputs.get("attention_mask"))
        if tokens is None or visual is None:
            return
        # Angles and DeepStack rows affect no count, so zero-width tensors replace them.
        nothing = torch.zeros(*visual.index_BR.shape, 0, device=ids_BS.device)
        here = all_visual_tokens(tokens, visual, (nothing, nothing), [])
        initial_counts = Frames.of(here.cells).counts
        look = partial(
            attention_masks, window=plan.window, past=None, offset=0, attention=tokens.attention
        )
        masks = look(text, here.rows, here.cells)
        waiting, left = list(plan.steps), iter(self._counts_left(inputs))
        explicit = False
        for layer in engine.decoder.layers:
            chosen: list[MatmulCost] = []
            while waiting and waiting[0].after <= layer.index < plan.cut:
                step = waiting.pop(0)
                sizes = selection_sizes(
                    engine, step, text, here, initial_counts, tokens.separator_BS
                )
                counted = next(left, None)
                if step.adaptive and counted is not None:
                    sizes = replace(sizes, kept=counted)
                chosen += _choosing(step, sizes)
                here = _after_selection(step, here, initial_counts, counted)
                explicit |= step.weighs
                masks = look(text, here.rows, here.cells, explicit=explicit)
            ready = engine.weight_cache.layer(layer.index)
            yield LayerCall(layer, ready, text, here, masks, tuple(chosen))

    @torch.no_grad()
    def _counts_left(self, inputs: ModelInputs) -> list[tuple[int, ...]]:
        """Return the tokens of each frame after each step if they depend on the image, or []."""
        adaptive = any(step.adaptive for step in self.engine.plan.steps)
        # Inside the tower, the layer at which patches are removed depends on the image, although
        # their number does not.
        if not adaptive and self.engine.tower_rows is None:
            return []
        self.engine.last_logits(inputs)
        return self.engine.tokens_left()

    def _text_rows(self, layer: DecoderLayer, rows: int) -> list[MatmulCost]:
        """Return the matmuls of the linear layers for text rows."""
        own = MatmulCost("rows", rows * matrix_weights(layer.attention))
        return [own, *feed_forward_costs(layer.feed_forward, rows, "text", self._top_k)]

    def _layer(self, stage: LayerCall) -> Iterator[MatmulCost]:
        """Yield attention of text rows and all matmuls of visual rows in one layer."""
        cut, index = self.engine.plan.cut, stage.layer.index
        if index >= cut:
            yield _text_to_text(stage, stage.weights.view.heads)
            return
        last = index == cut - 1
        yield from self._visual_rows(stage, last=last)
        kept, dropped = self._kept(stage), len(stage.weights.heads.dropped)
        if not kept:
            yield _text_to_text(stage, stage.weights.view.heads)
        # The branches mirror `two_stream_layer` and `_attend_streams`: keep them in step.
        elif stage.masks.order is not None and not last:
            yield from _joint(stage, kept)
        else:
            yield _text_to_all(stage, kept)
            if not last:
                yield from _visual_blocks(stage, kept)
        if kept and dropped:
            yield _text_to_text(stage, dropped)
        if not last and self.engine.plan.dropped_heads == "text_only" and dropped:
            yield _visual_to_text(stage, dropped)

    def _visual_rows(self, stage: LayerCall, *, last: bool) -> Iterator[MatmulCost]:
        """Yield the matmuls of the linear layers for visual rows; if `last`, of keys and values."""
        ready, rows = stage.weights, stage.samples * stage.visual.rows.count
        yield MatmulCost("rows", rows * total_numel(ready.k.weight, ready.v.weight), "visual")
        if last:
            return
        yield MatmulCost("rows", rows * total_numel(ready.q.weight, ready.o.weight), "visual")
        if isinstance(ready.feed_forward, GatedSlice):
            view = ready.feed_forward.view
            yield MatmulCost("rows", rows * total_numel(view.gate, view.up, view.down), "visual")
        else:
            yield from feed_forward_costs(ready.feed_forward, rows, "visual", self._top_k)

    def _kept(self, stage: LayerCall) -> int:
        """Return the number of heads that attend to visual tokens in a layer."""
        return len(stage.weights.heads.kept) if stage.layer.index < self.engine.plan.cut else 0

    @property
    def _top_k(self) -> int | None:
        return cast(int | None, getattr(self.engine.decoder.config, "num_experts_per_tok", None))


def _choosing(step: TokenPruningStep, sizes: SelectionSizes) -> list[MatmulCost]:
    """Return the cost of the choice, if the method reports it and tokens are removed."""
    if step.macs is None or (sizes.kept == sizes.counts and not step.adaptive):
        return []
    return [MatmulCost("method", step.macs(sizes), "visual")]


def _after_selection(
    step: TokenPruningStep,
    here: VisualTokensState,
    initial_counts: tuple[int, ...],
    counted: tuple[int, ...] | None,
) -> VisualTokensState:
    """Return the state after a pruning step that keeps the first tokens of each frame.

    `counted` is the number of tokens that each frame had left when the prompt was run, or None.
    """
    frames = Frames.of(here.cells)
    left = counted or [
        step.quota.left(n, m) if step.quota.kept(n, m) < m else m
        for n, m in zip(initial_counts, frames.counts, strict=True)
    ]
    place_M = torch.arange(max(frames.counts), device=frames.valid_IM.device)
    keep_IM = place_M < torch.tensor(left, device=place_M.device)[:, None]
    return here.subset(rows_where(frames.unpack(keep_IM)))


def _pair_macs(stage: LayerCall) -> int:
    """Return the multiply-adds per query-key pair in one head, for q·k and weight·v."""
    return 2 * stage.weights.view.head_dim


def _unmasked_pairs(mask: Tensor | None, samples: int, pairs: int) -> float:
    """Count the pairs that a mask allows, over all samples."""
    if mask is None:
        return float(pairs)
    # A mask may have one row for the whole batch.
    return float(mask.sum()) * samples / mask.shape[0]


def _text_to_text(stage: LayerCall, heads: int) -> MatmulCost:
    batch, (text, _) = stage.samples, stage.rows
    pairs = batch * text * text
    causal = batch * text * (text + 1) / 2
    seen = causal if stage.masks.causal else _unmasked_pairs(stage.masks.text_BTK, batch, pairs)
    return attention_cost("text", heads * pairs, heads * seen, _pair_macs(stage))


def _text_to_all(stage: LayerCall, heads: int) -> MatmulCost:
    """Return the attention of text rows over visual and text keys under a mask."""
    batch, (text, visual) = stage.samples, stage.rows
    pairs = batch * text * (text + visual)
    seen = _unmasked_pairs(stage.masks.mixed_BTK, batch, pairs)
    return attention_cost("text", heads * pairs, heads * seen, _pair_macs(stage))


def _joint(stage: LayerCall, heads: int) -> Iterator[MatmulCost]:
    """Yield the attention of both streams over all keys, in causal order without a mask."""
    batch, (text, visual) = stage.samples, stage.rows
    order = cast(Tensor, stage.masks.order)
    # In causal order a row attends to all rows before it and to itself.
    rank = order.argsort() + 1
    parts: tuple[tuple[TokenKind, int, Tensor], ...] = (
        ("text", text, rank[:text]),
        ("visual", visual, rank[text:]),
    )
    for rows, count, keys in parts:
        pairs = heads * batch * count * (text + visual)
        yield attention_cost(rows, pairs, heads * batch * float(keys.sum()), _pair_macs(stage))


def _visual_blocks(stage: LayerCall, heads: int) -> Iterator[MatmulCost]:
    """Yield the attention of visual rows over the keys of their blocks."""
    for block in stage.masks.blocks:
        samples = stage.samples if block.samples == ALL else 1
        queries, keys = block.mask.shape[-2:]
        pairs = samples * queries * keys
        seen = _unmasked_pairs(block.mask, samples, pairs)
        yield attention_cost("visual", heads * pairs, heads * seen, _pair_macs(stage))


def _visual_to_text(stage: LayerCall, heads: int) -> MatmulCost:
    """Return the attention of visual rows to text in dropped heads (`dropped_heads=text_only`).

    Rows before all text attend to all of it and are discarded, as in `text_only_attention`.
    """
    batch, (text, visual) = stage.samples, stage.rows
    pairs = batch * visual * text
    before = cast(Tensor, stage.masks.before_BNK)
    seen = _unmasked_pairs(before | ~before.any(dim=-1, keepdim=True), batch, pairs)
    return attention_cost("visual", heads * pairs, heads * seen, _pair_macs(stage))


def decoder_shape(engine: VisualEngine) -> DecoderShape:
    """Return the sizes of the network's decoder."""
    view = engine.decoder.layers[0].attention_view()
    return DecoderShape(
        d_model=view.q.weight.shape[1],
        heads=view.heads,
        groups=view.groups,
        head_dim=view.head_dim,
        widths=tuple(_neurons_met(layer) for layer in engine.decoder.layers),
    )


def layer_costs(engine: VisualEngine) -> list[LayerCost]:
    """Return each layer's remaining work for visual rows under the engine's plan."""
    plan, work = engine.plan, []
    for layer, settings in zip(engine.decoder.layers, plan.layers, strict=True):
        full = _layer_cost(engine, layer, settings, everywhere=plan.dropped_heads == "text_only")
        if layer.index >= plan.cut:
            work.append(LayerCost.none())
        else:
            work.append(last_visual_layer(full) if layer.index == plan.cut - 1 else full)
    return work


def token_stages(engine: VisualEngine, n: int) -> list[dict[str, int]]:
    """Return the tokens of a frame of n per run of layers: first (inclusive), until (exclusive)."""
    plan, stages = engine.plan, list[dict[str, int]]()
    for layer in range(len(plan.layers)):
        quotas = [step.quota for step in plan.reaching(layer)]
        tokens = tokens_left(quotas, n) if layer < plan.cut else 0
        if stages and stages[-1]["tokens"] == tokens:
            stages[-1]["until"] = layer + 1
        else:
            stages.append({"first": layer, "until": layer + 1, "tokens": tokens})
    return stages


def average_tokens(stages: list[dict[str, int]]) -> float:
    """Return the mean number of tokens of a frame over all layers."""
    tokens = sum((stage["until"] - stage["first"]) * stage["tokens"] for stage in stages)
    return tokens / stages[-1]["until"]


def _layer_cost(
    engine: VisualEngine, layer: DecoderLayer, plan: LayerPlan, *, everywhere: bool
) -> LayerCost:
    """Return one layer's work; with `everywhere`, dropped heads have queries too."""
    view = layer.attention_view()
    heads = range(view.heads) if plan.heads is None else plan.heads
    per_group = view.heads // view.groups
    return LayerCost(
        heads=len(heads),
        groups=len({head // per_group for head in heads}),
        queries=view.heads if everywhere else len(heads),
        neurons=_visual_neurons_met(engine, layer),
        quotas=tuple(step.quota for step in engine.plan.reaching(layer.index)),
    )


def _visual_neurons_met(engine: VisualEngine, layer: DecoderLayer) -> float:
    """Return the number of neurons that process one visual row; for experts the mean."""
    places = engine.weight_cache.places(layer)
    return (
        _neurons_met(layer)
        if places is None
        else _active_width(layer.moe, [len(unit) for unit in places])
    )


def _neurons_met(layer: DecoderLayer) -> float:
    """Return the number of neurons that process one text row."""
    return _active_width(layer.moe, [unit.width for unit in layer.units()])


def _active_width(moe: MoEBlock | None, widths: list[int]) -> float:
    """Return the width of a dense layer, or of top-k average experts plus the shared ones."""
    if moe is None:
        return widths[0]
    # Experts may differ in width after pruning. With uniform routing, which is assumed, a token
    # gets top-k experts of mean width.
    routed = widths[: moe.num_experts]
    return moe.top_k * sum(routed) / len(routed) + sum(widths[moe.num_experts :])


def selection_sizes(
    engine: VisualEngine,
    step: TokenPruningStep,
    text: TokenRows,
    here: VisualTokensState,
    initial_counts: tuple[int, ...],
    separator_BS: Tensor | None = None,
) -> SelectionSizes:
    """Return the sizes before a pruning step; `initial_counts` are tokens before any pruning."""
    frames = Frames.of(here.cells)
    counts, samples = frames.counts, here.rows.index_BR.shape[0]
    entered_B = torch.zeros(samples, dtype=torch.int64)
    entered_B.index_add_(0, frames.sample_I.cpu(), torch.tensor(initial_counts))
    # A step before the decoder has no preceding layer, but it reads no attention either; layer 0 is
    # a placeholder.
    weights_before = engine.weight_cache.layer(max(step.after - 1, 0))
    return SelectionSizes(
        counts=counts,
        kept=tuple(step.quota.kept(n, m) for n, m in zip(initial_counts, counts, strict=True)),
        samples=samples,
        keys=text.count + here.rows.count,
        text=text.count,
        question_rows=int(rows_after_images(text, here.rows, separator_BS).sum(dim=1).max()),
        input_visual_rows=int(entered_B.max()),
        heads=len(weights_before.heads.kept),
        query_heads=weights_before.view.heads,
        groups=weights_before.view.groups,
        head_dim=weights_before.view.head_dim,
        width=int(engine.decoder.config.hidden_size),
        tower=None if engine.tower is None else engine.tower.sizes(initial_counts),
    )
