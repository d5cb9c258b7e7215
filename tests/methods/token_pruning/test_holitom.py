"""HoliTom on frames as images, against a slow transcription on sequences that get shorter."""

from itertools import combinations, pairwise
from math import ceil

import pytest
import torch
from torch.nn.functional import cosine_similarity

from methods.token_pruning.frames.holitom import HoliTom, static_windows
from tests.methods.token_pruning.recorded_steps import applied, record_steps, removals
from tests.methods.token_pruning.test_dycoke import frames
from tests.methods.token_pruning.test_variants import (
    NAME,
    TOLERANCE,
    Layers,
    N,
    Tower,
    last_logits,
    stock,
)
from tests.methods.visual_engine.masked_reference import masked_reference
from tests.methods.visual_engine.test_visual_equality import text_of
from tests.methods.visual_engine.tiny_mllms import IMAGE, build, prompt


def saved(same, windows):
    return sum(int(same[a:b].all(0).sum()) * (b - a) for a, b in windows if b > a)


def every_cut(count):
    """All ways to cut frames into windows, each as (first, last) pairs."""
    for cuts in range(count):
        for places in combinations(range(1, count), cuts):
            edges = [0, *places, count]
            yield [(a, b - 1) for a, b in pairwise(edges)]


@pytest.mark.parametrize("seed", range(6))
def test_windows_save_as_much_as_any_cut(seed):
    torch.manual_seed(seed)
    same = torch.rand(5, 8) < 0.7
    windows = static_windows(same)
    assert [frame for a, b, _ in windows for frame in range(a, b + 1)] == list(range(6))
    found = saved(same, [(a, b) for a, b, _ in windows])
    assert found == max(saved(same, cut) for cut in every_cut(6))
    for a, b, static in windows:
        assert torch.equal(static, same[a:b].all(0) if b > a else torch.zeros(8).bool())


def test_equal_frames_are_one_window():
    windows = static_windows(torch.ones(2, 196).bool())
    assert [(a, b) for a, b, _ in windows] == [(0, 2)]
    assert saved(torch.ones(2, 196).bool(), [(0, 2)]) == 2 * 196


def similar_frames(call, count, mix):
    """Make later frames nearly equal to the first one."""
    pixels = call["pixel_values"]
    call["pixel_values"] = mix * pixels[:1] + (1 - mix) * pixels
    assert len(pixels) == count
    return call


@pytest.mark.parametrize("keep", [0.25, 0.5])
@pytest.mark.parametrize("count, mix, threshold", [(1, 0, 0.5), (3, 0.9, 0.9), (5, 0.8, 0.8)])
def test_the_release(count, mix, threshold, keep):
    call = similar_frames(prompt(NAME, frames(count), seed=count), count, mix)
    layers = Layers(stock())
    x = layers.embeddings(call)
    starts = (call["input_ids"][0] == IMAGE).nonzero()[:, 0][::N].tolist()
    image = torch.stack([x[start : start + N] for start in starts])
    attention = [
        Tower(stock(), pixels[None]).attention.mean(0)[0, 1:] for pixels in call["pixel_values"]
    ]
    same = torch.zeros(count - 1, N).bool()
    for step, (a, b) in enumerate(pairwise(image)):
        same[step] = cosine_similarity(a, b, dim=1) > threshold
    windows = [(a, b) for a, b, _ in static_windows(same)]
    share = min(1.0, keep / (1 - saved(same, windows) / (count * N)))
    left = [[] for _ in range(count)]
    for first, last in windows:
        static = same[first:last].all(0) if last > first else torch.zeros(N).bool()
        still = static.nonzero()[:, 0].tolist()
        mean = {j: image[first : last + 1, j].mean(0) for j in still}
        left[first] += clustered(mean, round(len(still) * share))
        for frame in range(first, last + 1):
            moving = [j for j in range(N) if not static[j]]
            best = sorted(moving, key=lambda j, f=frame: -float(attention[f][j]))
            chosen = sorted(best[: ceil(len(moving) * share)])
            left[frame] += [image[frame, j] for j in chosen]
            if not left[frame]:  # where the release has nothing of a frame
                left[frame] = [image[frame, attention[frame].argmax()]]
    if count > 1:
        assert any(last > first for first, last in windows)
    parts = []
    for start, kept in zip(starts, left, strict=True):
        parts += [x[start - 1 : start], *(row[None] for row in kept)]
    x = torch.cat([*parts, x[-3:]])
    for index in range(4):
        x = layers.run(index, x, torch.arange(len(x)))
    method = HoliTom(keep=keep, threshold=threshold, positions="renumbered")
    ours, engine = applied(NAME, method)
    assert (last_logits(ours, call) - layers.logits(x)).abs().max() < TOLERANCE
    assert engine.tokens_left() == [tuple(len(kept) for kept in left)]


def clustered(mean, count):
    """What density peaks make of these tokens, by loops, in the order of their places."""
    if not count:
        return []

    def apart(a, b):
        return float((mean[a] - mean[b]).norm()) / len(mean[a]) ** 0.5

    nearest = min(7, count)
    density = {}
    for a in mean:
        near = sorted(apart(a, b) ** 2 for b in mean)[:nearest]
        density[a] = float(torch.tensor(-sum(near) / len(near)).exp())
    most = max(apart(a, b) for a in mean for b in mean)
    lonely = {
        a: min((apart(a, b) for b in mean if density[b] > density[a]), default=most) for a in mean
    }
    centres = sorted(sorted(mean, key=lambda a: -density[a] * lonely[a])[:count])
    joined = {centre: [] for centre in centres}
    for a in mean:
        if a not in joined:
            joined[min(centres, key=lambda c, a=a: apart(a, c))].append(mean[a])
    return [
        0.6 * mean[c] + 0.4 * torch.stack(others).mean(0) if others else mean[c]
        for c, others in joined.items()
    ]


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl"])
def test_skipped_is_masked(name):
    network, engine = applied(name, HoliTom(keep=0.4, threshold=-1.0))
    seen, other = record_steps(engine), build(name)
    call = prompt(name, [1, (4, 6), 1, (4, 6), 1, (4, 6), 2], [2, (4, 6), 3], [4])
    ours = network(**call).logits
    gone = removals(seen, call["input_ids"].shape)
    with masked_reference(other, engine.plan, gone):
        expected = other(**call).logits
    assert (ours - expected)[text_of(call)].abs().max() < TOLERANCE
