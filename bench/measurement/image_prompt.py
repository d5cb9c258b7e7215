"""One prompt with an image through a vision-language model: FLOPs, time, and size of the KV cache.

Real calls are made, because methods that skip work decide by values what to compute for each token,
which a call on the meta device cannot show. Shapes: B prompts, S tokens of each.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench.data import chat
from bench.data.chat import ModelInputs
from bench.device.devices import call_seconds
from bench.errors import UserError
from bench.measurement.flops.counter import CountedFlops, count_flops
from bench.measurement.model_size import kv_cache_bytes, parameter_dtype, side_cache_bytes

if TYPE_CHECKING:
    from transformers import Cache
    from transformers.utils import ModelOutput

    from bench.models.model import Model

WARM_UP_CALLS = 3
TIMED_CALLS = 7
GREY = (127, 127, 127)
IMAGE_SIDE = 336


@dataclass(frozen=True)
class PromptTokens:
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
class PrefillTiming:
    """Seconds of each repetition of one prefill, and the bytes of its KV cache.

    `side_cache_bytes` is the part of the cache that the next token does not read, due to a method.
    `overhead` is the seconds per prefill of a method's own selection, see `method_overhead`.
    """

    cache_bytes: int
    side_cache_bytes: int
    seconds: list[float]
    overhead: list[float]

    @property
    def median(self) -> float:
        """Median of the repetitions in seconds."""
        return statistics.median(self.seconds)


def build_image_prompt(model: Model, words: int) -> ModelInputs:
    """Return one prompt as built by the model's processor: a grey image, then `words` words."""
    from PIL import Image

    # A one-letter word is one token in common vocabularies, so `words` is close to the text length.
    turns = [(" ".join(["a"] * words), None)]
    text = chat.render_chat(model.processor, turns, images=1, system=model.config.system_prompt)
    image = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), GREY)
    encoded = chat.encode_chats(model.processor, [text], [[image]])
    dtype = parameter_dtype(model.network)
    return {
        name: (value.to(dtype) if value.is_floating_point() else value).to(model.device)
        for name, value in encoded.items()
        if isinstance(value, Tensor)
    }


def prompt_tokens(model: Model, inputs: ModelInputs) -> PromptTokens:
    """Count the visual and text tokens of a prompt.

    Raises:
        UserError: the prompt has no visual tokens.
    """
    from bench.models.vlm.visual_tokens import locate_visual_tokens

    tokens = locate_visual_tokens(model.network, inputs)
    if tokens is None:
        raise UserError(f"the processor of {model.name} produces no visual tokens for an image")
    visual = int(tokens.mask.sum())
    return PromptTokens(visual, inputs["input_ids"].numel() - visual)


@torch.no_grad()
def count_prefill(model: Model, inputs: ModelInputs) -> tuple[CountedFlops, CountedFlops]:
    """Count the FLOPs of the prefill of one prompt with KV cache, and of the token after it."""
    with count_flops() as prompt_counted:
        cache = _prefill(model, inputs).past_key_values
    with count_flops() as token_counted:
        _next_token(model, inputs, cache)
    return prompt_counted, token_counted


@torch.no_grad()
def time_prefill(model: Model, inputs: ModelInputs) -> PrefillTiming:
    """Time the prefill of one prompt with KV cache, and measure the size of the cache."""
    prefill = partial(_prefill, model, inputs)
    cache = prefill().past_key_values
    cache_bytes = kv_cache_bytes(cache)
    _next_token(model, inputs, cache)
    unread = side_cache_bytes(cache)
    del cache
    # The first call of the warm-up is the one above.
    for _ in range(WARM_UP_CALLS - 1):
        prefill()
    seconds = [call_seconds(prefill, model.device) for _ in range(TIMED_CALLS)]
    return PrefillTiming(cache_bytes, unread, seconds, method_overhead(model, prefill))


def _next_token(model: Model, inputs: ModelInputs, cache: Cache) -> None:
    """Feed one token after a prompt."""
    # Without an attention mask, because nothing is padded and Qwen-VL would derive the number of
    # positions from it. The next token may have any id, so the prompt's last one is repeated.
    _prefill(model, {"input_ids": inputs["input_ids"][:, -1:], "past_key_values": cache})


def _prefill(model: Model, inputs: ModelInputs) -> ModelOutput:
    # Logits of the last token only, as in generation; a head over all tokens would add to the time
    # of the prefill.
    return model.network(**inputs, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def method_overhead(model: Model, prefill: Callable[[], object]) -> list[float]:
    """Return the seconds of a method's own selection, one value per prefill.

    Measured in separate calls, because synchronising the device around the selection takes time.
    Empty for a model without such a method.
    """
    if model.overhead is None:
        return []
    seconds = []
    for _ in range(TIMED_CALLS):
        with model.overhead() as overhead:
            prefill()
        seconds.append(overhead.seconds)
    return seconds
