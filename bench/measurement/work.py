"""FLOPs of a model as entries of a record: counted and analytic, each with its parts.

`flops` charges attention in full, `flops_causal` without masked pairs; `macs` is half of either.
Entries of one scope and quantity differ in `how`. A number that cannot be obtained is recorded as
missing, never as zero.
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
    """Yield the FLOPs of a language model or an image classifier in its current state."""
    kinds = {"causal_lm": _language, "image_classifier": _images}
    return kinds[model.config.kind](model, config)


def flops_of_prompt(model: Model, config: CostsConfig, inputs: dict[str, Any]) -> Rows:
    """Yield the FLOPs of a prompt with an image, and of the token generated after it.

    `inputs` are those of `prefill.prompt`.
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
    # A count sees the multiply-adds of a method's own selection; the analytic total lacks them
    # unless the method states them, and must not pass for complete.
    for name in plan.untold if plan else ():
        reason = f"{name} does not report the FLOPs of its selection"
        yield Gap(scope, "method_flops", reason, "analytic")
    if config.flops.convention is not None:
        yield convention(config.flops.convention, model, inputs, lengths)


def _language(model: Model, config: CostsConfig) -> Rows:
    batch, length = config.batch, config.length
    scored, after = f"forward {batch}x{length}", f"token after {batch}x{length}"
    network, anatomy = model.network, model.anatomy
    if length > model.max_length:
        reason = f"{model.name} supports {model.max_length} positions; costs.length={length}"
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
    network = cast(Classifier, model.network)
    shape = network.config
    scope = f"forward {config.batch}x{shape.channels}x{shape.size}x{shape.size}"
    yield from _counted(scope, count_images(network, config.batch), image_parts, attends=False)
    yield from _analytic(scope, lambda: analytic.images(network, config.batch))
    yield from _no_convention(scope, config)


def convention(name: Name, model: Model, inputs: dict[str, Any], lengths: prefill.Lengths) -> Cost:
    """Return the FLOPs of a prompt by a paper's convention."""
    text = text_config(model.network)
    layers = visual_layers(model.network, model.anatomy, inputs)
    decoder = Decoder(text.hidden_size, text.intermediate_size, lengths.text, layers)
    return Cost(lengths.scope, f"flops_{name}", "FLOP", CONVENTIONS[name](decoder), "analytic")


def _no_convention(scope: str, config: CostsConfig) -> Rows:
    """Report a missing value if a FLOP convention is requested: they cover image prompts only."""
    name = config.flops.convention
    if name is not None:
        yield Gap(scope, f"flops_{name}", f"{name} covers prompts with images only", "analytic")


def _counted(scope: str, counted: Counted, parts: Parts, *, attends: bool = True) -> Rows:
    """Yield the counted FLOPs, or a missing measurement if an operator has no formula."""
    if counted.missed:
        yield Gap(scope, "flops", f"no formula for {', '.join(counted.missed)}", "counted")
        return
    found = {name: float(value) for name, value in parts(counted).items()}
    yield from _both(scope, "", float(counted.total), "counted", found)
    # Masks are observed only at PyTorch's attention function. A decoder that never called it
    # (eager attention) may have masked pairs that were not observed: its causal count is unknown.
    if counted.causal is None or (attends and not counted.attentions):
        yield Gap(scope, "flops_causal", "the counter cannot observe the masks", "counted")
        return
    yield from _both(scope, "_causal", float(counted.causal), "counted")


def _analytic(scope: str, reckon: Callable[[], list[Product]]) -> Rows:
    """Yield the analytic FLOPs, or a missing measurement if a part has no formula."""
    try:
        products = reckon()
    except UserError as reason:
        yield Gap(scope, "flops", str(reason), "analytic")
        return
    for suffix, hidden in (("", True), ("_causal", False)):
        parts = {name: 2 * macs for name, macs in by_part(products, hidden=hidden).items()}
        yield from _both(scope, suffix, sum(parts.values()), "analytic", parts)
    # Tower and projector work on visual rows by nature. `visual_flops` is the decoder's share for
    # visual tokens, the part that visual-token methods reduce.
    visual = [p for p in products if p.rows == "visual" and p.part not in ("vision", "projector")]
    if visual:
        parts = {p: 2 * macs for p, macs in by_part(visual).items()}
        yield Cost(scope, "visual_flops", "FLOP", sum(parts.values()), "analytic", parts)


def _both(
    scope: str, suffix: str, value: float, how: How, parts: dict[str, float] | None = None
) -> Rows:
    """Yield a number as FLOPs, with its parts, and as multiply-adds."""
    # Papers report either unit under the name FLOPs; recording both makes a mix-up visible.
    yield Cost(scope, f"flops{suffix}", "FLOP", value, how, parts or {})
    yield Cost(scope, f"macs{suffix}", "MAC", value / 2, how)
