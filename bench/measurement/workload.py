"""What a model is asked to do while it is measured: prompts and answers, or batches of images.

Suffixes: B batch, L tokens of a prompt, C channels, H height and width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from bench.errors import UserError
from bench.measurement.config import TimingConfig
from bench.measurement.gap import Gap
from bench.measurement.prefill import prompt
from bench.models.model import longest
from bench.models.vision import Classifier

if TYPE_CHECKING:
    from torch import nn

    from bench.models.config import ModelConfig
    from bench.models.model import Model

SEED = 0


@dataclass(frozen=True)
class Workload(ABC):
    """Inputs of one shape, in host memory, and the calls that a model makes of them."""

    shape: str
    batch: int
    inputs: dict[str, Tensor]

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """Return the inputs on a device; on the CPU they are there already."""
        return {name: value.to(device) for name, value in self.inputs.items()}

    @abstractmethod
    def forward(self, network: nn.Module, inputs: dict[str, Tensor]) -> Any:
        """Call the network once."""


@dataclass(frozen=True)
class Answering(Workload):
    """Prompts of equal length, each answered greedily with the same number of tokens."""

    prompt: int
    new_tokens: int

    def forward(self, network: nn.Module, inputs: dict[str, Tensor]) -> Any:
        """Prefill: read the prompts into a key-value cache, logits for their last tokens only."""
        return network(**inputs, use_cache=True, logits_to_keep=1)

    def answer(
        self,
        network: nn.Module,
        inputs: dict[str, Tensor],
        on_token: Callable[[int], object] = lambda _: None,
    ) -> Any:
        """Generate through transformers' own `generate`, and return the cache as it is in the end.

        `on_token` is called with 1, 2, ... as soon as the id of that token is in host memory.
        """
        answering: Any = network
        end = answering.generation_config.eos_token_id
        first = end[0] if isinstance(end, list) else end
        made = answering.generate(
            **inputs,
            min_new_tokens=self.new_tokens,
            max_new_tokens=self.new_tokens,
            use_cache=True,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=first or 0,
            streamer=_Listener(on_token),
            return_dict_in_generate=True,
        )
        return made.past_key_values


@dataclass(frozen=True)
class Classifying(Workload):
    """Images of the size that a classifier is built for."""

    def forward(self, network: nn.Module, inputs: dict[str, Tensor]) -> Any:
        """Return the logits of all images."""
        return network(inputs["image_BCHH"])


class _Listener(BaseStreamer):  # type: ignore[misc]  # transformers is not typed here
    """Hears of every token that `generate` makes; the prompt, which comes first, is number 0."""

    def __init__(self, on_token: Callable[[int], object]) -> None:
        self._on_token = on_token
        self._heard = 0

    def put(self, value: Tensor) -> None:
        """Take the ids of the prompt, then of each new token, all in host memory."""
        if self._heard:
            self._on_token(self._heard)
        self._heard += 1

    def end(self) -> None:
        """Nothing is left to tell when the answer ends."""


def workloads(model: Model, timing: TimingConfig) -> Iterator[Workload | Gap]:
    """Yield a workload for every shape of the grid, a gap for those that the model cannot take."""
    kinds = {"causal_lm": _texts, "image_text": _images_and_texts, "image_classifier": _images}
    for work in kinds[model.config.kind](model, timing):
        if isinstance(work, Answering) and work.prompt + work.new_tokens > model.max_length:
            reason = (
                f"{model.name} takes {model.max_length} positions, "
                f"not {work.prompt} and an answer of {work.new_tokens}"
            )
            yield Gap(work.shape, "latency", reason)
        else:
            yield work


def refuse_unfit(timing: TimingConfig, config: ModelConfig, network: nn.Module) -> None:
    """Raise `UserError` when none of the lengths fits the model; no weight is loaded yet."""
    if config.kind != "causal_lm":
        return
    most = longest(config, network)
    least = min(timing.lengths)
    if least + timing.new_tokens > most:
        raise UserError(
            f"costs.timing.lengths={list(timing.lengths)}: {config.name} takes {most} positions, "
            f"which {least} and an answer of {timing.new_tokens} tokens exceed"
        )


def _texts(model: Model, timing: TimingConfig) -> Iterator[Workload]:
    """Random tokens: what is written matters little for the time, and all vocabularies have it."""
    network: Any = model.network
    vocabulary = network.get_input_embeddings().num_embeddings
    draws = torch.Generator().manual_seed(SEED)
    for batch, length in product(timing.batches, timing.lengths):
        ids_BL = torch.randint(vocabulary, (batch, length), generator=draws)
        inputs = {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}
        yield Answering(f"{batch}x{length}", batch, inputs, length, timing.new_tokens)


def _images_and_texts(model: Model, timing: TimingConfig) -> Iterator[Workload]:
    """One image and some words, as the model's own processor makes a prompt of them."""
    from bench.models.multimodal import locate

    for words in timing.words:
        single = prompt(model, words)
        tokens = locate(model.network, single)
        visual = 0 if tokens is None else int(tokens.mask.sum())
        length = single["input_ids"].shape[1]
        for batch in timing.batches:
            inputs = {name: torch.cat([value.cpu()] * batch) for name, value in single.items()}
            shape = f"{batch}x({visual} visual + {length - visual} text)"
            yield Answering(shape, batch, inputs, length, timing.new_tokens)


def _images(model: Model, timing: TimingConfig) -> Iterator[Workload]:
    """Random images, in the network's own number format."""
    config = cast(Classifier, model.network).config
    draws = torch.Generator().manual_seed(SEED)
    dtype = next(model.network.parameters()).dtype
    for batch in timing.batches:
        shape = (batch, config.channels, config.size, config.size)
        image_BCHH = torch.randn(shape, generator=draws).to(dtype)
        yield Classifying("x".join(map(str, shape)), batch, {"image_BCHH": image_BCHH})
