"""Analytic cost of a language model: one forward that scores text, and one generated token."""

from __future__ import annotations

from torch import nn

from bench.measurement.analytic.decoder import decoder, head, text_config
from bench.measurement.analytic.layout import Layout
from bench.models.anatomy import Anatomy
from bench.models.products import Product


def forward(network: nn.Module, anatomy: Anatomy, batch: int, length: int) -> list[Product]:
    """Return the multiply-adds of `batch` sequences of `length` tokens with logits for every token.

    Raises:
        UserError: a part of the network has no analytic FLOP formula.
    """
    layout = Layout.text(batch, length)
    layers = decoder(anatomy.layers, text_config(network), layout)
    return [*layers, head(network, batch * length)]


def token(network: nn.Module, anatomy: Anatomy, batch: int, length: int) -> list[Product]:
    """Return the multiply-adds of the next token of `batch` sequences with `length` cached tokens.

    Raises:
        UserError: a part of the network has no analytic FLOP formula.
    """
    layout = Layout.text(batch, 1, past=length)
    return [*decoder(anatomy.layers, text_config(network), layout), head(network, batch)]
