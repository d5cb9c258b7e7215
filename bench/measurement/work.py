"""The FLOPs of a model as rows of a record: counted and by arithmetic, each with its parts.

`flops` charges attention in full, `flops_causal` without the pairs that masks hide; `macs` are
half of either. Rows of one scope and quantity differ in `how`. What could not be had is a `Gap`,
never a zero.
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
from bench.measurement.gap import Gap
from bench.measurement.rows import Rows
from bench.models.multimodal.planned import plan_of
from bench.models.products import Product, by_part
from bench.models.vision import Classifier
from bench.records.record import How

if TYPE_CHECKING:
    from bench.models.model import Model

Parts = Callable[[Counted], Mapping[str, float]]


def flops(model: Model, config: CostsConfig) -> Rows:
    """Yield the FLOP rows of a language model or an image classifier as it is now."""
    kinds = {"causal_lm": _language, "image_classifier": _images}
    return kinds[model.config.kind](model, config)


def flops_of_prompt(model: Model, config: CostsConfig, inputs: dict[str, Any]) -> Rows:
    """Yield the rows of a prompt with an image, and of the token that is generated after it.

    `inputs` are as `prefill.prompt` makes them.
    """
    lengths = prefill.lengths(model, inputs)
    prompt, token = prefill.count(model, inputs)
    scope, after = lengths.scope, lengths.token_scope
    network, anatomy = model.network, model.anatomy
    yield from _counted(scope, prompt, multimodal_parts)
    yield from _analytic(scope, lambda: analytic.prefill(network, anatomy, inputs))
    yield from _counted(after, token, multimodal_parts)
    yield from _analytic(after, lambda: analytic.token_after(network, anatomy, inputs))
    plan = plan_of(network)
    for name in plan.untold if plan else ():
        reason = f"{name} does not say what choosing multiplies"
        yield Gap(scope, "method_flops", reason, "analytic")
    if config.flops.convention is not None:
        yield convention(config.flops.convention, model, inputs, lengths)


def _language(model: Model, config: CostsConfig) -> Rows:
    """Count text that is scored, and the token that would follow it."""
    batch, length = config.batch, config.length
    scored, after = f"forward {batch}x{length}", f"token after {batch}x{length}"
    network, anatomy = model.network, model.anatomy
    if length > model.max_length:
        reason = f"{model.name} takes {model.max_length} positions, not {length}"
        yield from (Gap(scope, "flops", reason) for scope in (scored, after))
        return
    try:
        counted = count_text(network, batch, length)
    except UserError as reason:
        for scope in (scored, after):
            yield Gap(scope, "flops", str(reason), "counted")
    else:
        for scope, found in zip((scored, after), counted, strict=True):
            yield from _counted(scope, found, language_parts)
    yield from _analytic(scored, lambda: analytic.forward(network, anatomy, batch, length))
    yield from _analytic(after, lambda: analytic.token(network, anatomy, batch, length))
    yield from _no_convention(scored, config)


def _images(model: Model, config: CostsConfig) -> Rows:
    """Count images of the size that a classifier is built for."""
    network = cast(Classifier, model.network)
    shape = network.config
    scope = f"forward {config.batch}x{shape.channels}x{shape.size}x{shape.size}"
    yield from _counted(scope, count_images(network, config.batch), image_parts, attends=False)
    yield from _analytic(scope, lambda: analytic.images(network, config.batch))
    yield from _no_convention(scope, config)


def convention(name: Name, model: Model, inputs: dict[str, Any], lengths: prefill.Lengths) -> Cost:
    """Return a prompt's FLOPs as a paper counts them."""
    text = text_config(model.network)
    layers = visual_layers(model.network, model.anatomy, inputs)
    decoder = Decoder(text.hidden_size, text.intermediate_size, lengths.text, layers)
    return Cost(lengths.scope, f"flops_{name}", "FLOP", CONVENTIONS[name](decoder), "analytic")


def _no_convention(scope: str, config: CostsConfig) -> Rows:
    """Yield a gap where a paper's count was asked for that is of prompts with images only."""
    name = config.flops.convention
    if name is not None:
        yield Gap(scope, f"flops_{name}", f"{name} counts prompts with images", "analytic")


def _counted(scope: str, counted: Counted, parts: Parts, *, attends: bool = True) -> Rows:
    """Yield what the dispatcher counted; only a gap where an operator has no formula."""
    if counted.missed:
        yield Gap(scope, "flops", f"no formula for {', '.join(counted.missed)}", "counted")
        return
    found = {name: float(value) for name, value in parts(counted).items()}
    yield from _both(scope, "", float(counted.total), "counted", found)
    if counted.causal is None or (attends and not counted.attentions):
        yield Gap(scope, "flops_causal", "masks that the counter does not see", "counted")
        return
    yield from _both(scope, "_causal", float(counted.causal), "counted")


def _analytic(scope: str, reckon: Callable[[], list[Product]]) -> Rows:
    """Yield what arithmetic gives; only a gap where a network's arithmetic is not known."""
    try:
        products = reckon()
    except UserError as reason:
        yield Gap(scope, "flops", str(reason), "analytic")
        return
    for suffix, hidden in (("", True), ("_causal", False)):
        parts = {name: 2 * macs for name, macs in by_part(products, hidden=hidden).items()}
        yield from _both(scope, suffix, sum(parts.values()), "analytic", parts)
    visual = [p for p in products if p.rows == "visual" and p.part not in ("vision", "projector")]
    if visual:
        parts = {p: 2 * macs for p, macs in by_part(visual).items()}
        yield Cost(scope, "visual_flops", "FLOP", sum(parts.values()), "analytic", parts)


def _both(
    scope: str, suffix: str, value: float, how: How, parts: dict[str, float] | None = None
) -> Rows:
    """Yield a number as FLOPs, with its parts, and as multiply-adds."""
    yield Cost(scope, f"flops{suffix}", "FLOP", value, how, parts or {})
    yield Cost(scope, f"macs{suffix}", "MAC", value / 2, how)
