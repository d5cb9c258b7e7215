"""CAMERA-P and random experts: ratios, scopes, budgets, refusals."""

import json
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bench.errors import UserError
from bench.method import Context
from bench.models.structure.model_structure import ModelStructure, inspect_model
from methods.baselines.micro_expert_controls import RandomExperts, RandomMicroExperts
from methods.camera.pruning import CameraP
from methods.moe.micro_experts import (
    channels_per_expert,
    expert_spans,
    zero_micro_experts,
)
from tests.methods.method_application import applied, model_of, zeroed
from tests.models.tiny_networks import ARCHITECTURES, build, tokens, unfuse

CONTROLS = [RandomExperts, RandomMicroExperts]


def camera(**knobs):
    """CAMERA-P as in the paper, whose effect is seen in the weights."""
    return CameraP(**({"state": "zeroed"} | knobs))


METHODS = [camera, *CONTROLS]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["fused", "list"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_zeroes_exactly_the_budget_and_nothing_else(name, layout, method):
    network = build(name) if layout == "fused" else unfuse(build(name))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    report = applied(method(ratio=0.3), network)
    structure = inspect_model(network)

    assert report.effect == "zeroed"
    for block, layer in zip(structure.moe, report.layers, strict=True):
        assert len(zeroed(block)) == layer.removed == int(0.3 * block.micro_experts)
    removed = report.details["removed_micro_experts"]
    assert report.details["removed_parameters"] == removed * 3 * 16
    assert report.details["ratio_of_moe"] == pytest.approx(0.3, abs=0.01)
    assert report.details["ratio_of_total"] < report.details["ratio_of_moe"]
    json.dumps(report.details, allow_nan=False)

    expert_weights = ("experts.", "shared_expert.")
    for key, value in network.state_dict().items():
        if ".mlp." not in key or not any(part in key for part in expert_weights):
            assert torch.equal(value, before[key]), key
        else:
            assert ((value == before[key]) | (value == 0)).all()


@pytest.mark.parametrize("method", METHODS)
def test_ratio_zero_is_the_identity(method):
    network, rows = build("deepseek"), tokens()
    before = network(rows).logits
    report = applied(method(ratio=0), network)
    assert report.effect == "none"
    assert torch.equal(network(rows).logits, before)


@pytest.mark.parametrize("scope", ["layer", "expert", "global"])
@pytest.mark.parametrize("base", ["moe", "total"])
def test_ratio_is_reached_on_either_base_in_every_scope(scope, base):
    network = build("qwen2_moe")
    structure = inspect_model(network)
    method = camera(ratio=0.2, base=base, scope=scope, sequential=False)
    report = applied(method, network)
    share = method.share(structure)
    wanted = 0.2 if base == "moe" else 0.2 * structure.parameters / structure.moe_parameters
    assert float(share) == pytest.approx(wanted)
    assert report.details["removed_micro_experts"] == sum(
        int(share * block.micro_experts) for block in structure.moe
    )
    assert report.details[f"ratio_of_{base}"] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("sequential", [True, False])
def test_goes_from_the_lowest_energies_shared_and_routed_pooled(sequential):
    from bench.ui import SILENT
    from methods.camera.analysis import BlockEnergies
    from methods.moe.calibration import WalkOptions, walk_blocks

    network = build("deepseek_v2")
    walk = WalkOptions(batch=2, chunk=100, sequential=sequential)
    _, found = next(walk_blocks(model_of(network), tokens(), BlockEnergies, walk, SILENT))
    energy_N = found.energies(0.95, normalised=False)
    applied(camera(ratio=0.5, sequential=sequential), network)
    chosen = zeroed(inspect_model(network).moe[0])
    assert chosen == sorted(torch.argsort(energy_N)[: len(chosen)].tolist())
    assert 0 < sum(index < 24 for index in chosen) < len(chosen)


def test_removing_by_energy_hurts_less_than_at_random():
    rows = tokens(rows=8, length=24)
    dense = build("qwen3_moe")(rows).logits

    def error(method, seed=0):
        network = build("qwen3_moe")
        applied(method, network, seed)
        return float((network(rows).logits - dense).square().mean())

    by_energy = error(camera(ratio=0.4, alpha=0.0))
    at_random = [error(RandomMicroExperts(ratio=0.4), seed) for seed in range(5)]
    assert by_energy < min(at_random)


@settings(max_examples=40)
@given(st.integers(0, 99))
def test_budget_is_the_decimal_ratio_and_not_its_binary_neighbour(percent):
    method = CameraP(ratio=percent / 100)
    assert method.share(inspect_model(_NETWORK)) == Fraction(percent, 100)


_NETWORK = build("mixtral")


def test_flat_order_is_shared_first_then_expert_by_expert():
    block = inspect_model(build("deepseek")).moe[0]
    assert expert_spans(block)[:2] == [(-1, slice(0, 24)), (0, slice(24, 36))]
    flat = torch.tensor([0, 23, 24, 95])
    assert {e: c.tolist() for e, c in channels_per_expert(block, flat)} == {
        -1: [0, 23],
        0: [0],
        5: [11],
    }


def test_random_experts_go_whole_but_for_one():
    network = build("deepseek")
    report = applied(RandomExperts(ratio=0.5), network)
    for block, layer in zip(inspect_model(network).moe, report.layers, strict=True):
        lost = {e: len(c) for e, c in channels_per_expert(block, torch.tensor(zeroed(block)))}
        # 48 of 24 shared and 72 routed micro-experts: four experts of twelve.
        assert lost == dict.fromkeys(layer.whole_experts, 12)
        assert len(lost) == 4
        assert layer.partial_expert is None
    uneven = applied(RandomExperts(ratio=0.3), build("deepseek")).layers[0]
    assert len(uneven.whole_experts) == 2
    assert uneven.partial_expert["removed"] == 28 - 24


@pytest.mark.parametrize("method", CONTROLS)
def test_controls_follow_the_seed(method):
    def chosen(seed):
        network = build("olmoe")
        applied(method(ratio=0.4), network, seed)
        return [zeroed(block) for block in inspect_model(network).moe]

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)
    assert chosen(1)[0] != chosen(1)[1]


