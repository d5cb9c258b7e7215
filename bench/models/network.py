"""Networks of transformers: the members in use, and the replacement of a module's forward.

transformers has no types that cover all its architectures. These Protocols name the members that
are common to them; a network is cast to one where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]


class NetworkConfig(Protocol):
    """Config of a network; all fields but the type depend on the architecture."""

    model_type: str

    def __getattr__(self, name: str) -> Any: ...


class TransformersNetwork(Protocol):
    """Network of transformers; it is an `nn.Module` as well."""

    config: NetworkConfig
    dtype: torch.dtype

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of token embeddings."""

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the language-modelling head."""

    def get_decoder(self) -> nn.Module:
        """Return the decoder of text, without its head."""

    def save_pretrained(self, folder: Path, *, save_original_format: bool = True) -> None:
        """Write config and weights; the original format has the checkpoint's own names."""


class KVCacheLayer(Protocol):
    """Keys and values of one layer, [B, G, S, d] each."""

    keys: Tensor
    values: Tensor


class KVCache(Protocol):
    """Keys and values of all layers, by layer."""

    layers: Sequence[KVCacheLayer]

    def get_seq_length(self) -> int:
        """Return the number of cached tokens."""


def text_config(network: nn.Module) -> NetworkConfig:
    """Return the config of a network's language model, which multimodal models nest in theirs."""
    config = cast(TransformersNetwork, network).config
    nested: NetworkConfig = (
        config.get_text_config() if hasattr(config, "get_text_config") else config
    )
    return nested


def replace_forward(module: nn.Module, forward: Forward | None) -> Callable[[], None]:
    """Run `forward` instead of a module's own; call the result to restore what was there before.

    None stands for the forward of the module's class. Replacements of one module are restored in
    reverse order.
    """
    # On the instance, so that the class and all other modules stay as they are. accelerate puts its
    # wrapper that fetches offloaded weights in the same place: it is shadowed, and restored.
    attributes = module.__dict__
    before = attributes.pop("forward", None)
    if forward is not None:
        attributes["forward"] = forward

    def restore() -> None:
        attributes.pop("forward", None)
        if before is not None:
            attributes["forward"] = before

    return restore


@contextmanager
def replaced_forward(module: nn.Module, forward: Forward | None) -> Iterator[None]:
    """Like `replace_forward`, inside the block only."""
    restore = replace_forward(module, forward)
    try:
        yield
    finally:
        restore()
