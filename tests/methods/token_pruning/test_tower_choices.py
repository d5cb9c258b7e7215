"""HiPrune, VisPruner and AgilePruner against slow transcriptions on the tower's own values."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from bench.errors import UserError
from methods.token_pruning.divprune import DivPrune
from methods.token_pruning.tower.agilepruner import (
    AgilePruner,
    cosine_distances,
    effective_rank,
    take_apart,
    token_products,
)
from methods.token_pruning.tower.hiprune import HiPrune, with_neighbours
from methods.token_pruning.tower.vispruner import VisPruner, drop_duplicates
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
@pytest.mark.parametrize("keep, important", [(8, 0.5), (9, 0.75), (3, 0.0), (16, 0.3), (2, 1.0)])
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


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("keep, threshold, average", [(8, 0.25, 5), (8, 2, 1), (3, 0.1, 0.5)])
def test_agilepruner(seed, keep, threshold, average):
    call, network = a_prompt(seed), stock()
    tower = Tower(network, call["pixel_values"])
    x, received = tower.features[1:], tower.attention.mean(0)[0, 1:]
    singular = torch.linalg.svdvals(x.double())
    share = singular / singular.sum()
    erank = float((-share * share.log()).sum().exp())
    order = received.argsort(descending=True).tolist()
    left, taken = list(order), []
    for place, i in enumerate(order, start=1):
        if i not in left or len(taken) == keep:
            continue
        taken.append(i)
        tau = min(threshold, place * erank / average * 0.01)
        left = [j for j in left if 1 - float(cosine_similarity(x[i], x[j], dim=0)) >= tau]
    dropped = [j for j in order if j not in taken]
    wanted = {*taken, *dropped[: keep - len(taken)]}
    method = AgilePruner(keep=keep, threshold=threshold, average_rank=average)
    assert chosen(method, call) == wanted
    plain = VisPruner(keep=keep, important=1.0)  # attention alone
    assert chosen(AgilePruner(keep=keep, threshold=0.0), call) == chosen(plain, call)


def test_tokens_that_are_taken_are_apart():
    torch.manual_seed(0)
    x, valid = torch.randn(2, 30, 5), torch.ones(2, 30, dtype=torch.bool)
    valid[1, 20:] = False
    products = token_products(x, valid)
    far = cosine_distances(products)
    unit = torch.nn.functional.normalize(x[0].double(), dim=-1)
    assert torch.allclose(far[0], 1 - unit @ unit.T)
    order = torch.stack([torch.randperm(30), torch.arange(30)])
    taken = take_apart(far, order, torch.full((2, 30), 0.4))
    both = taken[0][:, None] & taken[0][None, :] & ~torch.eye(30, dtype=torch.bool)
    assert taken[0].sum() > 3 and far[0][both].min() >= 0.4
    # And whatever was dropped is close to one that was taken before it.
    place = order[0].argsort()
    earlier = place[None, :] < place[:, None]
    near = (far[0] < 0.4) & earlier & taken[0]
    assert torch.equal(near.any(1), ~taken[0])
    # Padding is no token; of orthogonal ones each counts.
    alone = effective_rank(token_products(x[1:, :20], valid[1:, :20]))
    assert torch.allclose(effective_rank(products)[1:], alone)
    ranks = effective_rank(token_products(torch.eye(4)[None], valid[:1, :4]))
    assert ranks.tolist() == pytest.approx([4.0])
    assert effective_rank(torch.zeros(1, 3, 3, dtype=torch.float64)).tolist() == [0.0]


@pytest.mark.parametrize(
    "method",
    [HiPrune(keep=6, alpha=0.8), VisPruner(keep=6), AgilePruner(keep=6, average_rank=3)],
    ids=["hiprune", "vispruner", "agilepruner"],
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
