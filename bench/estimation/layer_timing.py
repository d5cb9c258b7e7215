"""Seconds of a network's calls on this machine, from timing a layer of each form.

On a CPU, the sum of estimated times of operators, products and streams has wide bounds, because
caches, Python and kernels interact. A layer with random weights is quick to build and shows their
total.

Shapes: B rows or images, L tokens of a row, D d_model, N numbers.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from bench.device.devices import call_seconds
from bench.device.memory import PeakMemory
from bench.measurement.flops.counter import meta_forward
from bench.models.network import text_config

if TYPE_CHECKING:
    from bench.data.chat import ModelInputs
    from bench.method import RepeatedStep
    from bench.models.classifiers.classifier import Classifier

_Arguments = ParamSpec("_Arguments")
_Times = TypeVar("_Times")
_ROWS = ((1, 1), (1, 16), (1, 128), (8, 128))
"""Rows and tokens per row: a generated token, short requests, a batch of them."""
_LONG = (1, 1024)
"""As many tokens as the last of `_ROWS`, but in one row, to measure the cost of more pairs."""
_IMAGES = (1, 16, 128)
_PROMPTS = (1, 4)
_CALL_FLOPS = 2e10
"""FLOPs of the largest call that is timed: half a second at 40 GFLOP/s."""
_WEIGHT_BYTES = 2**28
_CACHE_BYTES = 2**26
"""More bytes than the caches of a core, because a run reads each layer's weights from memory."""
_SECONDS, _FEWEST = 0.15, 3
"""Seconds of timing per shape, and the minimum number of calls."""


class Curve(BaseModel):
    """Seconds of a call by number of samples, linearly interpolated and extrapolated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, samples: float) -> float:
        """Return the seconds of a call with this number of samples."""
        # The last interval that starts below the number, else the first one.
        place = max(1, sum(x < samples for x in self.samples[:-1]))
        (x0, x1), (y0, y1) = self.samples[place - 1 :][:2], self.seconds[place - 1 :][:2]
        slope = max(0.0, (y1 - y0) / (x1 - x0))
        # A call with fewer samples than the smallest one still launches all operators.
        return max(self.seconds[0], y1 + slope * (samples - x1))


class LayerTimes(BaseModel):
    """Times of all layers of a call together, or of a whole classifier.

    `length` is the largest number of tokens per row in `forward`. `pair` is the additional seconds
    per pair of query and key in longer rows, None if no long row was timed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    forward: Curve
    training: Curve | None = None
    length: float = 0.0
    pair: float | None = None

    def call(self, samples: float, pairs: float) -> float:
        """Return the seconds of a call; `pairs` of queries and keys include masked ones."""
        seconds = self.forward.at(samples)
        further = pairs - samples * min(samples, self.length)
        return max(seconds / 2, seconds + (self.pair or 0.0) * further)


class StepFigures(BaseModel):
    """Seconds of a method's step, and the peak memory of preparing and running it once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float
    peak_bytes: int


def _where_possible(
    timer: Callable[_Arguments, _Times | None],
) -> Callable[_Arguments, _Times | None]:
    """Make a timer return None for networks that cannot be called with random numbers."""

    @functools.wraps(timer)
    def tried(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Times | None:
        try:
            return timer(*args, **kwargs)
        except Exception:  # An unknown network may fail in any way; bounds are used instead.
            return None

    return tried


@_where_possible
def decoder_times(
    network: nn.Module, forms: Sequence[tuple[nn.Module, int]], device: torch.device
) -> LayerTimes | None:
    """Time a decoder's layers; `forms` are pairs of a layer and the number of layers of its form.

    `network` stays on the meta device; copies of its layers are made on `device`. Return None if
    layers are too large, or cannot be called with random numbers.
    """
    size = sum(_bytes(layer) for layer, _ in forms)
    if not forms or size > _WEIGHT_BYTES:
        return None
    flops = sum(2.0 * n * sum(p.numel() for p in layer.parameters()) for layer, n in forms)
    most = _CALL_FLOPS / max(1.0, flops / sum(n for _, n in forms))
    shapes = [shape for shape in (*_ROWS, _LONG) if shape[0] * shape[1] <= most]
    if len(shapes) < 2:
        return None
    seconds = dict.fromkeys(shapes, 0.0)
    for layer, count in forms:
        copies = _built(layer, min(count, 1 + _CACHE_BYTES // max(1, _bytes(layer))), device)
        for shape in shapes:
            args, kwargs = _inputs_of(layer, network, shape, device)
            calls = [partial(each, *args, **kwargs) for each in copies]
            seconds[shape] += count * _typical(calls, device)
    rows = [shape for shape in shapes if shape != _LONG]
    forward = _curve({b * length: seconds[b, length] for b, length in rows})
    pair, length = None, float(max(length for _, length in rows))
    if _LONG in seconds:
        # The last of `_ROWS` has as many tokens, so the difference is that of attention.
        more = _LONG[1] ** 2 - rows[-1][0] * rows[-1][1] ** 2
        pair = max(0.0, seconds[_LONG] - seconds[rows[-1]]) / more
    return LayerTimes(forward=forward, length=length, pair=pair)


@_where_possible
def classifier_times(network: Classifier, flops: float, device: torch.device) -> LayerTimes | None:
    """Time a classifier's forward, and forward with backward; `flops` are those of one image."""
    if _bytes(network) > _WEIGHT_BYTES:
        return None
    (built,) = _built(network, 1, device)
    config = network.config
    forward, training = dict[int, float](), dict[int, float]()
    for batch in _IMAGES:
        if batch * flops > _CALL_FLOPS and len(forward) > 1:
            break
        image_BCHH = torch.randn(batch, config.channels, config.size, config.size)
        image_BCHH = image_BCHH.to(device, next(built.parameters()).dtype)
        built.eval().requires_grad_(False)
        forward[batch] = _typical([partial(built, image_BCHH)], device)
        built.train().requires_grad_(True)
        # Batch norm cannot be trained with a single image.
        if batch > 1:
            training[batch] = _typical([partial(_trained, built, image_BCHH)], device)
    return LayerTimes(forward=_curve(forward), training=_curve(training))


