"""Objectives of micro_llava: what its patches are called, then the answers to questions.

Alignment: every patch of the vision tower learns the words for the cell that contains it. A real
LLaVA starts from a tower that has learned words from image-text pairs. This one learns them here:
the projected feature of each patch is compared with the embeddings of the words for its cell's
shape, colour, size, digit, row and column, as CLIP compares images with captions.

Answers: many questions share one image, and none attends to another. The image is encoded once;
each turn continues from its keys and values as if it were the only one, so that a turn is exactly
the single-question prompt of an evaluation.

Shapes: B images, V visual tokens, G groups of words, N patches that have a word of a group or
tokens that are part of an answer, W words of a group, P tokens of the image and the words before
it, R turns of T tokens, D hidden, C colour channels, H and W the sides of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, LlavaForConditionalGeneration, LlavaProcessor

from bench.data.synthetic import Split
from bench.data.synthetic.scenes import IMAGE_SIZE, Conversation
from bench.data.synthetic.scenes.scene import (
    BORDER,
    CELL_SIZE,
    COLORS,
    COLUMNS,
    DIGITS,
    GRID,
    ROWS,
    SHAPES,
    SIZES,
    DrawnShape,
    Scene,
    draw_scene,
    generate_scene,
)
from bench.models.embedded.micro_llava.network import PATCH

WORD_GROUPS = ((*SHAPES, "number", "empty"), COLORS, SIZES, DIGITS, ROWS, COLUMNS)

# The label that `cross_entropy` ignores by default.
_IGNORED = -100

# A character that neither the template nor a question contains.
_QUESTION_MARKER = "\x00"

# Turns up to this length form one group, longer ones (descriptions) another, so that a few long
# turns do not pad all the others.
_SHORT_TURN = 22


class LabelledPatches(NamedTuple):
    """Images, and the index of each patch's word in each group, -100 for none."""

    pixels_BCHW: Tensor
    words_BVG: Tensor


class Aligner:
    """Draws scenes with labelled patches, and computes the loss on them."""

    def __init__(self, processor: LlavaProcessor) -> None:
        """Look up each group's words in the vocabulary, with and without a leading space."""
        self._processor = processor
        forms = [list(group) for group in WORD_GROUPS]
        forms += [[f" {word}" for word in group] for group in WORD_GROUPS]
        encoded = [processor.tokenizer(group)["input_ids"] for group in forms]
        self._vocabulary = [
            (number % len(WORD_GROUPS), torch.tensor(ids).flatten())
            for number, ids in enumerate(encoded)
            # A group is compared with single embeddings, so one with a word of several tokens is
            # left out. Byte-level BPE encodes a word at the start of a text and inside it as
            # different tokens: the model needs both.
            if all(len(word) == 1 for word in ids)
        ]

    def patches(self, split: Split, start: int, images: int) -> LabelledPatches:
        """Draw scenes and label their patches."""
        drawn = [generate_scene(split, start + number) for number in range(images)]
        pictures = [draw_scene(each) for each in drawn]
        pixels_BCHW = self._processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return LabelledPatches(pixels_BCHW, torch.tensor([_patch_labels(each) for each in drawn]))

    def loss(self, model: LlavaForConditionalGeneration, patches: LabelledPatches) -> Tensor:
        """Return the sum over groups of the mean loss on their words."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = model.model.get_image_features(patches.pixels_BCHW, return_dict=True)
        features_BVD = torch.stack(features.pooler_output).float()
        embedding = model.get_input_embeddings().weight
        total = torch.zeros(())
        for group, ids_W in self._vocabulary:
            word_BV = patches.words_BVG[..., group]
            # The decoder later reads these features in its embedding space, so the classes are the
            # word embeddings themselves and no head has to be thrown away.
            logits_NW = features_BVD[word_BV != _IGNORED] @ embedding[ids_W].T
            total = total + cross_entropy(logits_NW, word_BV[word_BV != _IGNORED])
        return total


def _patch_labels(scene: Scene) -> list[list[int]]:
    """Return the word indices of every patch, in the order of the visual tokens."""
    side = range(IMAGE_SIZE // PATCH)
    # The upper left corner of a patch decides its cell; floor division gives -1 in the border.
    cells = [(y * PATCH - BORDER) // CELL_SIZE for y in side]
    return [_cell_labels(scene, row, column) for row in cells for column in cells]


def _cell_labels(scene: Scene, row: int, column: int) -> list[int]:
    """Return the word indices of a cell; outside the grid only `empty` applies."""
    empty, number = WORD_GROUPS[0].index("empty"), WORD_GROUPS[0].index("number")
    if not (0 <= row < GRID and 0 <= column < GRID):
        return [empty, _IGNORED, _IGNORED, _IGNORED, _IGNORED, _IGNORED]
    thing = scene.cells[row * GRID + column]
    if thing is None:
        return [empty, _IGNORED, _IGNORED, _IGNORED, row, column]
    if isinstance(thing, DrawnShape):
        named = [SHAPES.index(thing.shape), COLORS.index(thing.color), SIZES.index(thing.size)]
        return [*named, _IGNORED, row, column]
    return [number, _IGNORED, _IGNORED, DIGITS.index(thing.value), row, column]


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


def answer_loss(model: LlavaForConditionalGeneration, batch: ConversationBatch) -> Tensor:
    """Return the mean over turns of the loss on their answers."""
    losses, weights = [], []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for hidden_RTD, turns in zip(hidden_states(model, batch), batch.turns, strict=True):
            # The head is applied to answer tokens only, a small part of all positions.
            counted_RT = turns.weight_RT[:, 1:] > 0
            logits_NV = model.lm_head(hidden_RTD[:, :-1][counted_RT])
            answer_N = turns.tokens_RT[:, 1:][counted_RT]
            losses.append(cross_entropy(logits_NV.float(), answer_N, reduction="none"))
            weights.append(turns.weight_RT[:, 1:][counted_RT])
    weight_N = torch.cat(weights)
    return (torch.cat(losses) * weight_N).sum() / weight_N.sum()


def _visual_tokens(processor: LlavaProcessor) -> int:
    """Return the number of tokens that the processor makes of an image."""
    side = processor.image_processor.crop_size["height"]
    (count,) = processor._get_num_multimodal_tokens([(side, side)]).num_image_tokens
    return int(count)
