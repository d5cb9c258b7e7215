"""FLOPs of one forward, counted by PyTorch's dispatcher on the meta device.

On the meta device nothing is computed, so any model can be counted on any machine, and the
attention and expert kernels that the counter does not see on a CPU are seen: the counter reports
0 for scaled-dot-product attention on the CPU and 0 for grouped expert products everywhere, hence
bfloat16 and the `batched_mm` experts here. One multiply-add is two FLOPs. Attention is charged
in full, not causally halved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from bench.models.residence import without_hooks
from bench.models.vision import Classifier

COUNTABLE_EXPERTS = "batched_mm"


def count_forward(network: nn.Module, batch: int, length: int) -> dict[str, int]:
    """Return the FLOPs of one forward over `batch` sequences of `length` tokens.

    The result maps `total` and each part (`attention`, `feed_forward`, `head`, `other`) to FLOPs;
    the parts sum to the total. The network's own weights are not touched.
    """

    def call() -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids_BL = torch.zeros(batch, length, dtype=torch.long, device="meta")
        return (), {"input_ids": ids_BL, "use_cache": False}

    return _parts(_watched(network, call))


def count_images(network: Classifier, batch: int) -> dict[str, int]:
    """Return the FLOPs of one forward over `batch` images of the size the network is built for.

    The result maps `total` and each part (`convolution`, `linear`, `other`) to FLOPs.
    """
    config = network.config
    shape = (batch, config.channels, config.size, config.size)

    def call() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.zeros(shape, dtype=torch.bfloat16, device="meta"),), {}

    counter = _watched(network, call)
    total = int(counter.get_total_flops())
    kinds = {str(kind): int(n) for kind, n in counter.get_flop_counts()["Global"].items()}
    convolution = sum(flops for kind, flops in kinds.items() if "convolution" in kind)
    linear = sum(flops for kind, flops in kinds.items() if "mm" in kind)
    other = total - convolution - linear
    return {"total": total, "convolution": convolution, "linear": linear, "other": other}


def _watched(
    network: nn.Module, call: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
) -> FlopCounterMode:
    """Run one forward on tensors without content and return the counter that watched it.

    `call` makes the arguments, which must be born where nothing is computed.
    """
    counter = FlopCounterMode(display=False)
    # Fake as well as meta: transformers looks at mask values unless tensors are fake.
    with FakeTensorMode(), _countable(network), without_hooks(network), torch.no_grad():
        tensors = (*network.named_parameters(), *network.named_buffers())
        weights = {name: _ghost(tensor) for name, tensor in tensors}
        args, kwargs = call()
        with counter:
            functional_call(network, weights, args=args, kwargs=kwargs, tie_weights=True)
    return counter


def _ghost(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape without storage, floats as bfloat16."""
    kind = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=kind, device="meta")


@contextmanager
def _countable(network: nn.Module) -> Iterator[None]:
    """Let the experts run an implementation that the counter sees, while the block lasts."""
    config = getattr(network, "config", None)
    before = getattr(config, "_experts_implementation", None)
    if before is None or not hasattr(network, "set_experts_implementation"):
        yield
        return
    network.set_experts_implementation(COUNTABLE_EXPERTS)  # type: ignore[operator]
    try:
        yield
    finally:
        network.set_experts_implementation(before)  # type: ignore[operator]


def _parts(counter: FlopCounterMode) -> dict[str, int]:
    """Split the count by what the operators belong to: the leaf module names say which."""
    by_module: dict[str, dict[Any, int]] = counter.get_flop_counts()
    total = int(counter.get_total_flops())
    parts = {"attention": 0, "feed_forward": 0, "head": 0}
    for path, counts in by_module.items():
        part = _belongs(path)
        if part is not None:
            parts[part] += sum(counts.values())
    return {"total": total, **parts, "other": total - sum(parts.values())}


def _belongs(path: str) -> str | None:
    """Return the part whose own module this path is, or None for containers and insides."""
    leaf = path.rpartition(".")[2]
    if leaf in ("self_attn", "attention", "attn"):
        return "attention"
    if leaf in ("mlp", "block_sparse_moe", "feed_forward"):
        return "feed_forward"
    return "head" if leaf == "lm_head" else None
