"""FLOPs of a model as costs of a record: counted and analytic, each with its parts.

One multiply-add is two FLOPs. `flops` counts attention in full, including masked pairs, because the
kernel is called with them; `flops_causal` leaves them out; `macs` is half of either. Costs of one
scope and quantity differ in `how`: `counted` on the meta device or during a real run, `analytic`
from shapes. A number that cannot be obtained is recorded as missing, never as zero.

Shapes: B sequences or images, L tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bench.data.chat import ModelInputs
from bench.errors import UserError
from bench.measurement import image_prompt
from bench.measurement.flops import analytic, analytic_vlm
from bench.measurement.flops.analytic import ATTENTION_NAMES, FEED_FORWARD_NAMES
from bench.measurement.flops.analytic_vlm import visual_layers
from bench.measurement.flops.conventions import CONVENTION_UNITS, CONVENTIONS, ConventionInputs
from bench.measurement.flops.counter import (
    CountedFlops,
    count_flops,
    meta_forward,
    on_meta_device,
)
from bench.measurement.model_size import parameter_dtype
from bench.measurement.quantities import Measurements
from bench.models.classifiers.classifier import Classifier
from bench.models.macs import (
    MatmulCost,
    flops_provider_of,
    macs_by_part,
    number_of_unlike_experts,
)
from bench.models.network import text_config
from bench.records.record import Cost, How, MissingMeasurement
from bench.schema import CostsConfig, FlopsConvention

if TYPE_CHECKING:
    from bench.models.model import Model

VISION_NAMES = ("vision_tower", "visual", "vision_model")

# Qwen's mergers, which replace a projector, are submodules of the vision tower.
PROJECTOR_NAMES = ("multi_modal_projector", "merger", "deepstack_merger_list", "connector")
HEAD_NAMES = ("lm_head",)


def count_text_flops(
    network: nn.Module, batch: int, length: int
) -> tuple[CountedFlops, CountedFlops]:
    """Count a forward over `batch` sequences of `length` tokens, and the token after it.

    The first forward computes logits for all tokens, as in scoring; the second one uses the KV
    cache of the first. Routing is balanced: every expert gets the same number of tokens. If that is
    not an integer, as for one token with 2 of 8 experts, the count is a mean.

    Raises:
        UserError: the network cannot run on the meta device; see `meta_forward`.
    """
    copies = _copies_for_even_routing(network)

    def count(call: Callable[..., Any]) -> tuple[CountedFlops, CountedFlops]:
        with count_flops() as text:
            prompt = call(input_ids=_meta_ids(copies * batch, length), use_cache=True)
        with count_flops() as token:
            past = prompt.past_key_values
            call(input_ids=_meta_ids(copies * batch, 1), past_key_values=past, use_cache=True)
        return text.per_copy(copies), token.per_copy(copies)

    return on_meta_device(network, count)


def count_forward_flops(network: nn.Module, batch: int, length: int) -> CountedFlops:
    """Count only the first of the two calls of `count_text_flops`, in half the time."""
    copies = _copies_for_even_routing(network)

    def count(call: Callable[..., Any]) -> CountedFlops:
        with count_flops() as text:
            call(input_ids=_meta_ids(copies * batch, length), use_cache=True)
        return text.per_copy(copies)

    return on_meta_device(network, count)


def _meta_ids(rows: int, length: int) -> Tensor:
    return torch.zeros(rows, length, dtype=torch.long, device="meta")


def _copies_for_even_routing(network: nn.Module) -> int:
    """Return the number of copies of any inputs that use all experts of every block equally.

    It is 1 if the experts of each block are alike, so that it does not matter which ones are used.
    """
    # One token uses a few experts, which on the meta device would always be the same ones. Once
    # pruning has left experts of different widths, these do not have the mean width.
    counts = (number_of_unlike_experts(module) for module in network.modules())
    return math.lcm(*(count for count in counts if count))


def count_image_flops(network: Classifier, batch: int) -> CountedFlops:
    """Count one forward over `batch` images of the network's input size."""
    config = network.config
    shape = (batch, config.channels, config.size, config.size)

    def count(call: Callable[..., Any]) -> CountedFlops:
        with count_flops() as counted:
            call(torch.zeros(shape, dtype=torch.bfloat16, device="meta"))
        return counted

    return on_meta_device(network, count)


def count_call(model: Model, config: CostsConfig) -> CountedFlops:
    """Count one forward at the config's shapes, or the prefill of a prompt with an image.

    Raises:
        UserError: it cannot be counted.
    """
    if model.config.kind == "image_text":
        inputs = image_prompt.build_image_prompt(model, config.words)
        return image_prompt.count_prefill(model, inputs)[0]
    if model.config.kind == "image_classifier":
        return count_image_flops(cast(Classifier, model.network), config.batch)
    return count_forward_flops(model.network, config.batch, min(config.length, model.max_length))


