"""DyCoke on frames as images, against a slow transcription on sequences that get shorter."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from bench.errors import UserError
from methods.token_pruning.frames.dycoke import DyCoke, compared_frames
from tests.methods.token_pruning.recorded_steps import applied, record_steps, removals
from tests.methods.token_pruning.test_variants import (
    NAME,
    TOLERANCE,
    Layers,
    N,
    last_logits,
    stock,
)
from tests.methods.visual_engine.masked_reference import masked_reference
from tests.methods.visual_engine.test_visual_equality import text_of
from tests.methods.visual_engine.tiny_mllms import IMAGE, build, prompt


def frames(count):
    """One word before each frame, three at the end."""
    return [part for _ in range(count) for part in (1, (5, 5))] + [3]


@pytest.mark.parametrize("repeated", [0.7, 0.5])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 8])
def test_the_release(count, repeated):
    """Pairs first, then the third frame of each group but the last; kept by rising similarity."""
    call, layers = prompt(NAME, frames(count), seed=count), Layers(stock())
    x = layers.embeddings(call)
    starts = (call["input_ids"][0] == IMAGE).nonzero()[:, 0][::N].tolist()
    image = [x[start : start + N] for start in starts]

    def least_similar(this, other):
        similar = cosine_similarity(image[this], image[other], dim=1)
        return image[this][similar.topk(int((1 - repeated) * N), largest=False).indices]

    left = list(image)
    for first in range(0, count - 1, 2):
        left[first + 1] = least_similar(first + 1, first)
    for first in range(0, count - 4, 4):
        left[first + 2] = least_similar(first + 2, first)
    rows = [
        part
        for start, kept in zip(starts, left, strict=True)
        for part in (x[start - 1, None], kept)
    ]
    x = torch.cat([*rows, x[-3:]])
    for index in range(4):
        x = layers.run(index, x, torch.arange(len(x)))
    method = DyCoke(variant="release", positions="renumbered", repeated=repeated)
    ours, engine = applied(NAME, method)
    assert (last_logits(ours, call) - layers.logits(x)).abs().max() < TOLERANCE
    assert engine.tokens_left() == [tuple(len(part) for part in left)]


def test_the_paper_compares_every_group_as_far_as_it_goes():
    assert compared_frames(4, last_whole=False) == [(1, 0), (3, 2), (2, 0)]
    assert compared_frames(4, last_whole=True) == [(1, 0), (3, 2)]
    assert compared_frames(7, last_whole=False) == [(1, 0), (3, 2), (2, 0), (5, 4), (6, 4)]
    assert compared_frames(1, last_whole=False) == []


@pytest.mark.parametrize("name", ["llava_llama", "internvl_qwen3", "qwen3_vl"])
def test_skipped_is_masked(name):
    network, engine = applied(name, DyCoke(repeated=0.6))
    seen, other = record_steps(engine), build(name)
    call = prompt(name, [1, (4, 6), 1, (4, 6), 1, (4, 6), 2], [2, (4, 6), 3], [4])
    ours = network(**call).logits
    gone = removals(seen, call["input_ids"].shape)
    assert gone[0].gone_BS[0].any() and not gone[0].gone_BS[1].any()
    with masked_reference(other, engine.plan, gone):
        expected = other(**call).logits
    assert (ours - expected)[text_of(call)].abs().max() < TOLERANCE


def test_frames_of_different_sizes_are_refused():
    network, _ = applied("qwen2_vl", DyCoke())
    with pytest.raises(UserError, match="the images of a prompt differ in size"):
        network(**prompt("qwen2_vl", [1, (4, 6), 1, (4, 4), 2]))
