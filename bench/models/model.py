"""A loaded network with everything that methods, harnesses and measurements need."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from bench.schema import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bench.models.checkpoints import Quantization
    from bench.models.structure.model_structure import ModelStructure


class TimedWork(Protocol):
    """Duration of a method's own work, available after the timed block."""

    seconds: float


@dataclass
class Model:
    """A network with its tokenizer or processor, and the origin of its weights.

    `tokenizer` is None for image classifiers. `processor` takes images and text and contains the
    tokenizer; only vision-language models have one.

    Methods set three fields. `overhead` times the work that a method adds inside a forward, such as
    the selection of tokens. `needs_pixels` is true if a method uses results of the vision tower, so
    that images must be passed to the network instead of being encoded before. `needs_prompt` is
    true if a method needs the whole prompt, which must then be passed in a single call.

    `fingerprint` is a SHA-256 of the weights on disk. `revision` is the commit that the requested
    revision resolves to, None for local folders. `quantization` describes how a published
    checkpoint is quantized, None for dense ones.
    """

    config: ModelConfig
    network: nn.Module
    tokenizer: Any
    fingerprint: str
    revision: str | None
    device: torch.device
    processor: Any = None
    quantization: Quantization | None = None
    overhead: Callable[[], AbstractContextManager[TimedWork]] | None = None
    needs_pixels: bool = False
    needs_prompt: bool = False

    @property
    def name(self) -> str:
        """Name of the model in its config."""
        return self.config.name

    @property
    def max_length(self) -> int:
        """Maximum length of a sequence that the network accepts, in tokens."""
        return max_sequence_length(self.config, self.network)

    @cached_property
    def structure(self) -> ModelStructure:
        """Location of the parts that methods change."""
        # Cached, because methods read it per layer.
        from bench.models.structure.model_structure import inspect_model

        return inspect_model(self.network)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "network":
            self.invalidate_structure()

    def invalidate_structure(self) -> None:
        """Discard the cached structure; call it after replacing modules or changing shapes."""
        # A `cached_property` stores its value in the instance's `__dict__`. Without its removal,
        # modules would be found that are no longer in the network.
        self.__dict__.pop("structure", None)

    def copy(self) -> Model:
        """Copy the model with its own weights, so that a method can change them."""
        # `replace` copies fields only, and so drops the cached structure, which refers to the
        # original network.
        return replace(self, network=copy.deepcopy(self.network))


def max_sequence_length(config: ModelConfig, network: nn.Module) -> int:
    """Return the maximum length of a sequence in tokens; no weight is read."""
    if config.max_length is not None:
        return config.max_length
    from bench.models.network import text_config

    # The text config, because that of a vision-language model has no limit of positions.
    return int(getattr(text_config(network), "max_position_embeddings", 2048))