def dtype_fault(model: Model) -> str | None:
    """Return why a forward fails on the dtypes of the weights, or None as far as is known.

    Of a vision-language model, the decoder is tried.
    """
    network = model.network
    try:
        with meta_forward(network, own_dtypes=True) as call:
            if model.config.kind == "image_classifier":
                config = cast(Classifier, network).config
                shape = (1, config.channels, config.size, config.size)
                call(torch.zeros(shape, dtype=parameter_dtype(network), device="meta"))
            else:
                call(input_ids=_meta_ids(1, 4), use_cache=False)
    except UserError as error:
        reason = str(error.__context__).partition("\n")[0]
        return reason if _ABOUT_DTYPES.search(reason) else None
    return None


_ABOUT_DTYPES = re.compile(r"dtype|scalar type|same type", re.IGNORECASE)


def language_parts(counted: CountedFlops) -> dict[str, int]:
    """Split FLOPs by module into attention, feed-forward, head and other."""
    parts = {
        "attention": counted.in_modules(*ATTENTION_NAMES),
        "feed_forward": counted.in_modules(*FEED_FORWARD_NAMES),
        "head": counted.in_modules(*HEAD_NAMES),
    }
    return {**parts, "other": counted.total - sum(parts.values())}


def multimodal_parts(counted: CountedFlops) -> dict[str, int]:
    """Split FLOPs into vision tower, projector, decoder and head.

    FLOPs of a method count as the decoder's, except if it runs the tower or the projector again.
    """
    # The decoder is the remainder, so the parts always add up to the total.
    projector, head = counted.in_modules(*PROJECTOR_NAMES), counted.in_modules(*HEAD_NAMES)
    vision = counted.in_modules(*VISION_NAMES) - counted.in_modules(
        *PROJECTOR_NAMES, within=VISION_NAMES
    )
    decoder = counted.total - vision - projector - head
    return {"vision": vision, "projector": projector, "decoder": decoder, "head": head}


def image_parts(counted: CountedFlops) -> dict[str, int]:
    """Split FLOPs by operator into convolutions, dense layers and other."""
    # By operator instead of by module, because classifier architectures name modules differently.
    kinds = counted.modules.get("Global", {})
    convolution = sum(flops for kind, flops in kinds.items() if "convolution" in str(kind))
    dense = sum(flops for kind, flops in kinds.items() if "mm" in str(kind))
    other = counted.total - convolution - dense
    return {"convolution": convolution, "dense": dense, "other": other}


PartsOfCount = Callable[[CountedFlops], Mapping[str, float]]


def flops_costs(model: Model, config: CostsConfig) -> Measurements:
    """Yield the FLOPs of a language model or an image classifier in its current state."""
    kinds = {"causal_lm": _text_flops_costs, "image_classifier": _image_flops_costs}
    return kinds[model.config.kind](model, config)


def prompt_flops_costs(model: Model, config: CostsConfig, inputs: ModelInputs) -> Measurements:
    """Yield the FLOPs of a prompt with an image, and of the token generated after it.

    `inputs` are those of `image_prompt.build_image_prompt`.
    """
    lengths = image_prompt.prompt_tokens(model, inputs)
    prompt, token = image_prompt.count_prefill(model, inputs)
    scope, after = lengths.scope, lengths.token_scope
    network, structure = model.network, model.structure
    yield from _counted_costs(scope, prompt, multimodal_parts)
    yield from _analytic_costs(
        scope, lambda: analytic_vlm.image_prompt_macs(network, structure, inputs)
    )
    yield from _counted_costs(after, token, multimodal_parts)
    yield from _analytic_costs(
        after, lambda: analytic_vlm.token_after_prompt_macs(network, structure, inputs)
    )
    plan = flops_provider_of(network)
    # A count includes the multiply-adds of a method's own selection. The analytic total includes
    # them only if the method reports them, and must not be taken for complete otherwise.
    for name in plan.unaccounted if plan else ():
        reason = f"{name} does not report the FLOPs of its selection"
        yield MissingMeasurement(
            scope=scope, quantity="method_flops", reason=reason, how="analytic"
        )
    if config.flops.convention is not None:
        yield convention_cost(config.flops.convention, model, inputs, lengths)


