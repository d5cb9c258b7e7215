"""Scores of experts and micro-experts against their definitions, token by token."""

import pytest
import torch

from bench.errors import UserError
from bench.models.structure.model_structure import inspect_model
from bench.ui import SILENT
from methods.baselines.expert_scores import ExpertFrequency, Reap
from methods.baselines.micro_expert_controls import ActivationOnly, Magnitude, RandomMicroExperts
from methods.camera.loss_aware import CameraLossAware
from methods.moe.calibration import Activations
from methods.moe.micro_experts import SHARED, expert_spans, expert_view, zero_micro_experts
from methods.moe.ranking import magnitudes
from tests.methods.method_application import applied, block_inputs, model_of, network_of, zeroed
from tests.models.tiny_networks import ARCHITECTURES, build, tokens


def routed_tokens(network):
    """Every (block number, expert, token's input, router's weight), one at a time."""
    inputs = block_inputs(network, tokens())
    for number, (block, x) in enumerate(zip(inspect_model(network).moe, inputs, strict=True)):
        x_TD = x.flatten(0, 1)
        _, weights, experts = block.router(x_TD)
        for token in range(len(x_TD)):
            for weight, expert in zip(weights[token], experts[token].tolist(), strict=True):
                yield number, expert, x_TD[token], weight


@pytest.mark.sample(6)
@pytest.mark.parametrize("layout", ["fused", "list"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reap_and_frequency_token_by_token(name, layout):
    network = network_of(name, layout)
    blocks = inspect_model(network).moe
    norms = [[[] for _ in range(6)] for _ in blocks]
    for number, expert, x_D, weight in routed_tokens(network):
        part = blocks[number].expert(expert)
        hidden = part.act(part.gate @ x_D) * (part.up @ x_D)
        norms[number][expert].append(float(weight * (part.down @ hidden).norm()))

    knobs = {"sequential": False, "state": "zeroed", "batch": 2, "chunk": 5}
    reap = applied(Reap(ratio=0.3, **knobs), network_of(name, layout)).layers
    often = applied(ExpertFrequency(ratio=0.3, **knobs), network_of(name, layout)).layers
    for here, mine, counts in zip(norms, reap, often, strict=True):
        assert counts.scores == [len(values) for values in here]
        means = [sum(values) / len(values) if values else 0.0 for values in here]
        assert mine.scores == pytest.approx(means, rel=1e-5)
        order = sorted(range(6), key=lambda expert: means[expert])
        assert mine.whole_experts == sorted(order[: len(mine.whole_experts)])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_activations_alone_token_by_token(name):
    network = build(name)
    block = inspect_model(network).moe[0]
    places = dict(expert_spans(block))
    expected = torch.zeros(block.micro_experts, dtype=torch.float64)
    for number, expert, x_D, weight in routed_tokens(network):
        if number == 0:
            part = block.expert(expert)
            phi = weight * part.act(part.gate @ x_D) * (part.up @ x_D)
            expected[places[expert]] += phi.double().square()
    if block.shared is not None:
        x_TD = block_inputs(network, tokens())[0].flatten(0, 1)
        gate = 1 if block.shared_gate is None else torch.sigmoid(block.shared_gate(x_TD))
        hidden = block.shared_view().hidden(x_TD) * gate
        expected[places[SHARED]] = hidden.double().square().sum(0)

    method = ActivationOnly(ratio=0.3, chunk=7, batch=2)
    found = next(method.observe_blocks(model_of(network), tokens(), Activations, SILENT))[
        1
    ].square_sum()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-12)
    applied(method, network)
    order = torch.argsort(expected, stable=True)[: int(0.3 * block.micro_experts)]
    assert zeroed(block) == sorted(order.tolist())


@pytest.mark.parametrize("layout", ["fused", "list"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_magnitude_is_the_norm_of_down_columns(name, layout):
    network = network_of(name, layout)
    blocks = inspect_model(network).moe
    columns = [
        torch.cat([expert_view(block, e).down.T for e, _ in expert_spans(block)])
        for block in blocks
    ]
    expected = [
        sorted(range(len(w)), key=lambda i: float(w[i].norm()))[: int(0.3 * len(w))]
        for w in columns
    ]
    for block, w in zip(blocks, columns, strict=True):
        torch.testing.assert_close(magnitudes(block), w.double().square().sum(1))
    report = applied(Magnitude(ratio=0.3), network)
    assert report.effect == "zeroed"
    assert [zeroed(block) for block in blocks] == [sorted(chosen) for chosen in expected]


@pytest.mark.parametrize("method", [RandomMicroExperts, Magnitude, ActivationOnly, CameraLossAware])
@pytest.mark.parametrize("name", ["deepseek_v2", "mixtral"])
def test_removed_computes_the_same_as_zeroed_without_the_weights(name, method):
    zeros, network, rows = build(name), build(name), tokens()
    before = sum(weight.numel() for weight in network.parameters())
    applied(method(ratio=0.3), zeros)
    report = applied(method(ratio=0.3, state="removed", align=1), network)
    assert report.effect == "removed"
    after = sum(weight.numel() for weight in network.parameters())
    assert before - after == report.details["removed_parameters"] > 0
    torch.testing.assert_close(network(rows).logits, zeros(rows).logits, rtol=1e-5, atol=1e-5)


def test_sequential_scores_see_the_change():
    def second(sequential):
        method = Reap(ratio=0.4, state="zeroed", sequential=sequential)
        return applied(method, build("mixtral")).layers

    together, after = second(False), second(True)
    assert together[0].scores == after[0].scores
    assert together[1].scores != pytest.approx(after[1].scores, rel=1e-3)
    changed = build("mixtral")
    lost = [e * 12 + c for e in after[0].whole_experts for c in range(12)]
    block = inspect_model(changed).moe[0]
    partial = set(zeroed_by(Reap(ratio=0.4, state="zeroed"), "mixtral")) - set(lost)
    zero_micro_experts(block, torch.tensor(sorted({*lost, *partial})))
    alone = applied(Reap(ratio=0, state="zeroed"), changed).layers
    assert alone[1].scores == pytest.approx(after[1].scores, rel=1e-5)


def zeroed_by(method, name):
    network = build(name)
    applied(method, network)
    return zeroed(inspect_model(network).moe[0])


@pytest.mark.parametrize("method", [Reap, ExpertFrequency, ActivationOnly])
def test_needs_calibration_text(method):
    from bench.method import Context

    with pytest.raises(UserError, match="calibration"):
        method(ratio=0.2).apply(model_of(build("mixtral")), Context(seed=0))
