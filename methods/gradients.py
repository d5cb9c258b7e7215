"""Gradients of the next-token loss on calibration text.

Shapes: B rows, L tokens per row, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


@contextmanager
def differentiable(network: nn.Module, weights: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Enable gradients for all activations and for the given weights, and for no other weight.

    On exit every weight gets its `requires_grad` back and all gradients are freed.
    """
    before = [(weight, weight.requires_grad) for weight in network.parameters()]
    network.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    # With every weight frozen nothing would require a gradient and no graph would be recorded.
    # Starting it at the embedding output costs no weight gradient.
    embedding: nn.Module = cast(Any, network).get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _, __, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()
        for weight, wanted in before:
            weight.requires_grad_(wanted)
            weight.grad = None


def backward(network: nn.Module, rows_BL: Tensor) -> float:
    """Run a forward and a backward pass on some rows and return the loss.

    The loss is -Σ log p(next token) in nats, summed over all tokens, so the gradient at a token
    does not depend on how many rows or tokens share a batch.
    """
    device = cast(Any, network).get_input_embeddings().weight.device
    rows_BL = rows_BL.to(device)
    # A caller's no_grad must not reach this pass.
    with torch.enable_grad():
        logits_BLV = network(input_ids=rows_BL, use_cache=False).logits
        predicted = logits_BLV[:, :-1].flatten(0, 1).float()
        # With a device map the logits may be on another device than the embeddings.
        targets = rows_BL[:, 1:].flatten().to(predicted.device)
        loss = cross_entropy(predicted, targets, reduction="sum")
        loss.backward()
    return float(loss.detach())