@_where_possible
def prompt_times(network: nn.Module, inputs: ModelInputs, device: torch.device) -> Curve | None:
    """Time prefills of prompts with an image; `inputs` is one prompt on the CPU."""
    if _bytes(network) > _WEIGHT_BYTES:
        return None
    (built,) = _built(network, 1, device)
    seconds = dict[int, float]()
    for batch in _PROMPTS:
        rows = {key: torch.cat([value] * batch).to(device) for key, value in inputs.items()}
        seconds[batch] = _typical([partial(built, **rows, logits_to_keep=1)], device)
    return _curve(seconds)


@_where_possible
def step_figures(
    step: RepeatedStep, device: torch.device, dtype: torch.dtype
) -> StepFigures | None:
    """Time a step of a method and measure its memory; return None if it is too large."""
    if step.flops > _CALL_FLOPS:
        return None
    # Random inputs and weights must not change what the process draws later.
    with torch.random.fork_rng(), PeakMemory(device) as memory:
        call = step.prepare(device, dtype)
        call()
    return StepFigures(seconds=_typical([call], device), peak_bytes=memory.above)


def calls_identity(network: nn.Module) -> str:
    """Return what determines the time of a language model's calls, such as its config and dtype."""
    config: Any = network.config
    text = text_config(network)
    # Not in the JSON of a config.
    own = [getattr(text, f"_{part}_implementation", None) for part in ("attn", "experts")]
    return f"{next(network.parameters()).dtype} {config.to_json_string()} {own}"


def _trained(network: nn.Module, image_BCHH: Tensor) -> None:
    with torch.enable_grad():
        network(image_BCHH).logsumexp(-1).sum().backward()


def _curve(seconds: dict[int, float]) -> Curve:
    return Curve(samples=tuple(map(float, seconds)), seconds=tuple(seconds.values()))


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.itemsize for p in module.parameters())


def _built(module: nn.Module, count: int, device: torch.device) -> list[nn.Module]:
    """Return copies of a module without weights, with random weights."""
    return [_with_random_weights(copy.deepcopy(module), device) for _ in range(max(1, count))]


def _with_random_weights(module: nn.Module, device: torch.device) -> nn.Module:
    module.to_empty(device=device).requires_grad_(False)
    for weight in module.parameters():
        # Small values, so that no activation becomes infinite or subnormal, which is slow on some
        # cores.
        torch.nn.init.uniform_(weight, -0.05, 0.05) if weight.dim() > 1 else weight.fill_(1)
    for buffer in module.buffers():
        buffer.zero_()
    return module


def _inputs_of(
    layer: nn.Module, network: nn.Module, shape: tuple[int, int], device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a layer's arguments for rows of this shape, with random numbers."""
    like = torch.empty(0, dtype=next(layer.parameters()).dtype, device=device)

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args, kwargs)

    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with meta_forward(network) as call:
            call(input_ids=torch.zeros(shape, dtype=torch.long, device="meta"), use_cache=False)
    except _Reached as reached:
        args, kwargs = reached.args
        return _real(args, like), _real(kwargs, like)
    finally:
        hook.remove()
    raise ValueError("the network does not call this layer")


class _Reached(Exception):
    """Stops a forward at a layer, once the arguments of its call are known."""


def _real(value: Any, like: Tensor) -> Any:
    """Replace tensors in a nested value by real ones of their shapes; floats get `like`'s dtype."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            return torch.randn(value.shape, dtype=like.dtype, device=like.device)
        return torch.ones(value.shape, dtype=value.dtype, device=like.device)
    if isinstance(value, tuple | list):
        return type(value)(_real(inner, like) for inner in value)
    if isinstance(value, dict):
        return {key: _real(inner, like) for key, inner in value.items()}
    return value


@torch.no_grad()
def _typical(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Return the median seconds of calls that are run in turn, after a first round."""
    for call in calls[:2]:
        call()
    laps, began = list[float](), time.perf_counter()
    for call in cycle(calls):
        laps.append(call_seconds(call, device))
        if len(laps) >= _FEWEST and time.perf_counter() - began > _SECONDS:
            break
    return statistics.median(laps)
