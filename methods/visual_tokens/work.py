"""Decoder shapes and per-layer costs, derived from a network and its plan."""

from __future__ import annotations

from bench.models.anatomy import MoEBlock
from bench.models.multimodal import DecoderLayer
from methods.visual_tokens.cost import LayerWork, Shape, last_visual
from methods.visual_tokens.engine import Engine
from methods.visual_tokens.plan import LayerPlan
from methods.visual_tokens.quota import left_after


def shape_of(engine: Engine) -> Shape:
    """Return the sizes of the network's decoder."""
    view = engine.decoder.layers[0].attention_view()
    return Shape(
        d_model=view.q.weight.shape[1],
        heads=view.heads,
        groups=view.groups,
        head_dim=view.head_dim,
        widths=tuple(_width(layer) for layer in engine.decoder.layers),
    )


def work_of(engine: Engine) -> list[LayerWork]:
    """Return each layer's remaining work for visual rows under the engine's plan."""
    plan, work = engine.plan, []
    for layer, settings in zip(engine.decoder.layers, plan.layers, strict=True):
        full = _layer(engine, layer, settings, everywhere=plan.dropped == "text")
        if layer.index >= plan.cut:
            work.append(LayerWork.none())
        else:
            work.append(last_visual(full) if layer.index == plan.cut - 1 else full)
    return work


def stages_of(engine: Engine, n: int) -> list[dict[str, int]]:
    """Return the tokens of a frame of n by runs of layers, each with first, until and tokens."""
    plan, stages = engine.plan, list[dict[str, int]]()
    for layer in range(len(plan.layers)):
        quotas = [selection.quota for selection in plan.reaching(layer)]
        tokens = left_after(quotas, n) if layer < plan.cut else 0
        if stages and stages[-1]["tokens"] == tokens:
            stages[-1]["until"] = layer + 1
        else:
            stages.append({"first": layer, "until": layer + 1, "tokens": tokens})
    return stages


def average_tokens(stages: list[dict[str, int]]) -> float:
    """Return the mean number of tokens of a frame over all layers."""
    tokens = sum((stage["until"] - stage["first"]) * stage["tokens"] for stage in stages)
    return tokens / stages[-1]["until"]


def _layer(engine: Engine, layer: DecoderLayer, plan: LayerPlan, *, everywhere: bool) -> LayerWork:
    """Return one layer's work; with `everywhere`, dropped heads still have queries."""
    view = layer.attention_view()
    heads = range(view.heads) if plan.heads is None else plan.heads
    per_group = view.heads // view.groups
    return LayerWork(
        heads=len(heads),
        groups=len({head // per_group for head in heads}),
        queries=view.heads if everywhere else len(heads),
        neurons=_neurons(engine, layer),
        quotas=tuple(selection.quota for selection in engine.plan.reaching(layer.index)),
    )


def _neurons(engine: Engine, layer: DecoderLayer) -> float:
    """Return the neurons one visual row is multiplied with, for experts the mean over routed."""
    places = engine.prepared.places(layer)
    return _width(layer) if places is None else _met(layer.moe, [len(unit) for unit in places])


def _width(layer: DecoderLayer) -> float:
    """Return the neurons that one text row is multiplied with."""
    return _met(layer.moe, [unit.width for unit in layer.units()])


def _met(moe: MoEBlock | None, widths: list[int]) -> float:
    """Return the neurons of a dense layer, or of top-k average experts and the shared ones."""
    if moe is None:
        return widths[0]
    # Experts may differ in width after pruning; uniform routing is assumed, so a token meets the
    # mean width top-k times.
    routed = widths[: moe.num_experts]
    return moe.top_k * sum(routed) / len(routed) + sum(widths[moe.num_experts :])
