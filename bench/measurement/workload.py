"""Workloads for measurements: prompts with generation, or batches of images.

Suffixes: B batch, L tokens of a prompt, C channels, H height and width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from bench.errors import UserError
from bench.measurement.image_prompt import build_image_prompt
from bench.measurement.model_size import parameter_dtype
from bench.models.classifiers.classifier import Classifier
from bench.models.model import max_sequence_length
from bench.records.record import MissingMeasurement
from bench.schema import TimingConfig

if TYPE_CHECKING:
    from torch import nn
    from transformers import Cache, GenerationMixin, PreTrainedModel
    from transformers.utils import ModelOutput

    from bench.models.model import Model
    from bench.schema import ModelConfig

SEED = 0


@dataclass(frozen=True)
class Workload(ABC):
    """Inputs of one shape in host memory, and the calls that a network runs on them."""

    shape: str
    batch: int
    inputs: dict[str, Tensor]

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """Return the inputs on a device; on the CPU nothing is copied."""
        return {name: value.to(device) for name, value in self.inputs.items()}

    @abstractmethod
    def forward(self, network: nn.Module, inputs: dict[str, Tensor]) -> ModelOutput | Tensor:
        """Run one forward of the network."""


@dataclass(frozen=True)
class GenerationWorkload(Workload):
    """Prompts of equal length, each continued greedily by the same number of tokens."""

    prompt: int
    new_tokens: int

    def forward(self, network: nn.Module, inputs: dict[str, Tensor]) -> ModelOutput:
        """Prefill the prompts into a KV cache, with logits for their last tokens only."""
        return network(**inputs, use_cache=True, logits_to_keep=1)

    def generate(
        self,
        network: nn.Module,
        inputs: dict[str, Tensor],
        on_token: Callable[[int], object] = lambda _: None,
    ) -> Cache:
        """Generate with `generate()` and return the final KV cache.

        `on_token` is called with 1, 2, ... as soon as the id of that token is in host memory.
        """
        generator = cast("GenerationMixin", network)
        # Some checkpoints list several end tokens, but `generate` needs a single id for padding.
        end = generator.generation_config.eos_token_id
        first = end[0] if isinstance(end, list) else end
        output = generator.generate(
            **inputs,
            min_new_tokens=self.new_tokens,
            max_new_tokens=self.new_tokens,
            use_cache=True,
            do_sample=False,
            # None overrides sampling values of the checkpoint's generation config, about which
            # `generate` would warn in greedy decoding.
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=first or 0,
            streamer=_TokenListener(on_token),
            return_dict_in_generate=True,
        )
        return output.past_key_values


@dataclass(frozen=True)
class ClassificationWorkload(Workload):
    """Images of the size that a classifier expects."""

    def forward(self, network: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return the logits of all images."""
        logits: Tensor = network(inputs["image_BCHH"])
        return logits


class _TokenListener(BaseStreamer):  # type: ignore[misc]  # transformers is not typed here
    """Streamer that reports every token from `generate`; the prompt comes first and is 0."""

    def __init__(self, on_token: Callable[[int], object]) -> None:
        self._on_token = on_token
        self._tokens_seen = 0

    def put(self, value: Tensor) -> None:
        """Receive the ids of the prompt, then of each new token, all in host memory."""
        if self._tokens_seen:
            self._on_token(self._tokens_seen)
        self._tokens_seen += 1

    def end(self) -> None:
        """Do nothing, because the last token has been reported already."""


def workloads(model: Model, timing: TimingConfig) -> Iterator[Workload | MissingMeasurement]:
    """Yield a workload per shape of the grid, or a missing measurement if it exceeds the model."""
    kinds = {
        "causal_lm": _text_workloads,
        "image_text": _image_prompt_workloads,
        "image_classifier": _classification_workloads,
    }
    for work in kinds[model.config.kind](model, timing):
        if (
            isinstance(work, GenerationWorkload)
            and work.prompt + work.new_tokens > model.max_length
        ):
            reason = (
                f"{model.name} supports {model.max_length} positions; a prompt of {work.prompt} "
                f"and {work.new_tokens} new tokens exceed them"
            )
            yield MissingMeasurement(scope=work.shape, quantity="latency", reason=reason)
        else:
            yield work


def refuse_long_prompts(timing: TimingConfig, config: ModelConfig, network: nn.Module) -> None:
    """Refuse `lengths` of which none fits the model, before any weight is loaded.

    Raises:
        UserError: even the shortest length with its new tokens exceeds the model's positions.
    """
    if config.kind != "causal_lm":
        return
    most = max_sequence_length(config, network)
    least = min(timing.lengths)
    if least + timing.new_tokens > most:
        raise UserError(
            f"costs.timing.lengths={list(timing.lengths)}: {config.name} supports {most} "
            f"positions; a prompt of {least} and {timing.new_tokens} new tokens exceed them: "
            "use shorter prompts"
        )


def _text_workloads(model: Model, timing: TimingConfig) -> Iterator[Workload]:
    # Random tokens, because every vocabulary has them and time hardly depends on the ids.
    network = cast("PreTrainedModel", model.network)
    vocabulary = network.get_input_embeddings().num_embeddings
    rng = torch.Generator().manual_seed(SEED)
    for batch, length in product(timing.batches, timing.lengths):
        ids_BL = torch.randint(vocabulary, (batch, length), generator=rng)
        inputs = {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}
        yield GenerationWorkload(f"{batch}x{length}", batch, inputs, length, timing.new_tokens)


def _image_prompt_workloads(model: Model, timing: TimingConfig) -> Iterator[Workload]:
    """Yield prompts of one image and some words, as built by the model's processor."""
    from bench.models.vlm.visual_tokens import locate_visual_tokens

    for words in timing.words:
        single = build_image_prompt(model, words)
        tokens = locate_visual_tokens(model.network, single)
        visual = 0 if tokens is None else int(tokens.mask.sum())
        length = single["input_ids"].shape[1]
        for batch in timing.batches:
            # Processors stack the patches of all images along the first dimension, like samples, so
            # repeating every tensor along it gives a valid batch.
            inputs = {name: torch.cat([value.cpu()] * batch) for name, value in single.items()}
            shape = f"{batch}x({visual} visual + {length - visual} text)"
            yield GenerationWorkload(shape, batch, inputs, length, timing.new_tokens)


def _classification_workloads(model: Model, timing: TimingConfig) -> Iterator[Workload]:
    config = cast(Classifier, model.network).config
    rng = torch.Generator().manual_seed(SEED)
    dtype = parameter_dtype(model.network)
    for batch in timing.batches:
        shape = (batch, config.channels, config.size, config.size)
        image_BCHH = torch.randn(shape, generator=rng).to(dtype)
        yield ClassificationWorkload("x".join(map(str, shape)), batch, {"image_BCHH": image_BCHH})
