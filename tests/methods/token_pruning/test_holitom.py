"""HoliTom on frames as images, against a slow transcription on sequences that get shorter."""

from itertools import combinations, pairwise
from math import ceil

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from methods.token_pruning.frames.holitom import HoliTom, folded, static_windows
from tests.measurement.flops.agreement import agree
from tests.methods.token_pruning.recorded_steps import (
    CONTEXT,
    applied,
    loaded,
    record_steps,
    removals,
)
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


def folded_by_steps(x, kept, image):
    """Rows of a sequence without the image rows that are not kept, each folded into another."""
    x, unit = x.clone(), normalize(x, dim=-1)
    for row in image:
        if row not in kept:
            closest = max(kept, key=lambda k, row=row: float(unit[row] @ unit[k]))
            x[closest] = (x[closest] + x[row]) / 2
    return x


def inside_the_decoder(layers, x, image, drop):
    """The release's second part after two layers: rows that are left, and their positions."""
    attention = layers.weights[:, -1].mean(0)
    best = sorted(image, key=lambda row: -float(attention[row]))
    kept = best[: round(len(image) * (1 - drop))]
    x = folded_by_steps(x, kept, image)
    rows = [row for row in range(len(x)) if row not in image or row in kept]
    return x[rows], torch.tensor(rows)


@pytest.mark.parametrize("drop", [0.0, 0.4])
@pytest.mark.parametrize("keep", [0.25, 0.5])
@pytest.mark.parametrize("count, mix, threshold", [(1, 0, 0.5), (3, 0.9, 0.9), (5, 0.8, 0.8)])
def test_the_release(count, mix, threshold, keep, drop):
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
    parts, rows = [], []
    for start, kept in zip(starts, left, strict=True):
        parts += [x[start - 1 : start], *(row[None] for row in kept)]
        rows += range(len(parts) - len(kept), len(parts))
    x = torch.cat([*parts, x[-3:]])
    places = torch.arange(len(x))
    for index in range(4):
        if drop and index == 2:
            x, places = inside_the_decoder(layers, x, rows, drop)
        x = layers.run(index, x, places)
    method = HoliTom(keep=keep, threshold=threshold, positions="renumbered", layer=0.5, drop=drop)
    ours, engine = applied(NAME, method)
    seen = record_steps(engine)
    logits = last_logits(ours, call)
    assert engine.tokens_left()[0] == tuple(len(kept) for kept in left)
    if drop and seen[1].choice.keep_IM.sum() > round(len(rows) * (1 - drop)):
        return  # the release would leave nothing of some frame
    assert (logits - layers.logits(x)).abs().max() < TOLERANCE


def test_folding_halves_what_came_before():
    kept = torch.tensor([True, False, False, True, False])
    x = torch.tensor([[8.0, 0.0], [4.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    assert folded(x, kept)[kept].tolist() == [[4.0, 0.0], [0.0, 2.0]]
    torch.manual_seed(1)
    x, kept = torch.randn(30, 4), torch.rand(30) < 0.3
    wanted = folded_by_steps(x, kept.nonzero()[:, 0].tolist(), list(range(30)))
    assert torch.allclose(folded(x, kept)[kept], wanted[kept], atol=1e-6)
    assert torch.equal(folded(x, torch.ones(30).bool()), x)


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


def test_both_parts_say_what_they_cost():
    from bench.measurement.flops import analytic_vlm
    from bench.measurement.image_prompt import count_prefill

    model = loaded(NAME)
    call = similar_frames(prompt(NAME, frames(3), seed=2), 3, 0.9)
    HoliTom(keep=0.5, threshold=0.9, layer=0.5, drop=0.4).apply(model, CONTEXT)
    products = analytic_vlm.image_prompt_macs(model.network, model.structure, call)
    agree(count_prefill(model, call)[0], products)


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl"])
def test_skipped_is_masked(name):
    network, engine = applied(name, HoliTom(keep=0.4, threshold=-1.0, layer=0.5, drop=0.4))
    seen, other = record_steps(engine), build(name)
    call = prompt(name, [1, (4, 6), 1, (4, 6), 1, (4, 6), 2], [2, (4, 6), 3], [4])
    ours = network(**call).logits
    gone = removals(seen, call["input_ids"].shape)
    with masked_reference(other, engine.plan, gone):
        expected = other(**call).logits
    assert (ours - expected)[text_of(call)].abs().max() < TOLERANCE
