"""Costs of unlike groups: what a removal is said to save is what the smaller network saves."""

import pytest
import torch
from torch import nn

from bench.errors import UserError
from bench.measurement.flops.cost_rows import count_image_flops
from bench.method import Context
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from bench.models.model import Model
from bench.schema import ModelConfig
from methods.wgsef.groups import costs, residual
from methods.wgsef.groups.choice import GroupChoice, families_of
from methods.wgsef.groups.costs import GroupCosts
from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.removal import smaller_classifier
from methods.wgsef.solvers.allocation import CostAllocation
from methods.wgsef.sparse_training import Wgsef
from tests.methods.wgsef.groups.tiny_classifiers import MIXED, vit


def kept_of_columns(kept_M, group_costs):
    counts = torch.zeros_like(group_costs.size_C)
    return counts.index_add_(0, group_costs.column_M, kept_M.float())


@pytest.mark.parametrize("unit", ["macs", "bytes"])
@pytest.mark.parametrize("choice", [{"groups": ["heads"]}, {"groups": ["depth"]}, MIXED])
def test_a_cost_is_that_of_the_smaller_network(choice, unit, monkeypatch):
    network = vit(monkeypatch)
    image = torch.randn(1, 3, 8, 8)
    families = families_of(network, GroupChoice(**choice))
    partition = GroupPartition(network, families)
    dead_M = torch.arange(partition.groups) % 3 == 1
    group_costs = GroupCosts(network, families, image, unit)
    partition.scale_((~dead_M).double())
    smaller = smaller_classifier(network, families, partition.split(dead_M))
    expected = sum(costs._costs_of_weights(smaller, image, unit).values())
    kept_C = kept_of_columns(~dead_M, group_costs)
    assert float(group_costs.total(kept_C[None])) == pytest.approx(expected, rel=1e-9)
    assert expected < 0.9 * group_costs.dense()
    if unit == "macs":
        assert 2 * expected == pytest.approx(count_image_flops(smaller, 1).total, rel=1e-6)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("unit", ["macs", "bytes"])
def test_unlike_groups_share_a_budget_of_their_costs(unit, sparsity, monkeypatch):
    network = vit(monkeypatch)
    families = families_of(network, GroupChoice(**MIXED))
    partition = GroupPartition(network, families)
    group_costs = GroupCosts(network, families, torch.randn(1, 3, 8, 8), unit)
    floors = [0 if family.kind == "depth" else 1 for family in families]
    prunable = 1 - group_costs.least(floors) / group_costs.dense()
    # Patches and logits have no groups.
    sparsity *= prunable
    allocation = CostAllocation(partition, sparsity, group_costs, floor=0.01)
    score_M = torch.rand(partition.groups, generator=torch.Generator().manual_seed(1)).double()
    kept_M = allocation.select(score_M)
    budget = (1 - sparsity) * group_costs.dense()

    def cost(mask_M):
        return float(group_costs.total(kept_of_columns(mask_M, group_costs)[None]))

    assert cost(kept_M) <= budget
    dense = pytest.approx(group_costs.dense())
    used = {"unit": unit, "dense": dense, "kept": pytest.approx(cost(kept_M))}
    assert allocation.used(kept_M) == used
    kept = [int(part.sum()) for part in partition.split(kept_M)]
    assert all(count >= floor for count, floor in zip(kept, floors, strict=True))
    # The next one in the order of score over root of cost does not fit any more.
    worth_M = score_M / group_costs.per_group()[group_costs.column_M].sqrt()
    worth_M[kept_M] = -1
    kept_M[worth_M.argmax()] = True
    assert cost(kept_M) > budget


def test_a_block_is_worth_its_own_cost_and_the_least_network_keeps_the_cheapest():
    network = nn.Sequential(Block(4), Block(12), Block(8), nn.Conv2d(3, 2, 1))
    image = torch.randn(1, 3, 4, 4)
    (family,) = residual.depth(network, image)
    group_costs = GroupCosts(network, [family], image, "macs")
    per_group_C = group_costs.per_group()
    torch.testing.assert_close(per_group_C, 16.0 * 6 * torch.tensor([4.0, 12.0, 8.0]).double())
    assert group_costs.least([2]) == pytest.approx(group_costs.dense() - float(per_group_C[1]))


class Ticking(nn.Conv2d):
    """A convolution that takes some time on a clock of its own."""

    clock = 0.0

    def __init__(self, inputs, outputs, seconds=0.0):
        super().__init__(inputs, outputs, 1)
        self.seconds = seconds

    def forward(self, x):
        Ticking.clock += self.seconds
        return super().forward(x)


class Block(nn.Module):
    """A residual block of 6 x hidden multiply-adds at each position."""

    def __init__(self, hidden, seconds=0.0):
        super().__init__()
        self.up, self.down = Ticking(3, hidden, seconds), Ticking(hidden, 3, seconds)

    def forward(self, x):
        return x + self.down(self.up(x))


def test_seconds_are_those_that_each_layer_takes(monkeypatch):
    network = nn.Sequential(Block(4, 2.0), Block(9, 0.5), nn.Conv2d(3, 2, 1))
    image = torch.randn(1, 3, 4, 4)
    (family,) = residual.depth(network, image)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: Ticking.clock)
    group_costs = GroupCosts(network, [family], image, "seconds")
    torch.testing.assert_close(group_costs.per_group(), torch.tensor([4.0, 1.0]).double())
    assert group_costs.dense() == 5


def test_kinds_without_a_cost_are_one_sentence(monkeypatch):
    network = vit(monkeypatch)
    families = families_of(network, GroupChoice(groups=["rows"], layers={"rows": "*mlp*"}))
    with pytest.raises(UserError, match=r"unit=seconds needs groups .*got rows"):
        GroupCosts(network, families, torch.randn(1, 3, 8, 8), "seconds")


def test_blocks_and_filters_are_trained_together_to_a_budget_of_bytes():
    torch.manual_seed(0)
    network = build_classifier(VisionConfig(architecture="micro_resnet", channels=1, size=8))
    subject = Model(ModelConfig(name="n", source="n"), network, None, "", None, torch.device("cpu"))
    method = Wgsef(
        groups=["filters", "depth"],
        layers={"filters": "features.1.branch*", "depth": "features.[23]"},
        unit="bytes",
        ratio=0.4,
        recipe={"epochs": 1, "batch": 200},
    )
    report = method.apply(subject, Context(seed=0))
    assert report.effect == "removed"
    # The last block alone has 72 % of all bytes.
    assert "features.3" in {shortcut.block for shortcut in subject.network.config.removed}
    weights = [sum(w.numel() for w in n.parameters()) for n in (network, subject.network)]
    assert weights[1] <= 0.62 * weights[0]


class Windowed(nn.Module):
    """Attention inside windows of 16 of 64 positions."""

    def __init__(self, batch_first):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x):
        windows = x.flatten(2).transpose(1, 2).reshape(-1, 16, 8)
        windows = windows if self.batch_first else windows.transpose(0, 1)
        return self.attention(windows, windows, windows, need_weights=False)[0]


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_counts_the_positions_that_it_compares(batch_first):
    found = costs._costs_of_weights(Windowed(batch_first), torch.zeros(1, 8, 8, 8), "macs")
    # Projections of 64 positions; per position 16 products and 16 sums over a width of 8.
    assert found == {
        "attention.in_proj_weight": 64 * 24 * 8 + 2 * 64 * 16 * 8,
        "attention.out_proj.weight": 64 * 8 * 8,
    }
