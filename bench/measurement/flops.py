"""FLOPs of one call, counted by PyTorch's dispatcher on the meta device or while it really runs.

One multiply-add is two FLOPs. The total charges attention in full, masked pairs included, since
that is what a kernel is asked for; `Counted.causal` leaves them out. Shapes: B sequences or images,
L tokens.
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
# Qwen's mergers, the projector's counterpart, are inside the tower.
PROJECTOR = ("multi_modal_projector", "merger", "deepstack_merger_list")
HEAD = ("lm_head",)


def count_text(network: nn.Module, batch: int, length: int) -> tuple[Counted, Counted]:
    """Count `batch` sequences of `length` tokens, and the token after them.

    The first is one forward with the logits of all tokens, as text is scored; the second finds
    their keys and values cached.

    Raises:
        UserError: what the network computes depends on values, which do not exist on that device.
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
            raise UserError(f"what {kind} computes depends on values: {error}") from None
    return text, token


def count_images(network: Classifier, batch: int) -> Counted:
    """Count one forward over `batch` images of the size that the network is built for."""
    config = network.config
    shape = (batch, config.channels, config.size, config.size)
    with ghost(network) as call:
        image_BCHH = torch.zeros(shape, dtype=torch.bfloat16, device="meta")
        with watch() as counted:
            call(image_BCHH)
    return counted


def language_parts(counted: Counted) -> dict[str, int]:
    """Return FLOPs by the modules they belong to: attention, feed-forward, head, others."""
    parts = {
        "attention": counted.below(*ATTENTION),
        "feed_forward": counted.below(*FEED_FORWARD),
        "head": counted.below(*HEAD),
    }
    return {**parts, "other": counted.total - sum(parts.values())}


def multimodal_parts(counted: Counted) -> dict[str, int]:
    """Return FLOPs of vision tower, projector, decoder and head; a method's own are the decoder's.

    What a method has the tower or the projector do again is theirs.
    """
    projector, head = counted.below(*PROJECTOR), counted.below(*HEAD)
    vision = counted.below(*VISION) - counted.below(*PROJECTOR, within=VISION)
    decoder = counted.total - vision - projector - head
    return {"vision": vision, "projector": projector, "decoder": decoder, "head": head}


def image_parts(counted: Counted) -> dict[str, int]:
    """Return FLOPs of convolutions, dense layers and others, by their operators."""
    kinds: dict[Any, int] = counted.modules.get("Global", {})
    convolution = sum(flops for kind, flops in kinds.items() if "convolution" in str(kind))
    dense = sum(flops for kind, flops in kinds.items() if "mm" in str(kind))
    other = counted.total - convolution - dense
    return {"convolution": convolution, "dense": dense, "other": other}
