"""What questions about the same images begin with: found, computed once, and handed to each.

Suffixes: I beginnings, B questions, T padded length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from bench.evaluation.attention import foreign_layers, window
from bench.evaluation.multimodal.roomy import roomy
from bench.models.model import Model

Encoded: TypeAlias = dict[str, Any]
"""What a processor makes of one prompt."""

PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""What processors say about each token; the rest of what they return is about images."""


@dataclass(frozen=True)
class Start:
    """The first `length` tokens, images included, of the questions at some places of a batch."""

    places: tuple[int, ...]
    length: int


def unfit(model: Model) -> str | None:
    """Return why every prompt must come whole, or None when it need not."""
    if model.needs_prompt:
        return "a method looks at whole prompts"
    foreign, reach = foreign_layers(model.network), window(model.network)
    if foreign is not None:
        return f"the network has layers of {foreign}"
    if reach is not None and reach < model.max_length:
        return f"the network has layers that look back {reach} tokens only"
    return None


def starts(encoded: Sequence[Encoded], hashes: Sequence[str | None], config: Any) -> list[Start]:
    """Return what two or more prompts about the same images have in common.

    All of the images must be in it, and a token of every prompt after it.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place, seen in enumerate(hashes):
        if seen is not None:
            places[seen].append(place)
    found = []
    for alike in places.values():
        rows = [encoded[place]["input_ids"][0] for place in alike]
        length = min(len(row) - 1 for row in rows)
        for row in rows[1:]:
            differs = (row[:length] != rows[0][:length]).nonzero()
            length = int(differs[0]) if len(differs) else length
        shown = (rows[0] == config.image_token_id).nonzero()
        if len(alike) > 1 and len(shown) and int(shown[-1]) < length:
            found.append(Start(tuple(alike), length))
    return found


def part(row: Encoded, first: int, last: int | None) -> Encoded:
    """Return a prompt's tokens from `first` to `last`, its images with them."""
    return {n: value[:, first:last] if n in PER_TOKEN else value for n, value in row.items()}


def prefill(network: Any, inputs: dict[str, Any]) -> Any:
    """Return the cache that a network makes of prompts that are padded on the left."""
    if not turns_in_three(network):
        count_IT = inputs["attention_mask"].cumsum(-1) - 1
        inputs = {**inputs, "position_ids": count_IT.clamp(min=0)}
    return network(**inputs, use_cache=True, logits_to_keep=1).past_key_values


def spread(network: Any, cache: Any, owner_B: Tensor) -> None:
    """Give every question its beginning, in place: the cache then has a row for each."""
    cache.layers = [roomy(layer, owner_B) for layer in cache.layers]
    if turns_in_three(network):
        network.model.rope_deltas = network.model.rope_deltas[owner_B]


def turns_in_three(network: Any) -> bool:
    """Whether positions are those of rows and columns, too, which the network finds itself."""
    return hasattr(getattr(network, "model", None), "rope_deltas")


def put(texts: list[str], places: Sequence[int], answers: Sequence[str]) -> None:
    """Write answers to their places."""
    for place, answer in zip(places, answers, strict=True):
        texts[place] = answer
