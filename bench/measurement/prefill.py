"""What a vision-language model does for one prompt with an image: counted, timed, its cache held.

A real call, because methods that skip work decide row by row what is computed, which a call
without values cannot show. Shapes: B prompts, S tokens of each.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.data.prompts import chat
from bench.device import synchronize
from bench.errors import UserError
from bench.measurement.cache import held
from bench.measurement.operators import counter

if TYPE_CHECKING:
    from bench.models.model import Model

WARM_UP = 2
REPEATS = 7
GREY = (127, 127, 127)
SQUARE = 336
PARTS = {
    "vision": ("vision_tower", "visual", "vision_model"),
    "projector": ("multi_modal_projector", "merger"),
    "head": ("lm_head",),
}


@dataclass(frozen=True)
class Prefill:
    """One prompt's costs: tokens of either kind, FLOPs by part, seconds of each repetition.

    `overhead` is the part of a repetition that went into a method's own choices, timed in calls
    apart, since waiting for a device around them costs time itself; empty where there is none.
    """

    visual: int
    text: int
    flops: dict[str, int]
    cache_bytes: int
    seconds: list[float]
    overhead: list[float]

    @property
    def shapes(self) -> str:
        """The prompt's lengths in words."""
        return f"prefill 1x({self.visual} visual + {self.text} text)"

    @property
    def median(self) -> float:
        """The median of the repetitions, in seconds."""
        return statistics.median(self.seconds)


@torch.no_grad()
def measure(model: Model, inputs: dict[str, Any]) -> Prefill:
    """Count and time the prefill of one prompt with its key-value cache on.

    Raises:
        UserError: it has no visual tokens.
    """
    from bench.models.multimodal import locate

    tokens = locate(model.network, inputs)
    if tokens is None:
        raise UserError(f"the processor of {model.name} makes no visual tokens of an image")
    visual = int(tokens.mask.sum())
    with counter() as counted:
        cache = _call(model, inputs).past_key_values
    return Prefill(
        visual=visual,
        text=inputs["input_ids"].numel() - visual,
        flops=_parts(counted),
        cache_bytes=held(cache),
        seconds=_timed(model, inputs),
        overhead=_overhead(model, inputs),
    )


def prompt(model: Model, words: int) -> dict[str, Any]:
    """Return one prompt as the model's processor makes it: a grey image, then `words` words."""
    from PIL import Image

    asked = [(" ".join(["a"] * words), None)]
    text = chat.render(model.processor, asked, images=1, system=model.config.system_prompt)
    image = Image.new("RGB", (SQUARE, SQUARE), GREY)
    made = chat.encode(model.processor, [text], [[image]])
    dtype = next(model.network.parameters()).dtype
    return {
        name: (value.to(dtype) if value.is_floating_point() else value).to(model.device)
        for name, value in made.items()
        if isinstance(value, Tensor)
    }


def _call(model: Model, inputs: dict[str, Any]) -> Any:
    return model.network(**inputs, use_cache=True, logits_to_keep=1)


def _timed(model: Model, inputs: dict[str, Any]) -> list[float]:
    """Return the seconds of some calls, after some that do not count."""
    seconds = []
    for number in range(WARM_UP + REPEATS):
        synchronize(model.device)
        began = time.perf_counter()
        _call(model, inputs)
        synchronize(model.device)
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - began)
    return seconds


def _overhead(model: Model, inputs: dict[str, Any]) -> list[float]:
    """Return the seconds that a method's own work takes in each of some calls."""
    if model.overhead is None:
        return []
    seconds = []
    for _ in range(REPEATS):
        with model.overhead() as spent:
            _call(model, inputs)
        seconds.append(spent.seconds)
    return seconds


def _parts(counted: FlopCounterMode) -> dict[str, int]:
    """Split a count by the modules that stand for vision tower, projector and head.

    The rest is the decoder; a merger inside the vision tower counts as the projector.
    """
    modules: dict[str, dict[Any, int]] = counted.get_flop_counts()
    total = int(counted.get_total_flops())
    found = dict.fromkeys(PARTS, 0)
    for path, counts in modules.items():
        for part, names in PARTS.items():
            if path.rpartition(".")[2] in names:
                found[part] += sum(counts.values())
    if any(".merger" in path for path in modules):
        found["vision"] -= found["projector"]
    return cast(dict[str, int], {"total": total, **found, "decoder": total - sum(found.values())})
