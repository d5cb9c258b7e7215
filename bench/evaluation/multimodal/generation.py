"""Greedy answers to questions about images, in real batches.

Suffixes: B batch, T padded length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from bench.errors import UserError
from bench.evaluation.multimodal.prompts import (
    PromptEncoder,
    VisionFeatureCache,
    concatenate_outputs,
    image_hash,
)
from bench.evaluation.multimodal.shared_prefix import (
    PER_TOKEN,
    EncodedPrompt,
    ImagePrefix,
    expand_prefix_cache,
    find_image_prefixes,
    prefill,
    scatter_texts,
    slice_tokens,
)
from bench.models.model import Model

MAX_ANSWER_TOKENS = 1024
"""Default of `max_new_tokens`, as in lmms-eval's own adapters."""


@dataclass(frozen=True)
class ImageQuestion:
    """A task's text for one document, and its images, opened on demand."""

    text: str
    open_images: Callable[[], list[Image.Image]]


@dataclass(frozen=True)
class Answer:
    """An answer, the full prompt, and the hash of the images."""

    text: str
    prompt: str
    image_hash: str | None


class Generation:
    """One set of generation settings, ready to run on batches of questions.

    With `share`, the prefix of questions about the same images is computed once.
    """

    def __init__(
        self,
        model: Model,
        prompts: PromptEncoder,
        features: VisionFeatureCache,
        options: dict[str, Any],
        share: bool = False,
    ) -> None:
        self._share = share
        self._model = model
        network: Any = model.network
        self._network = network
        self._prompts = prompts
        self._features = features
        until = options.get("until") or []
        self._until: list[str] = [until] if isinstance(until, str) else [u for u in until if u]
        self._longest = int(options.get("max_new_tokens") or MAX_ANSWER_TOKENS)
        # The generation config comes first: chat models end a turn with a token that is not the
        # tokenizer's EOS, and may list several.
        own = network.generation_config.eos_token_id
        ends = model.tokenizer.eos_token_id if own is None else own
        self._ends: list[int] = [ends] if isinstance(ends, int) else list(ends or [])
        token = model.tokenizer.pad_token_id
        self._fill = int(token if token is not None else (self._ends or [0])[0])

    @torch.no_grad()
    def run(self, questions: Sequence[ImageQuestion]) -> list[Answer]:
        """Answer questions of any length, padded on the left."""
        shown = [question.open_images() for question in questions]
        hashes = [image_hash(images) if images else None for images in shown]
        written = [
            self._prompts.render(question.text, len(images))
            for question, images in zip(questions, shown, strict=True)
        ]
        encoded = [
            self._prompts.encode(prompt, images)
            for prompt, images in zip(written, shown, strict=True)
        ]
        texts = self._answer(encoded, hashes)
        return [Answer(*each) for each in zip(texts, written, hashes, strict=True)]

    def _answer(self, encoded: list[EncodedPrompt], hashes: list[str | None]) -> list[str]:
        """Answer prompts: in one batch where they share a prefix, in another where they do not."""
        # Two batches, because only one of them has a cache to start from.
        alike = find_image_prefixes(encoded, hashes, self._network.config) if self._share else []
        rooms = [self._room(row["input_ids"].shape[1]) for row in encoded]
        texts = [""] * len(encoded)
        together = [place for start in alike for place in start.places]
        others = [place for place in range(len(encoded)) if place not in set(together)]
        if others:
            rows, seen = [encoded[p] for p in others], [hashes[p] for p in others]
            inputs = self._padded(rows) | self._visual(rows, seen)
            scatter_texts(texts, others, self._continue(inputs, [rooms[p] for p in others]))
        if together:
            inputs = self._begun(alike, encoded, hashes)
            scatter_texts(texts, together, self._continue(inputs, [rooms[p] for p in together]))
        return texts

    def _begun(
        self, alike: Sequence[ImagePrefix], encoded: list[EncodedPrompt], hashes: list[str | None]
    ) -> dict[str, Any]:
        """Compute each prefix once; return the full prompts and a cache of their prefixes."""
        firsts = [encoded[start.places[0]] for start in alike]
        heads = [slice_tokens(row, 0, s.length) for row, s in zip(firsts, alike, strict=True)]
        head = self._padded(heads)
        seen = [hashes[start.places[0]] for start in alike]
        cache = prefill(self._network, head | self._visual(heads, seen))
        owner = [number for number, start in enumerate(alike) for _ in start.places]
        owner_B = torch.tensor(owner, device=self._model.device)
        expand_prefix_cache(self._network, cache, owner_B)
        tails = [
            slice_tokens(encoded[p], start.length, None) for start in alike for p in start.places
        ]
        tail = self._padded(tails)
        # The full prompt is passed although its prefix is in the cache: `generate` feeds only the
        # tokens beyond the cache's length, and needs the mask of all of them. Padding stands before
        # the prefix and between prefix and rest; the mask hides both, and positions are counted
        # from it.
        return {"past_key_values": cache} | {
            name: torch.cat([head[name][owner_B], tail[name]], dim=1)
            for name in ("input_ids", "attention_mask")
        }

    def _room(self, length: int) -> int:
        """Return the maximal length of an answer to a prompt of this length."""
        room = self._model.max_length - length
        if room < 1:
            raise UserError(
                f"a prompt of {length} tokens leaves none for an answer: "
                f"model {self._model.name} takes {self._model.max_length} in total"
            )
        return min(self._longest, room)

    def _padded(self, encoded: Sequence[EncodedPrompt]) -> dict[str, Tensor]:
        """Pad all per-token outputs of the processor to one length."""
        width = max(row["input_ids"].shape[1] for row in encoded)
        names = [name for name in PER_TOKEN if name in encoded[0]]
        fills = {"input_ids": self._fill}
        return {
            name: torch.cat(
                [_pad_left(row[name], width, fills.get(name, 0)) for row in encoded]
            ).to(self._model.device)
            for name in names
        }

    def _visual(
        self, encoded: Sequence[EncodedPrompt], hashes: Sequence[str | None]
    ) -> dict[str, Any]:
        """Return the images as features, or as pixels if the network takes no features."""
        device, dtype = self._model.device, self._network.dtype
        per_row = [
            {
                name: value.to(dtype) if value.is_floating_point() else value
                for name, value in row.items()
                if name not in PER_TOKEN
            }
            for row, seen in zip(encoded, hashes, strict=True)
            if seen is not None
        ]
        if not per_row:
            return {}
        together = {n: torch.cat([row[n] for row in per_row]).to(device) for n in per_row[0]}
        if not self._features.supported:
            return together
        keys = [seen for seen in hashes if seen is not None]
        outputs = [
            self._features.of(key, row, device) for key, row in zip(keys, per_row, strict=True)
        ]
        # Grids stay, as M-RoPE positions are computed from them; pixels would be encoded again.
        grids = {n: value for n, value in together.items() if not n.startswith("pixel_values")}
        return grids | {"mm_encoder_outputs": {"image": concatenate_outputs(outputs)}}

    def _continue(self, inputs: dict[str, Any], rooms: list[int]) -> list[str]:
        width = inputs["input_ids"].shape[1]
        stop = PerRowStopping(self._model.tokenizer, self._until, rooms, width)
        # Every setting is given: a model's generation config may ask for sampling, with a
        # temperature that greedy decoding would warn about.
        made_BT = self._network.generate(
            **inputs,
            max_new_tokens=max(rooms),
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            stopping_criteria=StoppingCriteriaList([stop]),
            eos_token_id=self._ends or None,
            pad_token_id=self._fill,
            use_cache=True,
        )
        rows = zip(made_BT[:, width:].tolist(), rooms, strict=True)
        # A row keeps generating padding until the whole batch is done, hence the cut per row.
        return [self._text(tokens[:room]) for tokens, room in rows]

    def _text(self, tokens: list[int]) -> str:
        """Decode an answer up to its end token and its first stop string."""
        end = next((i for i, token in enumerate(tokens) if token in self._ends), len(tokens))
        text: str = self._model.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        for stop in self._until:
            text = text.partition(stop)[0]
        return text


class PerRowStopping(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed here
    """Stops each row of a batch individually: at a stop string, or at its maximal length."""

    def __init__(self, tokenizer: Any, until: list[str], rooms: list[int], width: int) -> None:
        self._tokenizer = tokenizer
        self._until = until
        self._rooms_B = torch.tensor(rooms)
        self._width = width
        # If each token has a character, a stop string of n characters that ends in the last token
        # lies in the last n tokens. A miss costs time only: `_text` cuts the answer anyway.
        self._tail = max(map(len, until), default=0) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return which rows are done, bool [B]."""
        made_BT = input_ids[:, self._width :]
        full_B = self._rooms_B.to(input_ids.device) <= made_BT.shape[1]
        if not self._until:
            return full_B
        texts = self._tokenizer.batch_decode(made_BT[:, -self._tail :])
        stopped = [any(stop in text for stop in self._until) for text in texts]
        return full_B | torch.tensor(stopped, device=input_ids.device)


def _pad_left(row_1T: Tensor, width: int, fill: int) -> Tensor:
    padding = row_1T.new_full((1, width - row_1T.shape[1]), fill)
    return torch.cat([padding, row_1T], dim=1)
