"""Calling a network on tensors without content, so that any model can be counted on any machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from bench.models.residence import without_hooks

COUNTABLE_EXPERTS = "batched_mm"


@contextmanager
def ghost(network: nn.Module) -> Iterator[Callable[..., Any]]:
    """Lend the network's forward on the meta device; its own weights are not touched.

    Tensors that are passed to it must be born inside the block, on the meta device.
    """
    # Fake as well as meta: transformers looks at mask values unless tensors are fake. Its cache
    # makes an empty tensor that is not.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, _countable(network), without_hooks(network), torch.no_grad():
        tensors = (*network.named_parameters(), *network.named_buffers())
        weights = {name: _without_content(tensor) for name, tensor in tensors}

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(network, weights, args=args, kwargs=kwargs, tie_weights=True)

        yield call


def _without_content(tensor: torch.Tensor) -> torch.Tensor:
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
    network.set_experts_implementation(COUNTABLE_EXPERTS)  # type: ignore[operator]  # transformers is untyped
    try:
        yield
    finally:
        network.set_experts_implementation(before)  # type: ignore[operator]  # transformers is untyped
