"""Analytic cost of a vision-language model: prefill of an image prompt, and the token after it."""

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
    """Return the multiply-adds of a prompt with its images and of the logits of its last token.

    Raises:
        UserError: there is no image, or a part has no analytic FLOP formula.
    """
    marked = _located(network, inputs).mask
    # A method that skips work leaves its own FLOP account on the network; it returns None where
    # the stock decoder is unchanged.
    plan = plan_of(network)
    planned = None if plan is None else plan.prefill(inputs)
    if planned is None:
        planned = list(decoder(anatomy.layers, text_config(network), Layout.prompt(marked)))
    vision = tower(network, inputs, int(marked.sum()))
    return [*vision, *planned, head(network, len(marked))]


@torch.no_grad()
def token_after(network: nn.Module, anatomy: Anatomy, inputs: Inputs) -> list[Product]:
    """Return the multiply-adds of the first token generated after a prompt.

    Raises:
        UserError: there is no image, or the decoder has no analytic FLOP formula.
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
    """Return per decoder layer the quantities that papers' FLOP conventions use."""
    plan = plan_of(network)
    if plan is not None:
        return plan.layers(inputs)
    # Without a method every layer sees all visual tokens with all heads and neurons.
    visual = int(_located(network, inputs).mask.sum())
    return [VisualLayer(visual)] * len(anatomy.layers)


def _located(network: nn.Module, inputs: Inputs) -> VisualTokens:
    tokens = locate(network, inputs)
    if tokens is None:
        raise UserError("the inputs contain no image, so there are no visual tokens to count")
    return tokens
