"""Methods that remove whole experts: budget, partial expert, states, refusals."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import UserError
from bench.models.structure.model_structure import inspect_model
from methods.baselines.expert_removal import select_whole_experts
from methods.baselines.expert_scores import ExpertFrequency, Reap
from methods.baselines.micro_expert_controls import RandomExperts
from methods.baselines.naee import Naee
from tests.methods.method_application import applied, context, model_of, network_of, numel, zeroed
from tests.models.tiny_networks import ARCHITECTURES, build, llama, tokens

METHODS = [RandomExperts, ExpertFrequency, Reap, Naee]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_a_cut_spends_the_budget_in_order(widths, data):
    order = data.draw(st.permutations(range(len(widths))))
    budget = data.draw(st.integers(0, sum(widths)))
    chosen = select_whole_experts(widths, order, budget)
    assert sum(widths[expert] for expert in chosen.whole) + chosen.partial_count == budget
    assert list(chosen.whole) == order[: len(chosen.whole)]
    assert (chosen.partial_expert is None) == (chosen.partial_count == 0)
    if chosen.partial_expert is not None:
        assert chosen.partial_expert == order[len(chosen.whole)]
        assert chosen.partial_count < widths[chosen.partial_expert]


@pytest.mark.sample(16)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["fused", "list"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_zeroed_takes_what_camera_p_takes_and_leaves_the_router(name, layout, method):
    network = network_of(name, layout)
    before = numel(network)
    report = applied(method(ratio=0.3, state="zeroed"), network)
    assert report.effect == "zeroed"
    assert numel(network) == before
    for block, layer in zip(inspect_model(network).moe, report.layers, strict=True):
        assert len(zeroed(block)) == layer.removed == int(0.3 * block.micro_experts)
        assert layer.removed == 12 * len(layer.whole_experts) + (
            layer.partial_expert["removed"] if layer.partial_expert else 0
        )
    json.dumps(report.details, allow_nan=False)


@pytest.mark.sample(20)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["fused", "list"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_removed_computes_the_same_as_zeroed_without_the_weights(name, layout, method):
    zeroed_network, network = network_of(name, layout), network_of(name, layout)
    before = numel(network)
    expected = applied(method(ratio=0.3, state="zeroed"), zeroed_network)
    report = applied(method(ratio=0.3, state="removed", align=1), network)
    assert report.effect == "removed"
    assert before - numel(network) == report.details["removed_parameters"]
    assert report.details["removed_parameters"] == expected.details["removed_parameters"]
    assert report.details["zeroed_parameters"] == 0
    rows = tokens()
    torch.testing.assert_close(
        network(rows).logits, zeroed_network(rows).logits, rtol=1e-5, atol=1e-5
    )


@pytest.mark.sample(20)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["fused", "list"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dropped_really_removes_whole_experts(name, layout, method):
    network = network_of(name, layout)
    before, blocks = numel(network), inspect_model(network).moe
    report = applied(method(ratio=0.3, state="dropped"), network)
    layers, expert = report.layers, 3 * 16 * 12
    whole = sum(len(layer.whole_experts) for layer in layers)
    routers = 16 * whole if layers[0].router == "rows removed" else 0
    assert report.effect == "removed"
    assert before - numel(network) == expert * whole + routers
    removed, kept_as_zeros = (
        report.details[key] for key in ("removed_parameters", "zeroed_parameters")
    )
    assert removed - kept_as_zeros == expert * whole
    assert removed == 3 * 16 * sum(int(0.3 * block.micro_experts) for block in blocks)
    for block, layer in zip(inspect_model(network).moe, layers, strict=True):
        assert block.num_experts == 6 - len(layer.whole_experts) < 6
        assert len(zeroed(block)) == layer.zeroed_micro_experts
    assert network(tokens()).logits.isfinite().all()
    json.dumps(report.details, allow_nan=False)


@pytest.mark.parametrize("state", ["zeroed", "removed", "dropped"])
@pytest.mark.parametrize("method", METHODS)
def test_ratio_zero_is_the_identity(method, state):
    network, rows = build("deepseek_v3"), tokens()
    before = network(rows).logits
    report = applied(method(ratio=0, state=state), network)
    assert report.effect == "none"
    assert torch.equal(network(rows).logits, before)


@pytest.mark.parametrize("method", METHODS)
def test_refuses_to_leave_fewer_experts_than_a_token_goes_to(method):
    structure = inspect_model(build("mixtral"))
    method(ratio=0.67, state="dropped").check(structure)
    with pytest.raises(UserError, match="leaves 1 of 6 experts"):
        method(ratio=0.84, state="dropped").check(structure)
    method(ratio=0.84, state="zeroed").check(structure)


@pytest.mark.parametrize("method", METHODS)
def test_refuses_models_and_ratios_that_do_not_fit(method):
    with pytest.raises(UserError, match=r"LlamaForCausalLM.*has none"):
        method(ratio=0.2).check(inspect_model(llama()))
    with pytest.raises(UserError, match="its routed experts have 72"):
        method(ratio=0.9).check(inspect_model(build("deepseek")))


def test_random_choices_follow_the_seed():
    def chosen(seed):
        layers = applied(RandomExperts(ratio=0.4), build("olmoe"), seed).layers
        return [layer.whole_experts for layer in layers]

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)


def test_a_wrapped_router_is_refused_a_second_time():
    network = build("deepseek_v3")
    model = model_of(network)
    RandomExperts(ratio=0.2, state="dropped").apply(model, context())
    with pytest.raises(UserError, match="no matrix with one row for each of"):
        RandomExperts(ratio=0.2, state="dropped").apply(model, context())