def _text_flops_costs(model: Model, config: CostsConfig) -> Measurements:
    batch, length = config.batch, config.length
    scored, after = f"forward {batch}x{length}", f"token after {batch}x{length}"
    network, structure = model.network, model.structure
    if length > model.max_length:
        reason = f"{model.name} supports {model.max_length} positions; costs.length={length}"
        yield from (
            MissingMeasurement(scope=scope, quantity="flops", reason=reason)
            for scope in (scored, after)
        )
        return
    try:
        counted = count_text_flops(network, batch, length)
    except UserError as reason:
        for scope in (scored, after):
            yield MissingMeasurement(
                scope=scope, quantity="flops", reason=str(reason), how="counted"
            )
    else:
        for scope, found in zip((scored, after), counted, strict=True):
            yield from _counted_costs(scope, found, language_parts)
    yield from _analytic_costs(
        scored, lambda: analytic.text_forward_macs(network, structure, batch, length)
    )
    yield from _analytic_costs(
        after, lambda: analytic.text_token_macs(network, structure, batch, length)
    )
    yield from _missing_convention(scored, config)


def _image_flops_costs(model: Model, config: CostsConfig) -> Measurements:
    network = cast(Classifier, model.network)
    shape = network.config
    scope = f"forward {config.batch}x{shape.channels}x{shape.size}x{shape.size}"
    yield from _counted_costs(
        scope, count_image_flops(network, config.batch), image_parts, attends=False
    )
    yield from _analytic_costs(scope, lambda: analytic.classifier_macs(network, config.batch))
    yield from _missing_convention(scope, config)


def convention_cost(
    name: FlopsConvention, model: Model, inputs: ModelInputs, lengths: image_prompt.PromptTokens
) -> Cost:
    """Return the FLOPs of a prompt by a paper's convention."""
    text = text_config(model.network)
    layers = visual_layers(model.network, model.structure, inputs)
    decoder = ConventionInputs(text.hidden_size, text.intermediate_size, lengths.text, layers)
    return Cost(
        scope=lengths.scope,
        quantity=f"flops_{name}",
        unit=CONVENTION_UNITS[name],
        value=CONVENTIONS[name](decoder),
        how="analytic",
    )


def _missing_convention(scope: str, config: CostsConfig) -> Measurements:
    """Report a missing value if a FLOP convention is requested, because they need image prompts."""
    name = config.flops.convention
    if name is not None:
        yield MissingMeasurement(
            scope=scope,
            quantity=f"flops_{name}",
            reason=f"{name} covers prompts with images only",
            how="analytic",
        )


def _counted_costs(
    scope: str, counted: CountedFlops, parts: PartsOfCount, *, attends: bool = True
) -> Measurements:
    """Yield the counted FLOPs, or a missing measurement if an operator has no formula."""
    if counted.without_formula:
        yield MissingMeasurement(
            scope=scope,
            quantity="flops",
            reason=f"no formula for {', '.join(counted.without_formula)}",
            how="counted",
        )
        return
    found = {name: float(value) for name, value in parts(counted).items()}
    yield from _flops_and_macs(scope, "", float(counted.total), "counted", found)
    # Masks are observed only at PyTorch's attention function. If a decoder never calls it (eager
    # attention), there may be unobserved masked pairs, so its causal count is unknown.
    if counted.causal is None or (attends and not counted.attention_calls):
        yield MissingMeasurement(
            scope=scope,
            quantity="flops_causal",
            reason="the counter cannot observe the masks",
            how="counted",
        )
        return
    yield from _flops_and_macs(scope, "_causal", float(counted.causal), "counted")


def _analytic_costs(scope: str, compute: Callable[[], list[MatmulCost]]) -> Measurements:
    """Yield the analytic FLOPs, or a missing measurement if a part has no formula."""
    try:
        products = compute()
    except UserError as reason:
        yield MissingMeasurement(scope=scope, quantity="flops", reason=str(reason), how="analytic")
        return
    for suffix, masked in (("", True), ("_causal", False)):
        parts = {name: 2 * macs for name, macs in macs_by_part(products, masked=masked).items()}
        yield from _flops_and_macs(scope, suffix, sum(parts.values()), "analytic", parts)
    # Tower and projector process only visual rows. `visual_flops` is the decoder's share for visual
    # tokens, which visual-token methods reduce.
    visual = [p for p in products if p.tokens == "visual" and p.part not in ("vision", "projector")]
    if visual:
        parts = {p: 2 * macs for p, macs in macs_by_part(visual).items()}
        yield Cost(
            scope=scope,
            quantity="visual_flops",
            unit="FLOP",
            value=sum(parts.values()),
            how="analytic",
            parts=parts,
        )


def _flops_and_macs(
    scope: str, suffix: str, value: float, how: How, parts: dict[str, float] | None = None
) -> Measurements:
    """Yield a number as FLOPs, with its parts, and as multiply-adds."""
    # Papers call either quantity FLOPs; recording both makes a mix-up visible.
    yield Cost(
        scope=scope, quantity=f"flops{suffix}", unit="FLOP", value=value, how=how, parts=parts or {}
    )
    yield Cost(scope=scope, quantity=f"macs{suffix}", unit="MAC", value=value / 2, how=how)
