"""Counted FLOPs of one call, on the meta device or during a real run, and their split into parts.

One multiply-add is two FLOPs. The total charges attention in full, including masked pairs, because
that is what the kernel is called with; the causal count leaves them out. Shapes: B sequences or
images, L tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from bench.errors import UserError
from bench.measurement.analytic.decoder import ATTENTION, FEED_FORWARD
from bench.measurement.counting import Counted, watch
from bench.measurement.counting.ghost import ghost
from bench.models.vision import Classifier

VISION = ("vision_tower", "visual", "vision_model")
# Qwen's mergers, which take the place of a projector, are submodules of the vision tower.
PROJECTOR = ("multi_modal_projector", "merger", "deepstack_merger_list")
HEAD = ("lm_head",)


def count_text(network: nn.Module, batch: int, length: int) -> tuple[Counted, Counted]:
    """Count a forward over `batch` sequences of `length` tokens, and the token after it.

    The first forward computes logits for all tokens, as scoring does; the second runs on the KV
    cache of the first.

    Raises:
        UserError: the network's control flow depends on values, which the meta device lacks.
    """
    with ghost(network) as call:
        ids_BL = torch.zeros(batch, length + 1, dtype=torch.long, device="meta")
        try:
            with watch() as text:
                cache = call(input_ids=ids_BL[:, :length], use_cache=True).past_key_values
            with watch() as token:
                call(input_ids=ids_BL[:, length:], past_key_values=cache, use_cache=True)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            kind = type(network).__name__
            raise UserError(
                f"{kind} has data-dependent control flow and cannot be counted on the meta device: "
                f"{error}"
            ) from None
    return text, token


def count_images(network: Classifier, batch: int) -> Counted:
    """Count one forward over `batch` images of the network's input size."""
    config = network.config
    shape = (batch, config.channels, config.size, config.size)
    with ghost(network) as call:
        image_BCHH = torch.zeros(shape, dtype=torch.bfloat16, device="meta")
        with watch() as counted:
            call(image_BCHH)
    return counted


def language_parts(counted: Counted) -> dict[str, int]:
    """Split FLOPs by module into attention, feed-forward, head and other."""
    parts = {
        "attention": counted.below(*ATTENTION),
        "feed_forward": counted.below(*FEED_FORWARD),
        "head": counted.below(*HEAD),
    }
    return {**parts, "other": counted.total - sum(parts.values())}


def multimodal_parts(counted: Counted) -> dict[str, int]:
    """Split FLOPs into vision tower, projector, decoder and head.

    FLOPs of a method count as the decoder's, except where it runs the tower or the projector again.
    """
    # The decoder is the remainder, so the parts always add up to the total.
    projector, head = counted.below(*PROJECTOR), counted.below(*HEAD)
    vision = counted.below(*VISION) - counted.below(*PROJECTOR, within=VISION)
    decoder = counted.total - vision - projector - head
    return {"vision": vision, "projector": projector, "decoder": decoder, "head": head}


def image_parts(counted: Counted) -> dict[str, int]:
    """Split FLOPs by operator into convolutions, dense layers and other."""
    # By operator instead of by module: each classifier architecture names its modules differently.
    kinds: dict[Any, int] = counted.modules.get("Global", {})
    convolution = sum(flops for kind, flops in kinds.items() if "convolution" in str(kind))
    dense = sum(flops for kind, flops in kinds.items() if "mm" in str(kind))
    other = counted.total - convolution - dense
    return {"convolution": convolution, "dense": dense, "other": other}
