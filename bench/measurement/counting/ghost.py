"""Forward passes on the meta device, so that a model of any size can be counted on any machine."""

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
    """Yield a meta-device forward of the network; its own weights are not touched.

    Inputs must be created inside the block, on the meta device.
    """
    # Fake tensors on top of meta tensors: transformers inspects mask values unless tensors are
    # fake. Non-fake inputs must be allowed, because its KV cache creates a plain empty tensor.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, _countable(network), without_hooks(network), torch.no_grad():
        tensors = (*network.named_parameters(), *network.named_buffers())
        weights = {name: _without_content(tensor) for name, tensor in tensors}

        # `named_parameters` lists a tied parameter once; `tie_weights` replaces it under its other
        # names as well.
        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(network, weights, args=args, kwargs=kwargs, tie_weights=True)

        yield call


def _without_content(tensor: torch.Tensor) -> torch.Tensor:
    """Return a meta tensor of the same shape, floats as bfloat16."""
    # FLOPs do not depend on the dtype; with one dtype for all floats, inputs always match weights.
    kind = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=kind, device="meta")


@contextmanager
def _countable(network: nn.Module) -> Iterator[None]:
    """Switch the experts to an implementation whose matmuls the counter sees, inside the block."""
    config = getattr(network, "config", None)
    before = getattr(config, "_experts_implementation", None)
    # The eager implementation loops over the experts that were hit, which depends on values that do
    # not exist on the meta device; the matmuls of `batched_mm` have static shapes.
    if before is None or not hasattr(network, "set_experts_implementation"):
        yield
        return
    network.set_experts_implementation(COUNTABLE_EXPERTS)  # type: ignore[operator]  # transformers is untyped
    try:
        yield
    finally:
        network.set_experts_implementation(before)  # type: ignore[operator]  # transformers is untyped
