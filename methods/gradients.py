"""Gradients of the next-token loss on calibration text.

Shapes: B rows, L tokens a row, V tokens in the vocabulary.
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
    """Let gradients reach all activations and the given weights, and no other weight."""
    before = [(weight, weight.requires_grad) for weight in network.parameters()]
    network.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
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
    """Send rows forward and their loss backward; return the loss.

    The loss is -Σ log p(next token), summed over all tokens, in nats: the gradient at a token
    does not depend on how many rows or tokens go together.
    """
    device = cast(Any, network).get_input_embeddings().weight.device
    rows_BL = rows_BL.to(device)
    with torch.enable_grad():
        logits_BLV = network(input_ids=rows_BL, use_cache=False).logits
        predicted = logits_BLV[:, :-1].flatten(0, 1).float()
        targets = rows_BL[:, 1:].flatten().to(predicted.device)
        loss = cross_entropy(predicted, targets, reduction="sum")
        loss.backward()
    return float(loss.detach())
