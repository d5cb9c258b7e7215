"""The divided budget against trying every division."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import UserError
from methods.camera.allocation import allocate_least_error
from tests.methods.camera.test_removal import pruned
from tests.models.tiny_networks import build

layers_of_energies = st.lists(
    st.lists(st.integers(0, 20), min_size=1, max_size=6), min_size=1, max_size=3
)


def cost(energies, counts):
    pairs = zip(energies, counts, strict=True)
    return sum(float(energy_N.sort().values[:n].sum()) for energy_N, n in pairs)


@given(layers_of_energies, st.sampled_from([0.5, 0.75, 1.0]), st.data())
def test_no_other_way_to_share_the_budget_costs_less(values, limit, data):
    energies = [torch.tensor(layer, dtype=torch.float64) for layer in values]
    most = [int(limit * len(layer)) for layer in values]
    budget = data.draw(st.integers(0, sum(most)))
    counts = allocate_least_error(energies, budget, limit)
    assert sum(counts) == budget
    assert all(count <= n for count, n in zip(counts, most, strict=True))
    ways = product(*(range(n + 1) for n in most))
    least = min(cost(energies, way) for way in ways if sum(way) == budget)
    assert cost(energies, counts) == pytest.approx(least)


def test_says_when_the_limit_is_below_the_budget():
    with pytest.raises(UserError, match=r"layer_limit=0.5 allows removing 3 .* needs 4"):
        allocate_least_error([torch.ones(3), torch.ones(4)], 4, 0.5)


@pytest.mark.parametrize("sequential", [True, False])
def test_layers_lose_different_shares_and_together_the_budget(sequential):
    model, report = pruned(
        build("qwen2_moe"), ratio=0.5, allocation="least_error", sequential=sequential
    )
    uniform = pruned(build("qwen2_moe"), ratio=0.5)[1]
    removed = [layer.removed for layer in report.layers]
    even = [layer.removed for layer in uniform.layers]
    assert sum(removed) == sum(even)
    assert removed != even
    assert [block.micro_experts for block in model.structure.moe] == [92 - n for n in removed]
