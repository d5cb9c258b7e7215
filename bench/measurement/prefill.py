"""What a vision-language model does for one prompt with an image: counted, timed, its cache held.

A real call, because methods that skip work decide row by row what is computed, which a call
without values cannot show. Shapes: B prompts, S tokens of each.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.data.prompts import chat
from bench.device import synchronize
from bench.errors import UserError
from bench.measurement.cache import held
from bench.measurement.counting import Counted, watch

if TYPE_CHECKING:
    from bench.models.model import Model

WARM_UP = 2
REPEATS = 7
GREY = (127, 127, 127)
SQUARE = 336


@dataclass(frozen=True)
class Lengths:
    """How many tokens of either kind a prompt has."""

    visual: int
    text: int

    @property
    def scope(self) -> str:
        """The prompt in words."""
        return f"prefill 1x({self.visual} visual + {self.text} text)"

    @property
    def token_scope(self) -> str:
        """The token that is generated after the prompt, in words."""
        return f"token after 1x({self.visual} visual + {self.text} text)"


@dataclass(frozen=True)
class Timed:
    """Seconds of each repetition of one prompt, and the bytes of the cache that it leaves.

    `overhead` is the part of a repetition that went into a method's own choices, timed in calls
    apart, since waiting for a device around them costs time itself; empty where there is none.
    """

    cache_bytes: int
    seconds: list[float]
    overhead: list[float]

    @property
    def median(self) -> float:
        """The median of the repetitions, in seconds."""
        return statistics.median(self.seconds)


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


def lengths(model: Model, inputs: dict[str, Any]) -> Lengths:
    """Return a prompt's lengths.

    Raises:
        UserError: it has no visual tokens.
    """
    from bench.models.multimodal import locate

    tokens = locate(model.network, inputs)
    if tokens is None:
        raise UserError(f"the processor of {model.name} makes no visual tokens of an image")
    visual = int(tokens.mask.sum())
    return Lengths(visual, inputs["input_ids"].numel() - visual)


@torch.no_grad()
def count(model: Model, inputs: dict[str, Any]) -> tuple[Counted, Counted]:
    """Count the prefill of one prompt with its key-value cache on, and the token after it."""
    with watch() as prompt_counted:
        cache = _call(model, inputs).past_key_values
    # Without a mask: nothing is padded, and Qwen-VL would take a mask for the positions' length.
    step = {"input_ids": inputs["input_ids"][:, -1:], "past_key_values": cache}
    with watch() as token_counted:
        _call(model, step)
    return prompt_counted, token_counted


@torch.no_grad()
def measure(model: Model, inputs: dict[str, Any]) -> Timed:
    """Time the prefill of one prompt with its key-value cache on, which is then weighed."""
    cache = _call(model, inputs).past_key_values
    return Timed(held(cache), _timed(model, inputs), _overhead(model, inputs))


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
