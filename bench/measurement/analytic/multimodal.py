"""A vision-language model: the prefill of one prompt with images, and the token after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bench.errors import UserError
from bench.measurement.analytic.decoder import decoder, head, text_config
from bench.measurement.analytic.layout import Layout
from bench.measurement.analytic.tower import tower
from bench.models.anatomy import Anatomy
from bench.models.multimodal import VisualTokens, locate
from bench.models.multimodal.planned import VisualLayer, plan_of
from bench.models.products import Product

Inputs = Mapping[str, Any]


@torch.no_grad()
def prefill(network: nn.Module, anatomy: Anatomy, inputs: Inputs) -> list[Product]:
    """Return the products of a prompt with its images, and the logits of its last token.

    Raises:
        UserError: there is no image, or a part is of a kind whose arithmetic is not known.
    """
    marked = _located(network, inputs).mask
    plan = plan_of(network)
    planned = None if plan is None else plan.prefill(inputs)
    if planned is None:
        planned = list(decoder(anatomy.layers, text_config(network), Layout.prompt(marked)))
    vision = tower(network, inputs, int(marked.sum()))
    return [*vision, *planned, head(network, len(marked))]


@torch.no_grad()
def token_after(network: nn.Module, anatomy: Anatomy, inputs: Inputs) -> list[Product]:
    """Return the products of the first token that is generated after a prompt.

    Raises:
        UserError: there is no image, or the decoder is of a kind whose arithmetic is not known.
    """
    batch, length = _located(network, inputs).mask.shape
    plan = plan_of(network)
    planned = None if plan is None else plan.token(inputs)
    if planned is None:
        layout = Layout.text(batch, 1, past=length)
        planned = list(decoder(anatomy.layers, text_config(network), layout))
    return [*planned, head(network, batch)]


@torch.no_grad()
def visual_layers(network: nn.Module, anatomy: Anatomy, inputs: Inputs) -> list[VisualLayer]:
    """Return every layer of the decoder as papers count it."""
    plan = plan_of(network)
    if plan is not None:
        return plan.layers(inputs)
    visual = int(_located(network, inputs).mask.sum())
    return [VisualLayer(visual)] * len(anatomy.layers)


def _located(network: nn.Module, inputs: Inputs) -> VisualTokens:
    """Return where the visual tokens are."""
    tokens = locate(network, inputs)
    if tokens is None:
        raise UserError("the call brings no image, so it has no visual tokens to count")
    return tokens
