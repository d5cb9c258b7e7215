"""Loss-aware energy against autograd, and against CAMERA's where they must agree."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from bench.models.structure.model_structure import inspect_model
from bench.ui import SILENT
from methods.camera.analysis import energy
from methods.camera.loss_aware import (
    CameraLossAware,
    OutputMetric,
    loss_aware_energy,
    output_metrics,
    sensitivity,
)
from methods.moe.calibration import (
    Activations,
    Moments,
    WalkOptions,
    squared_column_norms,
    walk_blocks,
)
from methods.moe.micro_experts import expert_spans, expert_view
from tests.methods.method_application import applied, model_of, network_of, zeroed
from tests.models.tiny_networks import ARCHITECTURES, build, tokens


def square_sums(network):
    options = WalkOptions(batch=2, chunk=4096)
    observed = walk_blocks(model_of(network), tokens(), Activations, options, SILENT)
    return [found.square_sum() for _, found in observed]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_with_an_identity_it_is_the_energy_at_alpha_zero(name):
    network = build(name)
    for block, square_sum_N in zip(inspect_model(network).moe, square_sums(network), strict=True):
        moments = Moments(block.micro_experts, torch.device("cpu"))
        moments.square_sum_N = square_sum_N
        norms = torch.cat(
            [squared_column_norms(expert_view(block, e).down) for e, _ in expert_spans(block)]
        )
        mine = loss_aware_energy(block, square_sum_N, torch.eye(16))
        torch.testing.assert_close(mine, energy(moments, norms, 0.0), rtol=1e-6, atol=0)


@pytest.mark.sample(5)
@pytest.mark.parametrize("layout", ["fused", "list"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_metric_is_the_mean_outer_product_of_gradients(name, layout):
    network = network_of(name, layout)
    found = output_metrics(model_of(network), tokens(), SILENT)
    assert all(weight.grad is None and not weight.requires_grad for weight in network.parameters())
    blocks, expected = inspect_model(network).moe, []
    for block in blocks:
        sums = torch.zeros(16, 16, dtype=torch.float64)
        for row in tokens():
            bump = torch.zeros(1, 12, 16, requires_grad=True)
            hook = block.block.register_forward_hook(lambda _, __, y, bump=bump: y + bump)
            loss = cross_entropy(network(row[None]).logits[0, :-1], row[1:], reduction="sum")
            hook.remove()
            for g in torch.autograd.grad(loss, bump)[0][0].double():
                sums += torch.outer(g, g)
        expected.append(sums / tokens().numel())
    for metric, slow in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(metric, slow, rtol=1e-4, atol=1e-6 * float(slow.abs().max()))


def test_sensitivity_column_by_column():
    down, metric = torch.randn(5, 3), torch.randn(5, 5)
    metric = metric @ metric.T
    expected = [float(w @ metric @ w) for w in down.T]
    assert sensitivity(down, metric).tolist() == pytest.approx(expected, rel=1e-4)


def test_a_metric_of_nothing_is_zero():
    assert not OutputMetric(inspect_model(build("olmoe")).moe[0]).metric().any()


@pytest.mark.sample(5)
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_zeroes_the_lowest_in_its_scope(name, scope):
    network = build(name)
    blocks = inspect_model(network).moe
    metrics = output_metrics(model_of(network), tokens(), SILENT)
    energies = [
        loss_aware_energy(block, square_sum_N, metric)
        for block, square_sum_N, metric in zip(
            blocks, square_sums(network), metrics.values(), strict=True
        )
    ]
    report = applied(CameraLossAware(ratio=0.3, scope=scope, batch=5), network)
    removed = [zeroed(block) for block in blocks]
    budgets = [int(0.3 * block.micro_experts) for block in blocks]
    assert [layer.removed for layer in report.layers] == list(map(len, removed))
    assert report.details["removed_micro_experts"] == sum(budgets)
    if scope == "layer":
        order = [torch.argsort(e, stable=True)[:n] for e, n in zip(energies, budgets, strict=True)]
        assert removed == [sorted(chosen.tolist()) for chosen in order]
    else:
        flat = torch.cat(energies)
        chosen = torch.argsort(flat, stable=True)[: sum(budgets)]
        starts = [0, *torch.tensor([len(e) for e in energies]).cumsum(0).tolist()]
        mine = [s + i for s, part in zip(starts, removed, strict=False) for i in part]
        assert mine == sorted(chosen.tolist())
    json.dumps(report.details, allow_nan=False)


def test_ratio_zero_is_the_identity():
    network, rows = build("mixtral"), tokens()
    before = network(rows).logits
    assert applied(CameraLossAware(ratio=0), network).effect == "none"
    assert torch.equal(network(rows).logits, before)
