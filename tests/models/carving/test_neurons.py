"""The division of neurons and the router, against slow transcriptions of their definitions."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from bench.models.carving.neurons import (
    ExpertLayout,
    balanced_groups,
    carve_feed_forward,
    linear_scores,
    most_active,
)
from bench.models.structure.expert_view import ExpertView


def test_active_neurons_are_the_largest_of_each_token():
    size = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 4.0, 6.0]])
    assert most_active(size, 0.5).tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert most_active(size, 0.01).sum(1).tolist() == [1, 1]


def within(active, group):
    """Σ_i ‖a_i - mean of its group‖², by loops."""
    found = 0.0
    for g in set(group):
        own = [active[:, i] for i in range(active.shape[1]) if group[i] == g]
        centre = sum(own) / len(own)
        found += sum(float((column - centre).square().sum()) for column in own)
    return found


@given(st.integers(0, 2**20))
def test_no_exchange_of_two_neurons_improves_the_groups_around_their_means(seed):
    torch.manual_seed(seed)
    active = (torch.rand(20, 12) < 0.4).float()
    group = balanced_groups(active, 3, rounds=100).tolist()
    assert sorted(group.count(g) for g in range(3)) == [4, 4, 4]
    centres = [active[:, [i for i in range(12) if group[i] == g]].mean(1) for g in range(3)]
    distance = [[float((active[:, i] - c).square().sum()) for c in centres] for i in range(12)]
    for i, j in itertools.combinations(range(12), 2):
        kept = distance[i][group[i]] + distance[j][group[j]]
        assert kept <= distance[i][group[j]] + distance[j][group[i]] + 1e-4


def test_neurons_that_are_active_together_share_an_expert():
    torch.manual_seed(0)
    topics = torch.randint(0, 3, (60,))
    owner = torch.arange(12) % 3
    active = (topics[:, None] == owner[None, :]).float()
    group = balanced_groups(active, 3).tolist()
    assert within(active, group) == pytest.approx(0, abs=1e-4)
    assert len({(int(o), g) for o, g in zip(owner, group, strict=True)}) == 3


def test_scores_are_the_ridge_regression_of_what_experts_add():
    torch.manual_seed(1)
    x, size = torch.randn(200, 6), torch.rand(200, 4)
    rows, offsets = linear_scores(x, size, damping=0.01)
    scores = x @ rows.T + offsets
    assert float(scores.std()) == pytest.approx(1, rel=1e-4)
    assert float(scores.mean(1).abs().max()) < 1e-5

    # The same by the normal equations with a column of ones that is not damped.
    ones = torch.cat([x - x.mean(0), torch.ones(200, 1)], dim=1).double()
    gram = ones.T @ ones
    damping = 0.01 * gram.diagonal()[:6].mean()
    gram += torch.diag(torch.tensor([1.0] * 6 + [0.0]).double() * damping)
    plain = ones @ torch.linalg.inv(gram) @ ones.T @ size.double()
    common = plain - plain.mean(1, keepdim=True)
    assert torch.allclose((common / common.std()).float(), scores, atol=1e-5)


def test_scores_find_the_expert_that_adds_most():
    torch.manual_seed(2)
    x = torch.randn(500, 8)
    size = functional.relu(x[:, :4])
    rows, offsets = linear_scores(x, size)
    found = (x @ rows.T + offsets).argmax(1)
    assert float((found == size.argmax(1)).float().mean()) > 0.8


@pytest.mark.parametrize("layout", [ExpertLayout(4, 2), ExpertLayout(3, 1), ExpertLayout(6, 6)])
def test_every_neuron_is_in_one_expert_and_the_busiest_are_shared(layout):
    torch.manual_seed(3)
    view = ExpertView(torch.randn(24, 8), torch.randn(24, 8), torch.randn(8, 24), functional.silu)
    x = torch.randn(100, 8)
    hidden = view.hidden(x)
    carved = carve_feed_forward(view, x, hidden, layout)
    width = 24 // (layout.experts + layout.shared)
    assert carved.experts.shape == (layout.experts, width)
    assert carved.rows.shape == (layout.experts, 8)
    everything = torch.cat([carved.shared, carved.experts.flatten()])
    assert sorted(everything.tolist()) == list(range(24))
    rate = most_active(hidden.abs() * view.down.norm(dim=0), layout.active).mean(0)
    assert rate[carved.shared].min() >= rate[carved.experts].max()
