"""Networks of transformers: members in use, attention span, replacement of a forward.

transformers has no types that cover all its architectures. These Protocols name the members that
are common to them; a network is cast to one where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    generation_config: Any

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of token embeddings."""

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the language-modelling head."""

    def get_decoder(self) -> nn.Module:
        """Return the decoder of text, without its head."""

    def save_pretrained(
        self,
        folder: Path,
        *,
        state_dict: dict[str, Tensor] | None = None,
        variant: str | None = None,
        save_original_format: bool = True,
    ) -> None:
        """Write config and weights; the original format has the checkpoint's own names."""


def text_config(network: nn.Module) -> NetworkConfig:
    """Return the config of a network's language model, which multimodal models nest in theirs."""
    config = cast(TransformersNetwork, network).config
    nested: NetworkConfig = (
        config.get_text_config() if hasattr(config, "get_text_config") else config
    )
    return nested


# Layer types whose past is one key and value per token; others fold the past into a state.
ATTENTION_LAYERS = ("full_attention", "sliding_attention")


def non_attention_layer(network: nn.Module) -> str | None:
    """Return the first kind of layer that is not attention over tokens, or None."""
    # A recurrent or convolutional state has no mask that could hide one branch from another, so
    # such layers rule out prefix sharing. `_is_stateful` is how transformers marks models without
    # `layer_types` (Mamba and its kin).
    kinds = getattr(text_config(network), "layer_types", None) or ()
    others = sorted(set(kinds) - set(ATTENTION_LAYERS))
    if others:
        return str(others[0])
    return "recurrent state" if getattr(network, "_is_stateful", False) else None


def embedded_ids(network: nn.Module) -> int:
    """Return the number of token ids that a network can both read and predict."""
    whole = cast(TransformersNetwork, network)
    tables = (whole.get_input_embeddings(), whole.get_output_embeddings())
    weights = [getattr(table, "weight", None) for table in tables]
    return min(weight.shape[0] for weight in weights if isinstance(weight, torch.Tensor))


def learned_positions(network: nn.Module) -> int | None:
    """Return the number of positions that a decoder has vectors for, None if it computes them."""
    # GPT-2 names the table `wpe`, OPT and BioGPT `embed_positions`, others `position_embeddings`.
    # Rotary and sinusoidal positions are no `nn.Embedding`.
    for name, module in cast(TransformersNetwork, network).get_decoder().named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (leaf == "wpe" or "position" in leaf):
            # OPT's first two rows belong to padding.
            return module.num_embeddings - int(getattr(module, "offset", 0))
    return None


def sliding_window(network: nn.Module) -> int | None:
    """Return the sliding window in tokens, or None if every layer sees the whole past."""
    config = text_config(network)
    size = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    # A config may carry `sliding_window` although no layer uses it: Qwen2 disables it by
    # `use_sliding_window`, hybrid models by layer type.
    slides = kinds is None or "sliding_attention" in kinds
    return int(size) if size and slides and getattr(config, "use_sliding_window", True) else None


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
