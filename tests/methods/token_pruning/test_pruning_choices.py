"""Each choice against a slow, direct transcription of its definition, loops over single tokens."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from methods.token_pruning.base import evenly_spaced, top_tokens
from methods.token_pruning.cdpruner import greedy_dpp_map, normalized_relevance
from methods.token_pruning.controls import even_grid_cells
from methods.token_pruning.dart import least_similar_to_pivots, select_pivots
from methods.token_pruning.divprune import farthest_points
from methods.token_pruning.prumerge_plus import PruMergePlus, absorb_neighbours, count_outliers
from methods.token_pruning.scope import greedy_coverage
from methods.token_pruning.sparsevlm import cluster_by_density, cluster_sums, select_raters
from methods.token_pruning.visionzip import merge_into_targets

# Two frames of other sizes and budgets, the shorter one filled up with what must not matter.
COUNTS, KEEP, WIDTH = (9, 6), (4, 3), 24


def frames(seed, width=WIDTH):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(len(COUNTS), max(COUNTS), width, generator=rng)
    valid = torch.arange(max(COUNTS)) < torch.tensor(COUNTS)[:, None]
    x[~valid] = 100.0
    return x, valid, torch.tensor(KEEP), rng


def places(mask):
    return set(mask.nonzero()[:, 0].tolist())


def cos(a, b):
    return float(cosine_similarity(a, b, dim=0))


SEEDS = pytest.mark.parametrize("seed", range(6))


@SEEDS
def test_the_best_are_the_highest_and_of_equals_the_first(seed):
    _, valid, keep, rng = frames(seed)
    score = torch.randint(0, 4, valid.shape, generator=rng).float()
    mask = top_tokens(score, valid, keep)
    for i, (count, k) in enumerate(zip(COUNTS, KEEP, strict=True)):
        order = sorted(range(count), key=lambda j: (-score[i, j], j))
        assert places(mask[i]) == set(order[:k])


@SEEDS
def test_divprune_is_farthest_point_sampling(seed):
    x, valid, keep, _ = frames(seed)
    mask = farthest_points(x, valid, keep)
    for i, (count, k) in enumerate(zip(COUNTS, KEEP, strict=True)):
        tokens = range(count)
        apart = {(a, b): 1 - cos(x[i, a], x[i, b]) for a in tokens for b in tokens}
        chosen = [max(tokens, key=lambda a: min(apart[a, b] for b in tokens if b != a))]
        while len(chosen) < k:
            rest = [a for a in tokens if a not in chosen]
            chosen.append(max(rest, key=lambda a: min(apart[a, b] for b in chosen)))
        assert places(mask[i]) == set(chosen)


@SEEDS
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])  # without saliency two tokens often tie
def test_scope_is_saliency_times_added_coverage(seed, alpha):
    x, valid, keep, rng = frames(seed)
    saliency = torch.rand(valid.shape, generator=rng)
    mask = greedy_coverage(x, saliency, valid, keep, alpha)
    for i, (count, k) in enumerate(zip(COUNTS, KEEP, strict=True)):
        chosen = []

        def gain(v, i=i, count=count, chosen=chosen):
            total = 0.0
            for u in range(count):
                # Before anything is chosen a token is covered to 0, as by a stranger.
                covered = max([0.0, *(cos(x[i, u], x[i, s]) for s in chosen)])
                total += max(cos(x[i, u], x[i, v]) - covered, 0.0)
            return float(saliency[i, v]) ** alpha * total

        while len(chosen) < k:
            chosen.append(max((v for v in range(count) if v not in chosen), key=gain))
        assert places(mask[i]) == set(chosen)


@SEEDS
def test_cdpruner_raises_the_determinant_most(seed):
    x, valid, keep, rng = frames(seed)
    similar = torch.rand(valid.shape, generator=rng)
    r = normalized_relevance(similar, valid)
    mask = greedy_dpp_map(x, r, valid, keep)
    for i, (count, k) in enumerate(zip(COUNTS, KEEP, strict=True)):
        low, high = similar[i, :count].min(), similar[i, :count].max()
        direct = ((similar[i, :count] - low + 1e-6) / (high - low)).double()
        assert torch.allclose(r[i, :count].double(), direct, atol=1e-5)
        unit = torch.nn.functional.normalize(x[i, :count].double(), dim=-1)
        kernel = direct[:, None] * (unit @ unit.T) * direct[None, :]
        chosen = []
        while len(chosen) < k:
            rest = [v for v in range(count) if v not in chosen]
            chosen.append(max(rest, key=lambda v: kernel[[*chosen, v]][:, [*chosen, v]].det()))
        assert places(mask[i]) == set(chosen)


def test_cdpruner_goes_on_when_the_chosen_tokens_span_the_rest():
    x = torch.randn(1, 8, 2, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(1, 8, dtype=torch.bool)
    mask = greedy_dpp_map(x, torch.ones(1, 8), valid, torch.tensor([6]))
    assert mask.sum() == 6


def test_equal_similarities_are_equally_relevant():
    valid = torch.ones(1, 4, dtype=torch.bool)
    assert torch.equal(normalized_relevance(torch.full((1, 4), 0.3), valid), torch.ones(1, 4))


@SEEDS
def test_density_peaks(seed):
    x, valid, _, rng = frames(seed)
    member = valid & (torch.rand(valid.shape, generator=rng) < 0.8)
    count = torch.tensor([3, 2])
    centre, owner, _ = cluster_by_density(x, member, count)
    sums = cluster_sums(x, member, owner)
    for i in range(len(COUNTS)):
        tokens, number = sorted(places(member[i])), int(count[i])
        apart = {
            (a, b): float((x[i, a] - x[i, b]).norm()) / math.sqrt(WIDTH)
            for a in tokens
            for b in tokens
        }
        density = {
            a: math.exp(-sum(sorted(apart[a, b] ** 2 for b in tokens)[:number]) / number)
            for a in tokens
        }
        isolation = {
            a: min(
                (apart[a, b] for b in tokens if density[b] > density[a]),
                default=max(apart.values()),
            )
            for a in tokens
        }
        order = sorted(tokens, key=lambda a: -density[a] * isolation[a])[:number]
        assert places(centre[i]) == set(order)
        owners = {a: a if a in order else min(order, key=lambda c: apart[a, c]) for a in tokens}
        assert {a: int(owner[i, a]) for a in tokens} == owners
        for c in order:
            direct = sum(x[i, a] for a in tokens if owners[a] == c)
            assert torch.allclose(sums[i, c], direct, atol=1e-5)


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_even_distances(total, count, seed):
    allowed = torch.rand(1, total, generator=torch.Generator().manual_seed(seed)) < 0.7
    there = sorted(places(allowed[0]))
    count = min(count, len(there))
    mask = evenly_spaced(allowed, torch.tensor([count]))
    direct = {there[j * len(there) // count] for j in range(count)}
    assert places(mask[0]) == direct and len(direct) == count


@SEEDS
def test_visionzip_merges_by_nearest_key(seed):
    x, valid, _, rng = frames(seed)
    keys = torch.randn(*valid.shape, 5, generator=rng)
    target = torch.zeros_like(valid)
    target[0, [1, 4]] = True
    target[1, 3] = True
    source = valid & ~target & (torch.rand(valid.shape, generator=rng) < 0.7)
    means = merge_into_targets(x, keys, target, source)
    for i in range(len(COUNTS)):
        goals = sorted(places(target[i]))
        joins = {
            a: max(goals, key=lambda t: cos(keys[i, a], keys[i, t])) for a in places(source[i])
        }
        for t in goals:
            group = [x[i, t], *(x[i, a] for a, goal in joins.items() if goal == t)]
            assert torch.allclose(means[i, t], torch.stack(group).mean(0), atol=1e-5)


@SEEDS
def test_prumerge_outliers_and_what_they_absorb(seed):
    import numpy as np

    x, valid, keep, rng = frames(seed)
    attention = torch.rand(valid.shape, generator=rng) ** 6
    attention[~valid] = 9.0
    keys = torch.randn(*valid.shape, 5, generator=rng)
    count_I = count_outliers(attention, valid)
    _, mask = PruMergePlus()._selected(attention, valid, keep)
    states = absorb_neighbours(x, keys, attention, valid, 3)
    for i, (count, k) in enumerate(zip(COUNTS, KEEP, strict=True)):
        values = attention[i, :count].numpy().astype(np.float64)
        low, high = np.percentile(values, 25), np.percentile(values, 75)
        above = max(int((values > high + 1.5 * (high - low)).sum()), 1)
        assert count_I[i] == above
        salient = sorted(range(count), key=lambda j: -values[j])[: min(above, k)]
        rest = [j for j in range(count) if j not in salient]
        spread = {rest[j * len(rest) // (k - len(salient))] for j in range(k - len(salient))}
        assert places(mask[i]) == {*salient, *spread}
        for a in range(count):
            others = sorted(
                (b for b in range(count) if b != a), key=lambda b: -cos(keys[i, a], keys[i, b])
            )
            direct = x[i, a] + sum(float(values[b]) * x[i, b] for b in others[:3])
            assert torch.allclose(states[i, a], direct, atol=1e-4)


@SEEDS
@pytest.mark.parametrize("words", [0, 1, 3])
def test_dart_takes_what_is_least_like_each_pivot(seed, words):
    x, valid, _, rng = frames(seed)
    keep = torch.tensor([7, 5])
    keys = torch.randn(*valid.shape, 5, generator=rng)
    text = torch.randn(2, 4, WIDTH, generator=rng)
    text_keys = torch.randn(2, 4, 5, generator=rng)
    question = torch.tensor([[False, True, True, True]] * 2)
    visual = select_pivots(keys, valid, torch.tensor([2, 2]))
    said = select_pivots(text_keys, question, torch.tensor([words, words]))
    mask = least_similar_to_pivots(x, text, valid, visual, said, keep)
    for i, (count, k) in enumerate(zip(COUNTS, (7, 5), strict=True)):
        own = sorted(range(count), key=lambda a: -float(keys[i, a].abs().sum()))[:2]
        asked = sorted(range(1, 4), key=lambda a: -float(text_keys[i, a].abs().sum()))[:words]
        assert places(visual[i]) == set(own) and places(said[i]) == set(asked)
        speakers = [x[i, a] for a in sorted(own)] + [text[i, a] for a in sorted(asked)]
        chosen, rest = set(own), k - 2
        for turn, speaker in enumerate(speakers):
            part = rest // len(speakers) + (turn < rest % len(speakers))
            free = [a for a in range(count) if a not in chosen]
            chosen |= set(sorted(free, key=lambda a: cos(x[i, a], speaker))[:part])
        assert places(mask[i]) == chosen and len(chosen) == k


@SEEDS
def test_raters_are_more_similar_than_the_average(seed):
    rng = torch.Generator().manual_seed(seed)
    visual, text = torch.randn(2, 5, 8, generator=rng), torch.randn(2, 6, 8, generator=rng)
    valid = torch.tensor([[True] * 5, [False, False, True, True, True]])
    question = torch.tensor([[False, True, True, True, True, True], [False] * 4 + [True] * 2])
    mask = select_raters(visual, valid, text, question)
    for b in range(2):
        words, tokens = sorted(places(question[b])), sorted(places(valid[b]))
        mean = dict.fromkeys(words, 0.0)
        for n in tokens:
            weights = [math.exp(float(visual[b, n] @ text[b, t])) for t in words]
            for t, weight in zip(words, weights, strict=True):
                mean[t] += weight / sum(weights) / len(tokens)
        average = sum(mean.values()) / len(words)
        assert places(mask[b]) == {t for t in words if mean[t] > average}


def test_a_single_word_rates():
    question = torch.tensor([[False, True]])
    mask = select_raters(
        torch.randn(1, 3, 4), torch.ones(1, 3).bool(), torch.randn(1, 2, 4), question
    )
    assert torch.equal(mask, question)


@given(st.integers(1, 20), st.integers(1, 20), st.data())
@settings(max_examples=80, deadline=None)
def test_a_coarser_grid_is_even(rows, columns, data):
    keep = data.draw(st.integers(1, rows * columns))
    cells = even_grid_cells(rows, columns, keep)
    assert len(set(cells)) == len(cells) == keep
    assert all(0 <= row < rows and 0 <= column < columns for row, column in cells)
    counts = [len(list(group)) for _, group in itertools.groupby(row for row, _ in cells)]
    assert max(counts) - min(counts) <= 1


def test_every_second_row_and_column():
    assert even_grid_cells(24, 24, 144) == [
        (row, column) for row in range(1, 24, 2) for column in range(1, 24, 2)
    ]
