"""One prompt with an image through a vision-language model: FLOPs, time, and size of the KV cache.

Runs real calls, because methods that skip work decide by values what is computed for each token; a
call on the meta device cannot show that. Shapes: B prompts, S tokens of each.
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
    """Number of visual and of text tokens of a prompt."""

    visual: int
    text: int

    @property
    def scope(self) -> str:
        """Scope of the costs of the prefill, such as `prefill 1x(576 visual + 40 text)`."""
        return f"prefill 1x({self.visual} visual + {self.text} text)"

    @property
    def token_scope(self) -> str:
        """Scope of the costs of the first token generated after the prompt."""
        return f"token after 1x({self.visual} visual + {self.text} text)"


@dataclass(frozen=True)
class Timed:
    """Seconds of each repetition of one prefill, and the bytes of its KV cache.

    `overhead` is the seconds of a prefill that a method's own selection takes. It is measured in
    separate calls, because the device synchronisation around the selection costs time itself; empty
    for a model without such a method.
    """

    cache_bytes: int
    seconds: list[float]
    overhead: list[float]

    @property
    def median(self) -> float:
        """Median of the repetitions in seconds."""
        return statistics.median(self.seconds)


def prompt(model: Model, words: int) -> dict[str, Any]:
    """Return one prompt as the model's processor builds it: a grey image, then `words` words."""
    from PIL import Image

    # A one-letter word is one token in common vocabularies, so `words` is close to the text length.
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
    """Count the visual and text tokens of a prompt.

    Raises:
        UserError: the prompt has no visual tokens.
    """
    from bench.models.multimodal import locate

    tokens = locate(model.network, inputs)
    if tokens is None:
        raise UserError(f"the processor of {model.name} produces no visual tokens for an image")
    visual = int(tokens.mask.sum())
    return Lengths(visual, inputs["input_ids"].numel() - visual)


@torch.no_grad()
def count(model: Model, inputs: dict[str, Any]) -> tuple[Counted, Counted]:
    """Count the FLOPs of the prefill of one prompt with KV cache, and of the token after it."""
    with watch() as prompt_counted:
        cache = _call(model, inputs).past_key_values
    # Without an attention mask: nothing is padded, and Qwen-VL would derive the number of positions
    # from a mask. Any id will do as the next token, so the last one of the prompt is repeated.
    step = {"input_ids": inputs["input_ids"][:, -1:], "past_key_values": cache}
    with watch() as token_counted:
        _call(model, step)
    return prompt_counted, token_counted


@torch.no_grad()
def measure(model: Model, inputs: dict[str, Any]) -> Timed:
    """Time the prefill of one prompt with KV cache, and measure the size of the cache."""
    cache = _call(model, inputs).past_key_values
    return Timed(held(cache), _timed(model, inputs), _overhead(model, inputs))


def _call(model: Model, inputs: dict[str, Any]) -> Any:
    # Logits of the last token only, as in generation: a head over all tokens would be charged to
    # the prefill.
    return model.network(**inputs, use_cache=True, logits_to_keep=1)


def _timed(model: Model, inputs: dict[str, Any]) -> list[float]:
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
    if model.overhead is None:
        return []
    seconds = []
    for _ in range(REPEATS):
        with model.overhead() as spent:
            _call(model, inputs)
        seconds.append(spent.seconds)
    return seconds
