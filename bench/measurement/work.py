"""The FLOPs of a model as rows of a record: counted and by arithmetic, each with its parts.

`flops` charges attention in full, `flops_causal` without the pairs that masks hide; `macs` are
half of either. Rows of one scope and quantity differ in `how`. What could not be had is a row of
its own, `flops_gaps`, whose parts name it, never a zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from bench.errors import UserError
from bench.measurement import analytic, prefill
from bench.measurement.analytic.decoder import text_config
from bench.measurement.analytic.multimodal import visual_layers
from bench.measurement.config import CostsConfig
from bench.measurement.conventions import CONVENTIONS, Decoder, Name
from bench.measurement.cost import Cost
from bench.measurement.counting import Counted
from bench.measurement.flops import (
    count_images,
    count_text,
    image_parts,
    language_parts,
    multimodal_parts,
)
from bench.models.multimodal.planned import plan_of
from bench.models.products import Product, by_part
from bench.models.vision import Classifier

if TYPE_CHECKING:
    from bench.models.model import Model

Parts = Callable[[Counted], Mapping[str, float]]


def flops(model: Model, config: CostsConfig) -> list[Cost]:
    """Return all FLOP rows of a model as it is now, at a config's shapes."""
    kinds = {"causal_lm": _language, "image_text": _multimodal, "image_classifier": _images}
    return kinds[model.config.kind](model, config)


def _language(model: Model, config: CostsConfig) -> list[Cost]:
    """Count text that is scored, and the token that would follow it."""
    batch, length = config.batch, config.length
    scored, after = f"forward {batch}x{length}", f"token after {batch}x{length}"
    network, anatomy = model.network, model.anatomy
    try:
        counted = count_text(network, batch, length)
    except UserError as reason:
        rows = [_gap(scope, (str(reason),), "counted") for scope in (scored, after)]
    else:
        pairs = zip((scored, after), counted, strict=True)
        rows = [row for scope, found in pairs for row in _counted(scope, found, language_parts)]
    return [
        *rows,
        *_analytic(scored, lambda: analytic.forward(network, anatomy, batch, length)),
        *_analytic(after, lambda: analytic.token(network, anatomy, batch, length)),
        *_no_convention(scored, config),
    ]


def _images(model: Model, config: CostsConfig) -> list[Cost]:
    """Count images of the size that a classifier is built for."""
    network = cast(Classifier, model.network)
    shape = network.config
    scope = f"forward {config.batch}x{shape.channels}x{shape.size}x{shape.size}"
    return [
        *_counted(scope, count_images(network, config.batch), image_parts, attends=False),
        *_analytic(scope, lambda: analytic.images(network, config.batch)),
        *_no_convention(scope, config),
    ]


def _multimodal(model: Model, config: CostsConfig) -> list[Cost]:
    """Count a prompt with an image, and the token that is generated after it."""
    inputs = prefill.prompt(model, config.words)
    lengths = prefill.lengths(model, inputs)
    prompt, token = prefill.count(model, inputs)
    scope, after = lengths.scope, lengths.token_scope
    network, anatomy = model.network, model.anatomy
    rows = [
        *_counted(scope, prompt, multimodal_parts),
        *_analytic(scope, lambda: analytic.prefill(network, anatomy, inputs)),
        *_counted(after, token, multimodal_parts),
        *_analytic(after, lambda: analytic.token_after(network, anatomy, inputs)),
    ]
    plan = plan_of(network)
    if plan is not None and plan.untold:
        rows.append(_gap(scope, plan.untold, "analytic"))
    if config.flops.convention is not None:
        rows.append(convention(config.flops.convention, model, inputs, lengths))
    return rows


def convention(name: Name, model: Model, inputs: dict[str, Any], lengths: prefill.Lengths) -> Cost:
    """Return a prompt's FLOPs as a paper counts them."""
    text = text_config(model.network)
    layers = visual_layers(model.network, model.anatomy, inputs)
    decoder = Decoder(text.hidden_size, text.intermediate_size, lengths.text, layers)
    return Cost(lengths.scope, f"flops_{name}", "FLOP", CONVENTIONS[name](decoder), "analytic")


def _no_convention(scope: str, config: CostsConfig) -> list[Cost]:
    """Return a gap where a paper's count was asked for that is of prompts with images only."""
    name = config.flops.convention
    return (
        [] if name is None else [_gap(scope, (f"{name} counts prompts with images",), "analytic")]
    )


def _counted(scope: str, counted: Counted, parts: Parts, *, attends: bool = True) -> list[Cost]:
    """Return what the dispatcher counted; only a gap where an operator has no formula."""
    if counted.missed:
        return [_gap(scope, counted.missed, "counted")]
    found = {name: float(value) for name, value in parts(counted).items()}
    rows = _both(scope, "", float(counted.total), "counted", found)
    if counted.causal is None or (attends and not counted.attentions):
        return [*rows, _gap(scope, ("masks that the counter does not see",), "counted")]
    return [*rows, *_both(scope, "_causal", float(counted.causal), "counted")]


def _analytic(scope: str, reckon: Callable[[], list[Product]]) -> list[Cost]:
    """Return what arithmetic gives; only a gap where a network's arithmetic is not known."""
    try:
        products = reckon()
    except UserError as reason:
        return [_gap(scope, (str(reason),), "analytic")]
    rows: list[Cost] = []
    for suffix, hidden in (("", True), ("_causal", False)):
        parts = {name: 2 * macs for name, macs in by_part(products, hidden=hidden).items()}
        rows += _both(scope, suffix, sum(parts.values()), "analytic", parts)
    visual = [p for p in products if p.rows == "visual" and p.part not in ("vision", "projector")]
    if visual:
        parts = {p: 2 * macs for p, macs in by_part(visual).items()}
        rows.append(Cost(scope, "visual_flops", "FLOP", sum(parts.values()), "analytic", parts))
    return rows


def _both(
    scope: str, suffix: str, value: float, how: Any, parts: dict[str, float] | None = None
) -> list[Cost]:
    """Return a number as FLOPs, with its parts, and as multiply-adds."""
    return [
        Cost(scope, f"flops{suffix}", "FLOP", value, how, parts or {}),
        Cost(scope, f"macs{suffix}", "MAC", value / 2, how),
    ]


def _gap(scope: str, names: tuple[str, ...], how: Any) -> Cost:
    """Return a row that says what is missing in another."""
    return Cost(scope, "flops_gaps", "1", len(names), how, dict.fromkeys(names, 1.0))
