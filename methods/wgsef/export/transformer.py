"""Removal for language models, in a shape that transformers can load again.

transformers builds all layers of a model with one config, so every layer has to keep the same
number of neurons or heads; a budget per layer (scope `layer`) does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from bench.errors import UserError
from methods.wgsef.export.removal import remove
from methods.wgsef.groups.family import Family


def smaller_language_model(
    network: nn.Module, families: Sequence[Family], dead: Sequence[Tensor], multiple: int = 1
) -> nn.Module:
    """Return the model without its dead neurons or heads; `save_pretrained` can write it.

    Raises:
        UserError: the layers keep different numbers, or the groups are of two kinds or of one that
            cannot be removed.
    """
    kinds = {family.kind for family in families}
    if len(kinds) != 1:
        raise UserError(f"only one kind of group can be removed, got {' and '.join(sorted(kinds))}")
    removal = remove(network, families, dead, multiple)
    counts = set(removal.kept.values())
    if len(counts) != 1:
        raise UserError(
            f"transformers cannot load layers of different sizes, but these keep between "
            f"{min(counts)} and {max(counts)} {kinds.pop()}: use scope=layer"
        )
    smaller: Any = removal.network
    # In a vision-language model the decoder's sizes are in a nested config.
    config = smaller.config.get_text_config()
    count = counts.pop()
    if kinds == {"neurons"}:
        config.intermediate_size = count
    else:
        _fewer_heads(config, count)
    _refuse_what_cannot_be_loaded(config, f"{count} {kinds.pop()} per layer")
    return removal.network


def _fewer_heads(config: Any, kv_heads: int) -> None:
    """Set the numbers of KV and query heads, and the head width, in the config."""
    # Without an explicit head_dim transformers derives it as hidden_size / num_attention_heads,
    # which is wrong as soon as heads are missing.
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads // config.num_key_value_heads
    config.head_dim = width
    config.num_key_value_heads = kv_heads
    config.num_attention_heads = kv_heads * queries


def _refuse_what_cannot_be_loaded(config: Any, what: str) -> None:
    """Raise if transformers' own config validation would refuse this config on loading."""
    try:
        # `validate` exists only in versions whose configs are strict dataclasses.
        getattr(config, "validate", lambda: None)()
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"transformers could not reload {what}: {reason}") from error
