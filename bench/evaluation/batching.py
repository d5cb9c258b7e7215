"""Batches halved when memory runs out, and the token budget of a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, TypeVar

import torch

from bench.device import devices
from bench.device.memory import is_out_of_memory
from bench.errors import UserError
from bench.models.model import Model
from bench.models.network import NetworkConfig, text_config
from bench.ui import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")


def attempt(work: Callable[[], Result]) -> Result | None:
    """Return the result of `work`, or None if memory ran out."""
    # A separate function, because the traceback of an exception that is being handled refers to the
    # tensors of the failed attempt, which could not be freed.
    try:
        return work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


class AdaptiveBatches:
    """A batch size that shrinks when memory runs out and stays small from then on.

    `tokens` bounds the tokens of a batch as well, padding included.
    """

    def __init__(
        self, size: int, device: torch.device, progress: Progress, tokens: int | None = None
    ) -> None:
        self.size = size
        self._tokens = tokens
        self._device = device
        self._progress = progress

    def map(
        self,
        items: Sequence[Item],
        work: Callable[[Sequence[Item]], list[Result]],
        lengths: Sequence[int] = (),
    ) -> Iterator[list[Result]]:
        """Yield the results batch by batch, in the order of the items.

        `lengths` are the tokens of the items, the longest first; without them, tokens are not
        limited.
        """
        begin = 0
        while begin < len(items):
            batch = items[begin : begin + self.size_for(lengths[begin] if lengths else None)]
            # A failed batch is retried from its first item, so results keep the order of the items.
            # The size never grows again, because memory would run out again.
            results = attempt(partial(work, batch))
            if results is None:
                self._halve(len(batch))
                continue
            begin += len(batch)
            yield results

    def size_for(self, length: int | None) -> int:
        """Return the size of a batch whose longest item has `length` tokens (None: no limit)."""
        if self._tokens is None or length is None:
            return self.size
        return max(1, min(self.size, self._tokens // max(1, length)))

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise UserError(
                "benchmark.batch_size=1: a single sample does not fit into memory; choose a "
                "smaller model, or model.dtype=bfloat16"
            )
        self.size = tried // 2
        _report_halving(self._device, self._progress, str(tried), self.size)


class TokenBudget:
    """Tokens per batch, padding included."""

    def __init__(self, tokens: int, device: torch.device, progress: Progress) -> None:
        self.tokens = tokens
        self._device = device
        self._progress = progress

    def halve(self, tried: int) -> None:
        """Continue with half of the `tried` tokens, with a warning."""
        # Half of the tried tokens, because a batch is often smaller than the budget.
        self.tokens = max(1, tried // 2)
        _report_halving(self._device, self._progress, f"{tried} tokens", self.tokens)

    def out_of_memory_error(self, tried: int) -> UserError:
        """Build the out-of-memory error for a single prompt."""
        return UserError(
            f"benchmark: a single prompt of {tried} tokens does not fit into memory; choose a "
            "smaller model, or a smaller model.max_length"
        )


def _report_halving(device: torch.device, progress: Progress, tried: str, remaining: int) -> None:
    devices.release_memory(device)
    progress.warn(f"out of memory with a batch size of {tried}: continuing with {remaining}")


MAX_TOKENS_BY_DEVICE = {"cpu": 2048}
"""Tokens per batch above which batches are no faster, because a CPU's caches are full."""
MAX_TOKENS = 32768

# Used even if the estimate is lower: smaller batches are inefficient, and if memory runs out the
# batch is halved.
MIN_TOKENS = 256

# Half, because `bytes_per_token` counts only tensors, without fragmentation, rounding and
# workspaces of kernels. A budget that is too large only costs a halving.
FREE_MEMORY_SHARE = 0.5
"""Share of the free memory that activations may take."""


def estimate_token_budget(
    config: NetworkConfig, dtype: torch.dtype, device: torch.device, progress: Progress
) -> TokenBudget:
    """Estimate the token budget of a language model from the memory that is currently free."""
    tokens = fitting_tokens(config, dtype, device.type, devices.free_bytes(device))
    return TokenBudget(tokens, device, progress)


def fitting_tokens(config: NetworkConfig, dtype: torch.dtype, device: str, free: float) -> int:
    """Return the token budget of a batch on a type of device with `free` bytes."""
    fitting = int(FREE_MEMORY_SHARE * max(0.0, free) / bytes_per_token(config, dtype))
    return min(MAX_TOKENS_BY_DEVICE.get(device, MAX_TOKENS), max(MIN_TOKENS, fitting))


MAX_AUTO_ROWS = 512
"""Maximum rows of a batch of short texts with `batch_size=auto`; more are no faster."""
MAX_AUTO_IMAGES = 64
"""Rows of the first batch of images, whose memory is unknown before they are encoded."""


def batches_for(model: Model, size: int | Literal["auto"], progress: Progress) -> AdaptiveBatches:
    """Return batches of texts of the given size; `auto` fills the free memory with tokens."""
    if size != "auto":
        return AdaptiveBatches(size, model.device, progress)
    network = model.network
    dtype = next((each.dtype for each in network.parameters()), torch.float32)
    budget = estimate_token_budget(text_config(network), dtype, model.device, progress)
    return AdaptiveBatches(MAX_AUTO_ROWS, model.device, progress, budget.tokens)


def bytes_per_token(config: NetworkConfig, dtype: torch.dtype) -> int:
    """Estimate the bytes that one token needs in the widest layer and at the output head.

    The estimate has 16 vectors of the residual width (queries, keys, values, norms, copies); gate,
    up and their product in the feed-forward, for every expert of a token; and three float32 vectors
    over the vocabulary, as if every position were scored.
    """
    # The 3 * 4 bytes per vocabulary entry are for the logits, their float32 copy and its
    # log-softmax. Only one layer counts, because under `no_grad` its activations are freed before
    # the next layer runs.
    residual, feed_forward = 16 * int(config.hidden_size), 3 * _feed_forward_width(config)
    return dtype.itemsize * (residual + feed_forward) + 3 * 4 * int(config.vocab_size)


def _feed_forward_width(config: NetworkConfig) -> int:
    """Return the number of neurons that process a token in the widest feed-forward."""

    def field(name: str) -> int:
        return int(getattr(config, name, None) or 0)

    dense, experts = field("intermediate_size"), field("num_experts_per_tok")
    expert = field("moe_intermediate_size")
    if not expert:
        # In Mixtral the only width is that of an expert.
        return max(1, experts) * dense
    # Qwen MoE and DeepSeek have a width of experts and one of dense layers. Shared experts are
    # added to the routed ones, as a separate width (Qwen2 MoE) or as a number of experts
    # (DeepSeek).
    shared = field("shared_expert_intermediate_size") + field("n_shared_experts") * expert
    return max(dense, max(1, experts) * expert + shared)
