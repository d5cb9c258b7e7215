"""A loaded network with everything that methods, harnesses and measurements need to use it."""

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
    """Duration of a method's own work, readable after the timed block."""

    seconds: float


@dataclass
class Model:
    """A network, what turns inputs into tensors for it, and where both came from.

    `tokenizer` is None for an image classifier. `processor` takes images and text and holds the
    tokenizer; it is None for all models but vision-language models.

    Three fields are set by methods. `overhead` times the work that a method adds inside a forward,
    such as the selection of tokens. `needs_pixels` says that a method reads what the vision tower
    computes during a call: images must then be passed with the call and not be encoded before it.
    `needs_prompt` says that a method looks at the whole prompt at once: it must be passed in one
    call.

    `fingerprint` is a SHA-256 over the weights as they were on disk; `revision` is the commit that
    the requested revision resolved to, None for local folders. `quantization` says how a checkpoint
    is stored that was quantized already; None for dense ones.
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
        """The name in the model's config."""
        return self.config.name

    @property
    def max_length(self) -> int:
        """Length in tokens of the longest sequence that the network accepts."""
        return max_sequence_length(self.config, self.network)

    @cached_property
    def structure(self) -> ModelStructure:
        """Location of the parts that methods change."""
        # Cached: methods read it per layer.
        from bench.models.structure.model_structure import inspect_model

        return inspect_model(self.network)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "network":
            self.invalidate_structure()

    def invalidate_structure(self) -> None:
        """Discard the cached structure; call it after replacing modules or changing shapes."""
        # Without this, the next reader sees modules that are no longer in the network. A
        # `cached_property` stores its value in the instance's dictionary under its own name.
        self.__dict__.pop("structure", None)

    def copy(self) -> Model:
        """Copy the model with its own weights, so that a method can change them."""
        # `replace` copies fields only, so that the cached structure, which points into the original
        # network, is not carried over.
        return replace(self, network=copy.deepcopy(self.network))


def max_sequence_length(config: ModelConfig, network: nn.Module) -> int:
    """Return the longest sequence that a network accepts, in tokens; no weight is read."""
    if config.max_length is not None:
        return config.max_length
    from bench.models.network import text_config

    # The text config: that of a whole vision-language model has no position limit.
    return int(getattr(text_config(network), "max_position_embeddings", 2048))