@pytest.mark.parametrize("method", METHODS)
def test_refuses_a_model_that_is_no_decoder(method):
    encoder = ModelStructure("Encoder", "encoder", stacks=(), parameters=1)
    with pytest.raises(UserError, match=r"Encoder.*(has no decoder layers|has none)"):
        method(ratio=0.2).check(encoder)


@pytest.mark.parametrize("method", METHODS)
def test_refuses_to_remove_everything(method):
    with pytest.raises(UserError, match="would remove every expert"):
        method(ratio=0.99, base="total").check(inspect_model(build("mixtral")))


def test_random_experts_cannot_give_what_only_shared_ones_have():
    with pytest.raises(UserError, match="its routed experts have 72"):
        RandomExperts(ratio=0.9).check(inspect_model(build("deepseek")))


@pytest.mark.parametrize(
    "knobs",
    [
        {"ratio": 1},
        {"ratio": -0.1},
        {"ratio": float("nan")},
        {"ratio": 0.2, "alpha": 1.1},
        {"ratio": 0.2, "scope": "model"},
        {"ratio": 0.2, "scope": "global"},
        {"ratio": 0.2, "state": "gone"},
        {"ratio": 0.2, "ration": 1},
        {},
    ],
)
def test_refuses_wrong_knobs(knobs):
    with pytest.raises(ValidationError):
        CameraP(**knobs)


def test_needs_calibration_text():
    with pytest.raises(UserError, match="calibration"):
        CameraP(ratio=0.2).apply(model_of(build("mixtral")), Context(seed=0))


def test_emptied_experts_are_counted_and_add_nothing():
    network = build("mixtral")
    block = inspect_model(network).moe[0]
    zero_micro_experts(block, torch.arange(12))
    report = applied(camera(ratio=0.2), network).layers[0]
    assert report.emptied_experts == 1
    assert report.removed_per_expert[0] == 12
    assert not block.expert(0).combine(block.expert(0).hidden(torch.randn(3, 16))).any()
