"""Protocols for the parts of a transformers network that the backends use.

transformers has no type annotations, so the interfaces that evaluation relies on are declared here.

Suffixes: B batch, G key-value heads, C cached tokens, T tokens of a call, d width of a head, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from bench.models.model import Model
from bench.models.network import NetworkConfig


class CacheLayer(Protocol):
    """Keys [B, G, C, d] and values of one layer."""

    keys: Tensor
    values: Tensor
    is_initialized: bool

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Append a call's keys and values; return all."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at the given indices, in place."""


class KeyValueCache(Protocol):
    """The KV cache of a network, layer by layer."""

    layers: list[CacheLayer]

    def get_seq_length(self) -> int:
        """Return the number of cached tokens."""


class NetworkOutput(Protocol):
    """Output of a forward: logits [B, T, V], and the cache if requested."""

    logits: Tensor
    past_key_values: KeyValueCache


class GenerationConfig(Protocol):
    """A checkpoint's defaults for `generate`."""

    eos_token_id: int | list[int] | None

    def to_diff_dict(self) -> dict[str, object]:
        """Return the settings that differ from the library's defaults."""


class LanguageModel(Protocol):
    """A network with a language model head."""

    config: NetworkConfig
    generation_config: GenerationConfig
    forward: Callable[..., object]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""

    def __call__(self, input_ids: Tensor, **options: object) -> NetworkOutput:
        """Run a forward."""

    def generate(self, **options: object) -> Tensor:
        """Return prompts with their continuations, token ids [B, T]."""

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head."""


def language_model(model: Model) -> LanguageModel:
    """Return a model's network, typed with the interface that evaluation uses."""
    # Harnesses accept only kinds of models with these members. If a network of remote code lacks
    # one, its first use fails with the name in the message.
    return cast("LanguageModel", model.network)


def pad_left(rows: list[Tensor], fill: int) -> Tensor:
    """Return rows [1, T_i] as one tensor [B, T], padded on the left with `fill`."""
    width = max(row.shape[1] for row in rows)
    return torch.cat(
        [nn.functional.pad(row, (width - row.shape[1], 0), value=fill) for row in rows]
    )


class NonFiniteRows(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed here
    """Ends the rows of a generation whose logits are not finite, and records where.

    `tokens_B` is the number of tokens that a row had generated before, or -1 if all logits were
    finite. The beams of a row count as one.
    """

    def __init__(self, rows: int, width: int, end_token: int) -> None:
        self.tokens_B = torch.full((rows,), -1)
        self._width = width
        self._end_token = end_token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits; rows without finite logits can only generate the end token."""
        # The maximum is NaN or infinite if a logit is NaN or +inf, or if all are -inf. Single -inf
        # are valid; other processors exclude tokens with them.
        lost_N = ~scores.amax(-1).isfinite()
        if lost_N.any():
            # Sampling from NaN raises; on a GPU it ends the process.
            scores[lost_N] = -torch.inf
            scores[lost_N, self._end_token] = 0.0
            lost_B = lost_N.reshape(len(self.tokens_B), -1).any(-1).cpu()
            self.tokens_B[lost_B & (self.tokens_B < 0)] = input_ids.shape[1] - self._width
        return scores
