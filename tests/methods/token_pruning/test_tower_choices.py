"""HiPrune and VisPruner against slow transcriptions on the tower's own attention and features."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from bench.errors import UserError
from methods.token_pruning.divprune import DivPrune
from methods.token_pruning.hiprune import HiPrune, with_neighbours
from methods.token_pruning.vispruner import VisPruner, drop_duplicates
from tests.methods.token_pruning.recorded_steps import applied, record_steps, removals
from tests.methods.token_pruning.test_variants import NAME, N, Tower, a_prompt, stock
from tests.methods.visual_engine.masked_reference import masked_reference
from tests.methods.visual_engine.test_visual_equality import text_of
from tests.methods.visual_engine.tiny_mllms import build, prompt

SIDE = 5


def chosen(method, call):
    network, engine = applied(NAME, method)
    seen = record_steps(engine)
    network(**call)
    return set(seen[0].choice.keep_IM[0].nonzero()[:, 0].tolist())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("keep, alpha", [(10, 0.6), (12, 1.0), (7, 0.1), (25, 1.0)])
def test_hiprune(seed, variant, keep, alpha):
    call, network = a_prompt(seed), stock()
    vision = network.model.vision_tower
    found = vision(call["pixel_values"], output_attentions=True).attentions
    # Over heads and all queries, the class token's included; its own column is left out.
    middle, deep = (found[layer][0].mean((0, 1))[1:] for layer in (1, 0))
    anchors = middle.argsort(descending=True)[: round(alpha * keep / 5)].tolist()
    around = set(anchors)
    for anchor in anchors:
        for step in (-1, 1, -SIDE, SIDE):
            place = anchor + step
            if variant == "release":
                around.add(min(max(place, 0), N - 1))
            elif 0 <= place < N:
                around.add(place)
    around = set(sorted(around, key=lambda j: -deep[j])[:keep])
    rest = sorted((j for j in range(N) if j not in around), key=lambda j: -deep[j])
    wanted = around | set(rest[: keep - len(around)])
    method = HiPrune(keep=keep, alpha=alpha, object_layer=1.0, variant=variant)
    if keep == N:
        assert len(wanted) == N  # and there is nothing to choose
    else:
        assert chosen(method, call) == wanted


def test_an_anchor_in_the_middle_has_four_neighbours():
    marked = torch.zeros(1, 25, dtype=torch.bool)
    marked[0, 12] = True
    found = with_neighbours(marked, torch.ones_like(marked), [5], clamp=False)
    assert found[0].nonzero()[:, 0].tolist() == [7, 11, 12, 13, 17]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep, important", [(8, 0.5), (9, 0.75), (3, 0.0), (16, 0.3), (1, 1.0)])
def test_vispruner(seed, keep, important):
    call, network = a_prompt(seed), stock()
    tower = Tower(network, call["pixel_values"])
    x, received = tower.features[1:], tower.attention.mean(0)[0, 1:]
    order = received.argsort(descending=True).tolist()
    first = int(keep * important)
    rest = order[first:]
    while len(rest) > keep - first:
        even, odd = rest[::2], rest[1::2]
        similar = {
            a: max((float(cosine_similarity(x[a], x[b], dim=0)) for b in odd), default=0.0)
            for a in even
        }
        ranked = sorted(even, key=lambda a: -similar[a])
        rest = ranked[min(8, len(rest) - (keep - first), len(even)) :] + odd
    assert chosen(VisPruner(keep=keep, important=important), call) == {*order[:first], *rest}


def test_two_that_are_dropped_in_one_round_are_both_at_even_places():
    unit = torch.nn.functional.normalize(torch.randn(6, 4), dim=-1)
    left = drop_duplicates(torch.tensor([2, 3, 4, 5]), unit, 2)
    assert left.tolist() == [3, 5]


@pytest.mark.parametrize(
    "method", [HiPrune(keep=6, alpha=0.8), VisPruner(keep=6)], ids=["hiprune", "vispruner"]
)
def test_skipped_is_masked(method):
    network, engine = applied(NAME, method)
    seen, other = record_steps(engine), build(NAME)
    call = prompt(NAME, [2, (5, 5), 6], [7, (5, 5), 2, (5, 5), 3], [9])
    ours = network(**call).logits
    gone = removals(seen, call["input_ids"].shape)
    with masked_reference(other, engine.plan, gone):
        expected = other(**call).logits
    assert (ours - expected)[text_of(call)].abs().max() < 1e-5
    assert all(seen[0].choice.keep_IM.sum(1) == 6)


def test_hiprune_needs_whole_images_and_a_class_token():
    network, _ = applied(NAME, DivPrune(keep=9), HiPrune(keep=5))
    with pytest.raises(UserError, match="hiprune needs whole images"):
        network(**a_prompt(0))
    with pytest.raises(UserError, match=r"layer 0\.375 of the vision tower of qwen2_vl"):
        applied("qwen2_vl", HiPrune(keep=5))
