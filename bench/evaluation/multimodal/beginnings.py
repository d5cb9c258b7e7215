"""Prefixes that questions about the same images share: found, computed once, given to each.

Suffixes: I prefixes, B questions, T padded length.
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
"""A processor's output for one prompt."""

PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""Outputs of processors with one entry per token; the remaining ones describe images."""


@dataclass(frozen=True)
class Start:
    """The first `length` tokens, images included, of the questions at `places` of a batch."""

    places: tuple[int, ...]
    length: int


def unfit(model: Model) -> str | None:
    """Return why every prompt must be computed whole, or None if prefixes can be shared."""
    if model.needs_prompt:
        return "a method needs whole prompts"
    foreign, reach = foreign_layers(model.network), window(model.network)
    if foreign is not None:
        return f"the network has {foreign} layers"
    # A sliding cache keeps the last `window` tokens only, so a row would not hold its whole prefix.
    # A window as long as the model's context never slides.
    if reach is not None and reach < model.max_length:
        return f"the network has sliding attention over {reach} tokens"
    return None


def starts(encoded: Sequence[Encoded], hashes: Sequence[str | None], config: Any) -> list[Start]:
    """Return the prefixes that two or more prompts about the same images share.

    A prefix contains all images of its prompts and leaves at least one token of each prompt.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place, seen in enumerate(hashes):
        if seen is not None:
            places[seen].append(place)
    found = []
    for alike in places.values():
        rows = [encoded[place]["input_ids"][0] for place in alike]
        # A token of its own for every prompt: the first token of an answer is predicted by a
        # forward over the rest of the prompt, which must not be empty.
        length = min(len(row) - 1 for row in rows)
        for row in rows[1:]:
            differs = (row[:length] != rows[0][:length]).nonzero()
            length = int(differs[0]) if len(differs) else length
        # All image tokens must lie in the prefix: the rest of a prompt is passed as token ids
        # alone, without pixels or features.
        shown = (rows[0] == config.image_token_id).nonzero()
        if len(alike) > 1 and len(shown) and int(shown[-1]) < length:
            found.append(Start(tuple(alike), length))
    return found


def part(row: Encoded, first: int, last: int | None) -> Encoded:
    """Return a prompt's tokens from `first` to `last`, together with all of its images."""
    return {n: value[:, first:last] if n in PER_TOKEN else value for n, value in row.items()}


def prefill(network: Any, inputs: dict[str, Any]) -> Any:
    """Return the KV cache of prompts that are padded on the left."""
    # forward counts positions from 0 at the padding; only `generate` derives them from the mask.
    # Since padding is on the left, they must be counted from the first real token. M-RoPE networks
    # compute their own positions, of three components, from the same mask.
    if not turns_in_three(network):
        count_IT = inputs["attention_mask"].cumsum(-1) - 1
        inputs = {**inputs, "position_ids": count_IT.clamp(min=0)}
    return network(**inputs, use_cache=True, logits_to_keep=1).past_key_values


def spread(network: Any, cache: Any, owner_B: Tensor) -> None:
    """Give each question its prefix, in place: the cache then has one row per question."""
    cache.layers = [roomy(layer, owner_B) for layer in cache.layers]
    # The offset between tokens and M-RoPE positions is state of the model, one row per row of the
    # last prefill, and not part of the cache: it must follow the rows, or decoding continues at
    # another prompt's position.
    if turns_in_three(network):
        network.model.rope_deltas = network.model.rope_deltas[owner_B]


def turns_in_three(network: Any) -> bool:
    """Whether the network uses M-RoPE, whose positions it computes itself."""
    return hasattr(getattr(network, "model", None), "rope_deltas")


def put(texts: list[str], places: Sequence[int], answers: Sequence[str]) -> None:
    """Write answers into `texts` at the given places."""
    for place, answer in zip(places, answers, strict=True):
        texts[place] = answer
