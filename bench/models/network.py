"""Networks: types of their members in transformers, attention span, bytes, replaced forwards.

transformers has no types that cover all of its architectures. These Protocols name the common
members; code that needs them casts a network to a Protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]


class NetworkConfig(Protocol):
    """Config of a network; all fields but `model_type` depend on the architecture."""

    model_type: str

    def __getattr__(self, name: str) -> Any: ...


class TransformersNetwork(Protocol):
    """Network of transformers, which is also an `nn.Module`."""

    config: NetworkConfig
    dtype: torch.dtype
    generation_config: Any

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings."""

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the language-modelling head."""

    def get_decoder(self) -> nn.Module:
        """Return the text decoder without its head."""

    def save_pretrained(
        self,
        folder: Path,
        *,
        state_dict: dict[str, Tensor] | None = None,
        variant: str | None = None,
        save_original_format: bool = True,
    ) -> None:
        """Write config and weights; `save_original_format` restores the checkpoint's own names."""


def text_config(network: nn.Module) -> NetworkConfig:
    """Return the config of a network's language model, which multimodal models nest in theirs."""
    config = cast(TransformersNetwork, network).config
    nested: NetworkConfig = (
        config.get_text_config() if hasattr(config, "get_text_config") else config
    )
    return nested


# Layer types with one key and value per past token; others compress the past into a state.
ATTENTION_LAYERS = ("full_attention", "sliding_attention")


def non_attention_layer(network: nn.Module) -> str | None:
    """Return the first kind of layer that is not attention over tokens, or None."""
    # A mask cannot separate branches in a recurrent or convolutional state, so such layers rule
    # out prefix sharing. transformers marks models without `layer_types` (such as Mamba) by
    # `_is_stateful`.
    kinds = getattr(text_config(network), "layer_types", None) or ()
    others = sorted(set(kinds) - set(ATTENTION_LAYERS))
    if others:
        return str(others[0])
    return "recurrent state" if getattr(network, "_is_stateful", False) else None


def embedded_ids(network: nn.Module) -> int:
    """Return the number of token ids that a network has both as input and as output."""
    typed = cast(TransformersNetwork, network)
    tables = (typed.get_input_embeddings(), typed.get_output_embeddings())
    weights = [getattr(table, "weight", None) for table in tables]
    return min(weight.shape[0] for weight in weights if isinstance(weight, torch.Tensor))


def learned_positions(network: nn.Module) -> int | None:
    """Return the number of learned positions of a decoder, or None if it computes positions."""
    # GPT-2 names the table `wpe`, OPT and BioGPT `embed_positions`, others `position_embeddings`.
    # Rotary and sinusoidal positions are not an `nn.Embedding`.
    for name, module in cast(TransformersNetwork, network).get_decoder().named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (leaf == "wpe" or "position" in leaf):
            # The first two rows of OPT are for padding.
            return module.num_embeddings - int(getattr(module, "offset", 0))
    return None


def sliding_window(network: nn.Module) -> int | None:
    """Return the sliding window in tokens, or None if all layers attend to all past tokens."""
    config = text_config(network)
    size = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    # A config may set `sliding_window` without using it: Qwen2 disables it by
    # `use_sliding_window`, hybrid models by layer type.
    slides = kinds is None or "sliding_attention" in kinds
    return int(size) if size and slides and getattr(config, "use_sliding_window", True) else None


def stored_bytes(network: nn.Module) -> int:
    """Return the bytes of all parameters and buffers."""
    # parameters() yields a tied tensor once, which is how often it is stored.
    held = chain(network.parameters(), network.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def replace_forward(module: nn.Module, forward: Forward | None) -> Callable[[], None]:
    """Make a module compute `forward`; call the result to restore the previous forward.

    None selects the forward of the module's class. Restore several replacements of a module in
    reverse order.
    """
    # Set on the instance, so that the class and other modules do not change. accelerate stores its
    # wrapper that loads offloaded weights in the same attribute, which is hidden until restored.
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
    """Replace a module's forward inside the block; see `replace_forward`."""
    restore = replace_forward(module, forward)
    try:
        yield
    finally:
        restore()
