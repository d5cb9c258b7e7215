"""Batches halved when memory runs out, and the token budget of a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from bench.device import devices
from bench.device.devices import release_memory
from bench.device.memory import is_out_of_memory
from bench.errors import UserError
from bench.ui import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")


class AdaptiveBatches:
    """A batch size that shrinks when memory runs out and stays small from then on."""

    def __init__(self, size: int, device: torch.device, progress: Progress) -> None:
        self.size = size
        self._device = device
        self._progress = progress

    def each(
        self, items: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]]
    ) -> Iterator[list[Result]]:
        """Yield the results of one batch after the other, in the order of the items."""
        begin = 0
        while begin < len(items):
            batch = items[begin : begin + self.size]
            # A batch is retried from its first item, so results keep the order of the items
            # whatever the sizes. The size never grows back: memory that ran out once will run out
            # again.
            done = self._attempt(batch, work)
            if done is None:
                self._halve(len(batch))
                continue
            begin += len(batch)
            yield done

    @staticmethod
    def _attempt(
        batch: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]]
    ) -> list[Result] | None:
        """Return None if memory ran out."""
        # A frame of its own, left before memory is released: as long as the exception is being
        # handled, its traceback references the failed attempt's tensors, and nothing can be freed.
        try:
            return work(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise UserError("benchmark.batch_size: a single sample does not fit into memory")
        self.size = tried // 2
        release_memory(self._device)
        self._progress.warn(f"out of memory with a batch of {tried}: continuing with {self.size}")


MAX_TOKENS_BY_DEVICE = {"cpu": 2048}
"""Batches beyond this many tokens are no faster: the caches of a CPU are full."""
MAX_TOKENS = 32768

# The floor holds even if the estimate says less: below it batches are too small to be worth
# anything, and running out of memory is handled by halving anyway.
MIN_TOKENS = 256

# Half, because `bytes_per_token` counts tensors and not what the allocator loses to fragmentation
# and rounding, nor the workspace of kernels. A budget that is too large only costs a halving.
FREE_MEMORY_SHARE = 0.5
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
        devices.release_memory(self._device)
        self._progress.warn(
            f"out of memory with a batch of {tried} tokens: continuing with {self.tokens}"
        )

    def refuse(self, tried: int) -> UserError:
        """Build the out-of-memory error for a single prompt."""
        return UserError(f"benchmark: a single prompt of {tried} tokens does not fit into memory")


def estimate_token_budget(network: Any, device: torch.device, progress: Progress) -> TokenBudget:
    """Estimate the token budget of a network from the memory that is free now."""
    most = MAX_TOKENS_BY_DEVICE.get(device.type, MAX_TOKENS)
    room = int(
        FREE_MEMORY_SHARE
        * devices.free_bytes(device)
        / bytes_per_token(network.config, network.dtype)
    )
    return TokenBudget(min(most, max(MIN_TOKENS, room)), device, progress)


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
