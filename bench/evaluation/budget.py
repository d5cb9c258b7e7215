"""Tokens per forward: estimated once per model, halved whenever memory runs out."""

from __future__ import annotations

from typing import Any

import torch

from bench import device as devices
from bench.errors import UserError
from bench.progress import Progress

MOST = {"cpu": 2048}
"""Batches beyond this many tokens are no faster: the caches of a CPU are full."""

MOST_ELSEWHERE = 32768
# The floor holds even if the estimate says less: below it batches are too small to be worth
# anything, and running out of memory is handled by halving anyway.
LEAST = 256
# Half, because `bytes_per_token` counts tensors and not what the allocator loses to fragmentation
# and rounding, nor the workspace of kernels. A budget that is too large only costs a halving.
SHARE = 0.5
"""Share of the free memory that activations may take; the estimate ignores the allocator."""


class TokenBudget:
    """Tokens per batch, padding included."""

    def __init__(self, tokens: int, device: torch.device, progress: Progress) -> None:
        self.tokens = tokens
        self._device = device
        self._progress = progress

    def halve(self, tried: int) -> None:
        """Continue with half of the `tried` tokens, and tell the user."""
        # Half of what was tried, not of the budget: a batch is often smaller than the budget
        # allows.
        self.tokens = max(1, tried // 2)
        devices.release(self._device)
        self._progress.console.print(
            f"[yellow]out of memory with a batch of {tried} tokens: "
            f"continuing with {self.tokens}[/yellow]"
        )

    def refuse(self, tried: int) -> UserError:
        """Build the out-of-memory error for a single prompt."""
        return UserError(f"benchmark: a single prompt of {tried} tokens does not fit into memory")


def find(network: Any, device: torch.device, progress: Progress) -> TokenBudget:
    """Estimate the token budget of a network from the memory that is free now."""
    most = MOST.get(device.type, MOST_ELSEWHERE)
    room = int(SHARE * devices.free_bytes(device) / bytes_per_token(network.config, network.dtype))
    return TokenBudget(min(most, max(LEAST, room)), device, progress)


def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Estimate the bytes that one token needs in the widest layer and at the output head.

    16 vectors of the residual width (queries, keys, values, norms, copies); gate, up and their
    product in the feed-forward, for every expert that a token is routed to; and three vectors over
    the vocabulary in float32, as if every position were scored.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    experts = getattr(text, "num_experts_per_tok", None) or 1
    # MoE configs name the width of an expert in either field: Mixtral has only `intermediate_size`,
    # Qwen MoE has `moe_intermediate_size` and a dense width next to it. The widest reading is safe.
    wide = max(
        getattr(text, "intermediate_size", 0) or 0,
        experts * (getattr(text, "moe_intermediate_size", 0) or 0),
        experts * (getattr(text, "intermediate_size", 0) or 0) if experts > 1 else 0,
    )
    width = int(text.hidden_size)
    # The 3 * 4 bytes per vocabulary entry are the logits, their float32 copy and its log-softmax.
    # Only one layer counts, since activations of a layer are freed before the next one runs under
    # `no_grad`.
    return int(dtype.itemsize * (16 * width + 3 * wide) + 3 * 4 * int(text.vocab_size))
