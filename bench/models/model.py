"""A loaded network with everything that a method, a harness or a meter needs to use it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from bench.models.config import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bench.models.anatomy import Anatomy


class Spent(Protocol):
    """What a method's own work took while it was being timed."""

    seconds: float


@dataclass
class Model:
    """A network, what turns inputs into tensors for it, and where they came from.

    `tokenizer` is None for an image classifier; `processor` takes images and text, and is None for
    all but vision-language models, whose tokenizer it holds. `overhead` is set by a method that
    does work of its own inside a forward, such as choosing tokens: it times that work. So is
    `needs_pixels`, by one that reads what the vision part computes in a call: images must then come
    with the call, and must not have been encoded before. `needs_prompt` is set by one that looks at
    a whole prompt at once: it must then come in one call.

    `fingerprint` is a SHA-256 over the weights as they were on disk; `revision` the commit that
    the requested revision resolved to, None for local folders.
    """

    config: ModelConfig
    network: nn.Module
    tokenizer: Any
    fingerprint: str
    revision: str | None
    device: torch.device
    processor: Any = None
    overhead: Callable[[], AbstractContextManager[Spent]] | None = None
    needs_pixels: bool = False
    needs_prompt: bool = False

    @property
    def name(self) -> str:
        """The model's config name."""
        return self.config.name

    @property
    def max_length(self) -> int:
        """The longest sequence that the network may be given, in tokens."""
        return longest(self.config, self.network)

    @cached_property
    def anatomy(self) -> Anatomy:
        """Where the parts are that methods change."""
        from bench.models.anatomy import dissect

        return dissect(self.network)

    def copy(self) -> Model:
        """Return a model with its own weights, so that a method can change them."""
        return replace(self, network=copy.deepcopy(self.network))


def longest(config: ModelConfig, network: nn.Module) -> int:
    """Return the longest sequence that a network may be given, in tokens; no weight is read."""
    if config.max_length is not None:
        return config.max_length
    own: Any = network.config
    text = own.get_text_config() if hasattr(own, "get_text_config") else own
    return int(getattr(text, "max_position_embeddings", 2048))
