"""How many tokens a forward may have: found once a model, halved whenever memory runs out."""

from __future__ import annotations

from typing import Any

import torch

from bench import device as devices
from bench.errors import UserError
from bench.progress import Progress

MOST = {"cpu": 2048}
"""Beyond so many tokens a batch is no faster: a processor's caches are full by then."""

MOST_ELSEWHERE = 32768
LEAST = 256
SHARE = 0.5
"""How much of the free memory activations may take, as the estimate below knows no allocator."""


class TokenBudget:
    """Tokens per batch, padding included."""

    def __init__(self, tokens: int, device: torch.device, progress: Progress) -> None:
        self.tokens = tokens
        self._device = device
        self._progress = progress

    def halve(self, tried: int) -> None:
        """Go on with half of the tokens that were tried just now, and say so."""
        self.tokens = max(1, tried // 2)
        devices.release(self._device)
        self._progress.console.print(
            f"[yellow]out of memory with a batch of {tried} tokens: "
            f"going on with {self.tokens}[/yellow]"
        )

    def refuse(self, tried: int) -> UserError:
        """Return what to say when nothing is left to be split."""
        return UserError(f"benchmark: one prompt of {tried} tokens does not fit into memory")


def find(network: Any, device: torch.device, progress: Progress) -> TokenBudget:
    """Return the budget for a network, from the memory that is free now."""
    most = MOST.get(device.type, MOST_ELSEWHERE)
    room = int(SHARE * devices.free_bytes(device) / bytes_per_token(network.config, network.dtype))
    return TokenBudget(min(most, max(LEAST, room)), device, progress)


def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Estimate what a token takes while its layer is computed and when it meets the head.

    Sixteen rows of the residual stream's width (queries, keys, values, norms, copies), the
    feed-forward's gate, up and product for each expert that a token has, and three rows of the
    vocabulary in float32, as if every position were read.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    experts = getattr(text, "num_experts_per_tok", None) or 1
    wide = max(
        getattr(text, "intermediate_size", 0) or 0,
        experts * (getattr(text, "moe_intermediate_size", 0) or 0),
        experts * (getattr(text, "intermediate_size", 0) or 0) if experts > 1 else 0,
    )
    width = int(text.hidden_size)
    return int(dtype.itemsize * (16 * width + 3 * wide) + 3 * 4 * int(text.vocab_size))
