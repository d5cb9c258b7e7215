"""Scales of input channels by activation-aware search (AWQ, arXiv 2306.00978), and clipping.

Shapes: S tokens, R rows, C columns (inputs) of a matrix, c columns of one group, G groups.

Rounding errors have the same size in every column of a group, so columns with large inputs are
multiplied by s > 1 before rounding, and their inputs are divided by it. Matrices that read the same
input share s. With m_j = mean |x_j|, s is m^ρ divided by √(max m^ρ · min m^ρ), for the ρ of least
error.

The division costs nothing, because it is folded into the module that computes the input if that is
exact: the norm before a matrix, the rows of up before down (also through a ReLU, which is
positively homogeneous), or the rows of values before the output projection of an attention without
grouped queries. Other inputs are not scaled. Then each group of weights is clipped to the fraction
of its largest weight that gives the least error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bench.errors import UserError
from bench.method import InputSize, MethodWork
from bench.models.bitpacking.packed_shape import GridKind
from bench.models.layer_stream import LayerStream
from bench.models.structure.dense_layer import (
    FeedForward,
    Heads,
    bias_of,
    feed_forwards,
    find_heads,
    is_projection,
    shape_of,
    weight_of,
)
from methods.moe.calibration import Gram, observe_inputs
from methods.moe.quantizer.grid import Clip, column_groups, round_weights

EXPONENTS = tuple(step / 20 for step in range(20))
# Fractions of a group's largest weight that are tried for clipping, from 1 down to 0.55.
CLIPPED_SHARES = tuple(1 - step / 20 for step in range(10))
CLIP_TOKENS = 512
ROWS_AT_ONCE = 64
# Largest relative change of a layer's output with which a fold counts as exact.
FOLD_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
HALF_TOLERANCE = 0.05
# For an estimate, per trial on the default grid: operators per group of columns, and per clipped
# block of rows in it; numbers that either reads and writes per weight.
ROUND_OPERATORS, CLIP_OPERATORS = 42, 65
ROUND_ELEMENTS, CLIP_ELEMENTS = 30, 45


def layer_linears(layer: nn.Module) -> list[nn.Module]:
    """Return the projections of a layer."""
    return [module for module in layer.modules() if is_projection(module)]


class InputSample:
    """Mean absolute inputs of a projection, their Gram matrix, and some evenly spaced tokens."""

    def __init__(self, projection: nn.Module, tokens: int) -> None:
        columns = weight_of(projection)[0]
        self.gram = Gram.of_inputs(projection)
        self.absolute_C = torch.zeros_like(columns, dtype=torch.float32)
        self.kept: list[Tensor] = []
        self._every = max(1, tokens // CLIP_TOKENS)

    def add(self, x_SC: Tensor) -> None:
        """Add some tokens."""
        self.gram.add(x_SC)
        self.absolute_C += x_SC.float().abs().sum(0)
        self.kept.append(x_SC[:: self._every].float())

    @property
    def mean(self) -> Tensor:
        """Mean of |x| over tokens, [C]."""
        return self.absolute_C / self.gram.tokens


Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class ObservedLayer:
    """Statistics of one layer: inputs of its linears, and the calls of its parts.

    `readers` maps a norm to the linears that read its output.
    """

    inputs: dict[nn.Module, InputSample]
    readers: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)
    calls: dict[nn.Module, list[Call]] = field(default_factory=dict)


def observe_layer(
    stream: LayerStream, index: int, linears: Sequence[nn.Module], tokens: int
) -> ObservedLayer:
    """Run a layer, advance the stream, and return the statistics of its linears' inputs."""
    layer = stream.layers[index]
    observed = ObservedLayer({linear: InputSample(linear, tokens) for linear in linears})
    # Keyed by data pointer. The tensors are held until the end, so no pointer is reused.
    written: dict[int, tuple[nn.Module, Tensor]] = {}

    def wrote(norm: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            written[output.data_ptr()] = norm, output

    def read(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        norm, output = written.get(args[0].data_ptr(), (None, None))
        if norm is not None and output is not None and output.numel() == args[0].numel():
            found = observed.readers.setdefault(norm, [])
            if linear not in found:
                found.append(linear)

    def called(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observed.calls.setdefault(part, []).append((args, kwargs))

    norms = [module for module in layer.modules() if _is_norm(module)]
    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(wrote).remove)
        # All linears, because one that stays unquantized must not get a scaled input.
        for linear in layer_linears(layer):
            stack.callback(linear.register_forward_pre_hook(read).remove)
        for part in (layer, *layer.children()):
            handle = part.register_forward_pre_hook(called, with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(observe_inputs(observed.inputs))
        stream.run(index, advance=True)
    if not all(bool(sample.mean.isfinite().all()) for sample in observed.inputs.values()):
        raise UserError(
            f"calibration produced NaN or infinite inputs in layer {index}: try "
            "model.dtype=float32 or a different calibration text"
        )
    return observed


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1


@dataclass(frozen=True)
class ScaleSearch:
    """How weights are rounded during the search: bits of each linear, group size, grid."""

    bits: dict[nn.Module, int]
    group: int
    clip: Clip
    grid: GridKind = "offset"

    def rounded(self, linear: nn.Module, weight_RC: Tensor) -> Tensor:
        """Return the dequantized weights, float32."""
        return round_weights(weight_RC, self.bits[linear], self.group, self.clip, self.grid)

    def best_exponent(
        self, linears: Sequence[nn.Module], mean_C: Tensor, error: Callable[[], float]
    ) -> float:
        """Return the ρ with which scaling, rounding and scaling back gives the least error.

        `error` is called while the weights of the linears are replaced. The first of equal errors
        wins.
        """
        before = [weight_of(linear).clone() for linear in linears]
        best, least = 0.0, float("inf")
        for exponent in EXPONENTS:
            scale_C = scales(mean_C, exponent)
            for linear, weight_RC in zip(linears, before, strict=True):
                trial_RC = self.rounded(linear, weight_RC.float() * scale_C) / scale_C
                weight_of(linear).copy_(trial_RC)
            found = error()
            if found < least:
                best, least = exponent, found
        for linear, weight_RC in zip(linears, before, strict=True):
            weight_of(linear).copy_(weight_RC)
        return best


def search_work(
    layer: nn.Module, search: ScaleSearch, inputs: InputSize, *, clip_weights: bool
) -> MethodWork:
    """Return what the search in one layer costs; `forwards` are of this layer.

    Linears that read one input are tried together: those of attention and of the feed-forward in
    replays of these parts, values' and the last projection in products with its Gram matrix.
    """
    attentions, parts = find_heads(layer), feed_forwards(layer)
    whole = _numel(layer_linears(layer))
    # Linears that read a norm's output, with all projections of the part that is replayed for them.
    inputs_of = [(a.sources, (*a.sources, a.readout)) for a in attentions]
    inputs_of += [(p.sources, p.projections) for p in parts]
    read = [(first, part) for first, part in inputs_of if set(first) <= search.bits.keys()]
    last = [a.readout for a in attentions if _scales_values(a)]
    last += [p.down for p in parts if _scales_neurons(p)]
    last = [linear for linear in last if linear in search.bits]
    replays = sum(_numel(part) for _, part in read) / whole
    first_batch = min(inputs.batch, inputs.rows) / max(1, inputs.rows)
    flops = elements = operators = 0.0
    for linear in search.bits:
        flops += 2 * inputs.tokens * shape_of(linear)[1] ** 2
    for linear in [*(linear for first, _ in read for linear in first), *last]:
        rows, columns = shape_of(linear)
        elements += len(EXPONENTS) * rows * columns * ROUND_ELEMENTS
        operators += len(EXPONENTS) * -(-columns // search.group) * ROUND_OPERATORS
    for linear in last:
        rows, columns = shape_of(linear)
        flops += len(EXPONENTS) * 2 * rows * columns**2
    for linear in _clipped_linears(layer, search) if clip_weights else ():
        rows, columns = shape_of(linear)
        trials = len(CLIPPED_SHARES) * -(-columns // search.group) * -(-rows // ROWS_AT_ONCE)
        operators += trials * CLIP_OPERATORS
        elements += len(CLIPPED_SHARES) * rows * columns * CLIP_ELEMENTS
        flops += len(CLIPPED_SHARES) * 2 * min(CLIP_TOKENS, inputs.tokens) * rows * columns
    return MethodWork(
        # Once as it is and once per exponent; each fold is checked on the first batch, twice.
        forwards=(1 + len(EXPONENTS)) * replays + 2 * (len(read) + len(last)) * first_batch,
        flops=flops,
        elements=elements,
        operators=operators,
        memory=4.0 * sum(shape_of(linear)[1] ** 2 for linear in search.bits),
    )


def _numel(linears: Iterable[nn.Module]) -> int:
    return sum(weight_of(linear).numel() for linear in linears)


def scales(mean_C: Tensor, exponent: float) -> Tensor:
    """Return s = m^ρ, divided by the geometric mean of its extremes, [C] in float32."""
    scale_C = mean_C.float().pow(exponent).clamp(min=1e-4)
    balanced_C: Tensor = scale_C / (scale_C.max() * scale_C.min()).sqrt()
    return balanced_C


def scale_layer(
    layer: nn.Module, observed: ObservedLayer, search: ScaleSearch, *, clip_weights: bool
) -> list[dict[str, object]]:
    """Scale and clip the weights of one layer in place; return exponents and whether they folded.

    All exponents are searched on the original layer before any scale is folded.
    """
    names = {module: name for name, module in layer.named_modules()}
    found = [
        (source, linears, search.best_exponent(linears, _mean(observed, linears), error))
        for source, linears, error in _groups(layer, observed, search)
    ]
    entries: list[dict[str, object]] = []
    divided: dict[nn.Module, Tensor] = {}
    for source, linears, exponent in found:
        scale_C = scales(_mean(observed, linears), exponent)
        kept = _fold_if_exact(layer, observed, source, linears, scale_C)
        if kept:
            divided |= dict.fromkeys(linears, scale_C)
        inputs = [names[linear] for linear in linears]
        entries.append({"inputs": inputs, "exponent": exponent, "folded": kept})
    if clip_weights:
        for linear in _clipped_linears(layer, search):
            x_SC = torch.cat(observed.inputs[linear].kept)
            if linear in divided:
                x_SC = x_SC / divided[linear]
            weight_RC = weight_of(linear)
            bits = search.bits[linear]
            fit = search.group, search.clip, search.grid
            weight_RC.copy_(clipped(weight_RC, x_SC, bits, *fit))
    return entries


def _mean(observed: ObservedLayer, linears: Sequence[nn.Module]) -> Tensor:
    return observed.inputs[linears[0]].mean


Group = tuple[nn.Module, list[nn.Module], Callable[[], float]]


def _groups(layer: nn.Module, observed: ObservedLayer, search: ScaleSearch) -> Iterator[Group]:
    """Yield (source of an input, the linears that read it, a function for their error)."""
    for norm, linears in observed.readers.items():
        if not all(linear in search.bits for linear in linears):
            continue
        # As in the release, the error is that of the output of the layer's child that contains all
        # of them, such as the attention, in which errors of queries and keys are combined.
        parts = [part for part in layer.children() if set(linears) <= set(part.modules())]
        yield norm, linears, _replayed_error(parts[0] if parts else layer, observed)
    for attention in find_heads(layer):
        output = attention.readout
        if output in search.bits and _scales_values(attention):
            yield attention.sources[2], [output], _own_error(output, observed)
    for part in feed_forwards(layer):
        if part.down in search.bits and _scales_neurons(part):
            source = part.sources[-1]
            yield source, [part.down], _own_error(part.down, observed)


def _scales_values(attention: Heads) -> bool:
    """Whether scales of the output projection can be folded into the rows of values."""
    # Values that share a matrix with queries and keys are not scaled. With grouped queries a row of
    # values feeds several columns; the release skips that case too.
    return not attention.fused and attention.queries == attention.head_dim


def _scales_neurons(part: FeedForward) -> bool:
    """Whether scales of down can be folded into the rows of up."""
    return part.form != "plain" or _is_homogeneous(part.act)


def _is_homogeneous(act: Callable[[Tensor], Tensor]) -> bool:
    """Whether act(s x) = s act(x) for s > 0, as for a ReLU."""
    x = torch.linspace(-3, 3, 13)
    return bool(torch.allclose(act(2 * x), 2 * act(x), atol=1e-6))


def _replayed_error(part: nn.Module, observed: ObservedLayer) -> Callable[[], float]:
    """Return the mean squared change of a part's output over the calibration text."""
    calls = observed.calls[part]
    wanted = [_first(part(*args, **kwargs)).float().clone() for args, kwargs in calls]
    size = sum(output.numel() for output in wanted)

    def error() -> float:
        total = 0.0
        for (args, kwargs), output in zip(calls, wanted, strict=True):
            total += float((_first(part(*args, **kwargs)).float() - output).square().sum())
        return total / size

    return error


def _own_error(linear: nn.Module, observed: ObservedLayer) -> Callable[[], float]:
    """Return the mean squared change of a linear's output, from the Gram matrix of its input."""
    gram, wanted_RC = observed.inputs[linear].gram, weight_of(linear).float().clone()
    size = gram.tokens * len(wanted_RC)

    def error() -> float:
        change_RC = weight_of(linear).float() - wanted_RC
        return float(((change_RC @ gram.total) * change_RC).sum()) / size

    return error


def _first(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def _fold_if_exact(
    layer: nn.Module,
    observed: ObservedLayer,
    source: nn.Module,
    linears: Sequence[nn.Module],
    scale_C: Tensor,
) -> bool:
    """Fold scales into the source of an input and the linears that read it; undo it if not exact.

    The fold is exact if the layer's output does not change. It is not, for example, for a norm
    whose output also feeds the residual stream (OPT-350m).
    """
    args, kwargs = observed.calls[layer][0]
    wanted = _first(layer(*args, **kwargs)).clone()
    changed = [w for module in (source, *linears) for w in module.parameters(recurse=False)]
    before = [weight.detach().clone() for weight in changed]
    fold(source, linears, scale_C)
    apart = (_first(layer(*args, **kwargs)).double() - wanted.double()).norm()
    tolerance = FOLD_TOLERANCE.get(wanted.dtype, HALF_TOLERANCE)
    if float(apart) <= tolerance * float(wanted.double().norm()):
        return True
    for weight, value in zip(changed, before, strict=True):
        weight.copy_(value)
    return False


def fold(source: nn.Module, linears: Sequence[nn.Module], scale_C: Tensor) -> None:
    """Divide the source of an input by the scales, and multiply the columns that read it."""
    for linear in linears:
        _assign(weight_of(linear), lambda weight_RC: weight_RC * scale_C)
    if is_projection(source):
        # The last rows are those of up if gate and up are one matrix.
        last, bias_R = slice(-len(scale_C), None), bias_of(source)
        _assign(weight_of(source)[last], lambda weight_CD: weight_CD / scale_C[:, None])
        if bias_R is not None:
            _assign(bias_R[last], lambda bias_C: bias_C / scale_C)
        return
    offset = _weight_offset(source)
    _assign(cast(Tensor, source.weight), lambda w_C: (w_C + offset) / scale_C - offset)
    bias_C = getattr(source, "bias", None)
    if isinstance(bias_C, Tensor):
        _assign(bias_C, lambda value_C: value_C / scale_C)


def _assign(weight: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    # At least float32, so that a half-precision weight is rounded once.
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    weight.detach().copy_(change(wide))


def _weight_offset(norm: nn.Module) -> float:
    """Return 1 for a norm that multiplies by 1 + w (Gemma), else 0."""
    empty = {name: torch.zeros_like(weight) for name, weight in norm.named_parameters()}
    weight_C = cast(Tensor, norm.weight)
    x_1C = torch.arange(len(weight_C), device=weight_C.device, dtype=weight_C.dtype)[None]
    return 1.0 if bool(functional_call(norm, empty, (x_1C,)).any()) else 0.0


def _clipped_linears(layer: nn.Module, search: ScaleSearch) -> list[nn.Module]:
    """Return the linears whose weights are clipped: all except queries and keys."""
    found: list[nn.Module] = []
    for attention in find_heads(layer):
        if not attention.fused:
            found += [attention.sources[2], attention.readout]
    for part in feed_forwards(layer):
        found += part.projections
    return [linear for linear in found if linear in search.bits]


def clipped(
    weight_RC: Tensor,
    x_SC: Tensor,
    bits: int,
    group: int,
    clip: Clip = "minmax",
    grid: GridKind = "offset",
) -> Tensor:
    """Clip each group of a row to the best fraction of its largest weight, float32 [R, C].

    The best fraction has the least error of the group's part of the output over the given tokens,
    Σ_s (Σ_c x_sc (w_rc - ŵ_rc))²; among equal errors the largest fraction is chosen.
    """
    result_RC = weight_RC.float().clone()
    for columns in column_groups(result_RC.shape[1], group):
        x_Sc = x_SC[:, columns].float()
        for start in range(0, len(result_RC), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            original_Rc = result_RC[rows, columns].clone()
            most_R1 = original_Rc.abs().amax(1, keepdim=True)
            least_R = torch.full_like(most_R1[:, 0], float("inf"))
            for share in CLIPPED_SHARES:
                limit_R1 = most_R1 * share
                trial_Rc = original_Rc.clamp(-limit_R1, limit_R1)
                rounded_Rc = round_weights(trial_Rc, bits, group, clip, grid)
                error_R = (x_Sc @ (rounded_Rc - original_Rc).T).square().sum(0)
                better_R = error_R < least_R
                least_R = torch.where(better_R, error_R, least_R)
                kept_Rc = result_RC[rows, columns]
                kept_Rc.copy_(torch.where(better_R[:, None], trial_Rc, kept_Rc))
    return result_RC
