"""First stage: every patch of the vision tower learns the words for the cell that contains it.

A real LLaVA starts from a tower that has learned words from image-text pairs. This one learns them
here: the projected feature of each patch is compared with the embeddings of the words for its
cell's shape, colour, size, digit, row and column, as CLIP compares images with captions.

Shapes: B images, V visual tokens, G groups of words, D hidden, N patches that have a word of a
group, W words of the group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from bench.data.synthetic import Split
from bench.data.synthetic.scenes import IMAGE_SIZE
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
