"""Batches of conversations: many questions share one image, and none attends to another.

Shapes: B images, P tokens of the image and the words before it, R turns of T tokens, D hidden, C
colour channels, H height, W width.

The image is encoded once; each turn continues from its keys and values as if it were the only one,
so that a turn is exactly the single-question prompt of an evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration, LlavaProcessor

from bench.data.synthetic.scenes import Conversation

# A character that neither the template nor a question contains.
_QUESTION_MARKER = "\x00"

# Turns up to this length form one group, longer ones (descriptions) another, so that a few long
# turns do not pad all the others.
_SHORT_TURN = 22


class TurnBatch(NamedTuple):
    """Turns of similar length; `weight` is 0 for tokens that are not part of an answer."""

    image_R: Tensor
    tokens_RT: Tensor
    weight_RT: Tensor


class ConversationBatch(NamedTuple):
    """Inputs of a training step."""

    prefix_P: Tensor
    pixels_BCHW: Tensor
    turns: tuple[TurnBatch, ...]


class ConversationPacker:
    """Renders conversations with the processor's own chat template."""

    def __init__(self, processor: LlavaProcessor, description_weight: float = 1.0) -> None:
        """Find the text that the template puts before and after a question."""
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._description_weight = description_weight
        parts = [{"type": "image"}, {"type": "text", "text": _QUESTION_MARKER}]
        turn = [{"role": "user", "content": parts}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True)
        before, self._after = text.split(_QUESTION_MARKER)
        image = processor.image_token
        self._prefix = self._encode([before.replace(image, image * _visual_tokens(processor))])[0]

    def pack(self, conversations: Sequence[Conversation]) -> ConversationBatch:
        """Encode all turns; the last one of each conversation is its description."""
        turns = [turn for conversation in conversations for turn in conversation.turns]
        # Question and answer are encoded apart, so that no token spans both: in an evaluation, the
        # answer's tokens are generated after those of the question.
        question_ids = self._encode([question + self._after for question, _ in turns])
        answer_ids = self._encode([answer + self._tokenizer.eos_token for _, answer in turns])
        owners = [i for i, each in enumerate(conversations) for _ in each.turns]
        rows: dict[bool, list[_EncodedTurn]] = {True: [], False: []}
        for number, (owner, question, answer) in enumerate(
            zip(owners, question_ids, answer_ids, strict=True)
        ):
            last = number + 1 == len(owners) or owners[number + 1] != owner
            # Divided by the length: every answer counts the same, a description
            # `description_weight` times as much.
            weight = (self._description_weight if last else 1.0) / len(answer)
            weights = [0.0] * len(question) + [weight] * len(answer)
            row = _EncodedTurn(owner, question + answer, weights)
            rows[len(row.tokens) <= _SHORT_TURN].append(row)
        images = [conversation.image for conversation in conversations]
        pixels_BCHW = self._processor.image_processor(images, return_tensors="pt")["pixel_values"]
        together = tuple(self._stack(group) for group in rows.values() if group)
        return ConversationBatch(torch.tensor(self._prefix), pixels_BCHW, together)

    def _stack(self, rows: list[_EncodedTurn]) -> TurnBatch:
        """Pad turns to one length on the right, which causal attention never sees."""
        length = max(len(row.tokens) for row in rows)
        pad = self._tokenizer.pad_token_id
        return TurnBatch(
            torch.tensor([row.image for row in rows]),
            torch.tensor([row.tokens + [pad] * (length - len(row.tokens)) for row in rows]),
            torch.tensor([row.weights + [0.0] * (length - len(row.tokens)) for row in rows]),
        )

    def _encode(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts)["input_ids"]
        return ids


class _EncodedTurn(NamedTuple):
    image: int
    tokens: list[int]
    weights: list[float]


def hidden_states(model: LlavaForConditionalGeneration, batch: ConversationBatch) -> list[Tensor]:
    """Return the decoder's last hidden states of each group of turns, [R, T, D]."""
    decoder = model.model.language_model
    features = model.model.get_image_features(batch.pixels_BCHW, return_dict=True).pooler_output
    words_PD = decoder.embed_tokens(batch.prefix_P)
    words_BPD = words_PD.expand(len(features), *words_PD.shape)
    here_BPD = (batch.prefix_P == model.config.image_token_id)[:, None].expand_as(words_BPD)
    prefix_BPD = words_BPD.masked_scatter(here_BPD, torch.cat(features).to(words_PD.dtype))
    image = decoder(inputs_embeds=prefix_BPD, use_cache=True).past_key_values
    hidden = []
    for turns in batch.turns:
        cache = DynamicCache()
        for layer, entry in enumerate(image.layers):
            # Indexing copies the image's keys and values once per turn; gradients of all turns add
            # up in the one pass over the image.
            cache.update(entry.keys[turns.image_R], entry.values[turns.image_R], layer)
        output = decoder(input_ids=turns.tokens_RT, past_key_values=cache, use_cache=True)
        hidden.append(output.last_hidden_state)
    return hidden


def _visual_tokens(processor: LlavaProcessor) -> int:
    """Return the number of tokens that the processor makes of an image."""
    side = processor.image_processor.crop_size["height"]
    (count,) = processor._get_num_multimodal_tokens([(side, side)]).num_image_tokens
    return int(count)
