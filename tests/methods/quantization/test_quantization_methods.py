"""Quantization methods: packed equals rounded in place, bits are those of the budget, refusals."""

import json

import pytest
import torch
from pydantic import ValidationError

from bench.errors import UserError
from bench.measurement.model_size import count_size
from bench.method import Context
from bench.models.bitpacking.packed_modules import packed_linears
from bench.models.expert_hooks import observe_experts
from bench.models.layer_stream import LayerStream
from bench.models.structure.model_structure import ModelStructure, inspect_model
from methods.camera.allocation import energy_order
from methods.camera.joint import CameraPQ
from methods.camera.pruning import CameraP
from methods.camera.quantization import CameraQ, CameraQDagger
from methods.moe.quantizer import grid
from methods.quantization.mixture import Mc
from methods.quantization.uniform import Gptq, Rtn
from tests.methods.quantization.quantized_networks import (
    METHODS,
    SMALL,
    applied,
    context,
    model_of,
    network_of,
    rounded_in_place,
)
from tests.models.tiny_networks import ARCHITECTURES, build, tokens


@pytest.mark.sample(8)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "fused") for name in METHODS), ("camera_q", "list"), ("camera_pq", "list")],
)
def test_packed_equals_rounded_in_place(name, architecture, layout):
    packed = network_of(architecture, layout)
    report = applied(METHODS[name], packed)
    rounded = rounded_in_place(packed, network_of(architecture, layout))
    rows = tokens(seed=1)
    torch.testing.assert_close(packed(rows).logits, rounded(rows).logits, rtol=1e-5, atol=1e-5)
    assert report.effect == "quantized"
    assert report.details["bytes_after"] < report.details["bytes_before"]
    assert report.details["bytes_after"] == count_size(packed).bytes
    assert len(report.layers) == len(inspect_model(packed).moe)
    json.dumps(report.details, allow_nan=False)


@pytest.mark.sample(2)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_layouts_are_packed_alike(architecture):
    logits = []
    for layout in ("fused", "list"):
        network = network_of(architecture, layout)
        applied(METHODS["camera_q"], network)
        logits.append(network(tokens()).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", METHODS)
def test_many_bits_leave_the_network_as_it_was(name):
    network, rows = build("deepseek_v3"), tokens()
    before = network(rows).logits
    knobs = METHODS[name].model_dump() | {"head_bits": 8}
    knobs |= {
        "rtn": {"bits": 8},
        "gptq": {"bits": 8},
        "mc": {"bits": (8,), "mean_bits": 8},
        "camera_pq": {"bits": (8, 0), "budget_bits": 99},
        "camera_pq_global": {"bits": (8, 0), "budget_bits": 99},
    }.get(name, {"bits": (8,), "shares": (1,), "mean_bits": None})
    applied(type(METHODS[name])(**knobs), network)
    assert float((network(rows).logits - before).abs().max()) < 0.05 * float(before.std())


def test_sixteen_bits_touch_nothing_else():
    network = build("qwen2_moe")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    others = dict.fromkeys(("attention_bits", "shared_bits", "dense_bits", "head_bits"), 16)
    report = applied(Gptq(**SMALL | others), network)
    assert all(".mlp.experts." in name for name, _ in packed_linears(network))
    for key, value in network.state_dict().items():
        if ".mlp.experts." not in key:
            assert torch.equal(value, before[key])
    assert set(report.details["bits"]) == {"experts"}


def test_other_layers_get_the_bits_of_their_kind():
    network = build("qwen2_moe")
    bits = {"attention_bits": 7, "shared_bits": 6, "dense_bits": 5, "head_bits": 4}
    report = applied(Gptq(**SMALL | bits), network)
    kinds = {
        "model.layers.1.self_attn.q_proj": 7,
        "model.layers.1.mlp.shared_expert.down_proj": 6,
        "model.layers.0.mlp.up_proj": 5,
        "lm_head": 4,
    }
    for name, wanted in kinds.items():
        linear = network.get_submodule(name)
        assert [level.bits for level in linear.shape.levels] == [wanted]
    assert network.model.layers[1].self_attn.q_proj.bias is not None
    means = {kind: found["mean_bits"] for kind, found in report.details["bits"].items()}
    assert means == {"attention": 7, "shared": 6, "dense": 5, "head": 4, "experts": 2}
    names = {name for name, _ in packed_linears(network)}
    assert not any("gate" in name.split(".")[-1] and "proj" not in name for name in names)


def test_mean_is_exact_and_counted_with_and_without_grids():
    network = build("mixtral")
    report = applied(METHODS["camera_q"], network)
    bits = report.details["bits"]["experts"]
    assert bits["weight_bits"] == 2 * bits["weights"] == 2 * 3 * 6 * 3 * 12 * 16
    assert bits["mean_bits"] == 2
    packed = [linear for name, linear in packed_linears(network) if ".experts." in name]
    grids = sum(linear.scale.numel() for linear in packed)
    assert bits["overhead_bits"] == 32 * grids
    assert bits["mean_bits_with_overhead"] == pytest.approx(2 + 32 * grids / bits["weights"])
    for layer in report.layers:
        assert layer.weight_bits == 2 * layer.weights
        assert layer.weights_by_bits == {"1": 864, "2": 1728, "3": 864}


def test_gate_row_up_row_and_down_column_have_the_same_bits():
    network = build("olmoe")
    applied(METHODS["camera_q"], network)
    for block in inspect_model(network).moe:
        for expert in block.experts:
            gate, up, down = expert.gate_proj.shape, expert.up_proj.shape, expert.down_proj.shape
            assert gate.levels == up.levels == down.levels
            assert (gate.axis, up.axis, down.axis) == ("rows", "rows", "columns")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_order_of_micro_experts_does_not_matter(architecture):
    network, rows = build(architecture), tokens()
    before = network(rows).logits
    for block in inspect_model(network).moe:
        for expert in range(block.num_experts):
            view = block.expert(expert)
            order_F = energy_order(torch.rand(view.width))
            view.gate.copy_(view.gate[order_F])
            view.up.copy_(view.up[order_F])
            view.down.copy_(view.down[:, order_F])
    torch.testing.assert_close(network(rows).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.broad
def test_gptq_errs_less_than_rounding_and_energy_groups_less_than_equal_bits():
    rows, lent = tokens(rows=16, length=24), context(rows=16, length=24)

    def uneven():
        """A network whose micro-experts matter as differently as those of trained ones."""
        network = build("qwen3_moe")
        for block in inspect_model(network).moe:
            for expert in range(block.num_experts):
                block.expert(expert).down.mul_(torch.randn(12).exp())
        return network

    dense = uneven()(rows).logits

    def error(method):
        network = uneven()
        applied(method, network, lent)
        return float((network(rows).logits - dense).square().mean())

    few = {"group": 16, "min_tokens": 8}
    rtn, gptq = error(Rtn(bits=3, group=16)), error(Gptq(bits=3, **few))
    mixed = error(CameraQ(bits=(4, 3, 2), shares=(1, 2, 1), alpha=0, block=1, **few))
    assert gptq < rtn
    assert mixed < gptq


def test_the_random_control_has_the_same_bits_and_is_drawn_by_seed_and_block():
    method = METHODS["camera_q_random"]
    drawn, bits = [], []
    for seed in (0, 0, 1):
        network = build("mixtral")
        given = Context(seed=seed, calibration=context().calibration)
        bits.append(method.apply(model_of(network), given).details["bits"]["experts"])
        drawn.append([linear.weight.tolist() for _, linear in packed_linears(network)])
    assert drawn[0] == drawn[1] != drawn[2]
    bits.append(applied(METHODS["camera_q"], build("mixtral")).details["bits"]["experts"])
    assert len({each["weight_bits"] for each in bits}) == 1


def test_rare_experts_are_rounded_to_nearest_and_counted():
    network = build("mixtral")
    report = applied(Gptq(bits=4, group=8, min_tokens=10**6), network)
    assert set(report.details["rounding"]) == {"rtn"}
    network = build("mixtral")
    used = applied(Gptq(bits=4, group=8, min_tokens=4), network).details["rounding"]
    assert used["damped"] > 0
    assert used["gptq"] > 0


def test_later_layers_see_the_quantized_earlier_ones():
    heavy, light = build("mixtral"), build("mixtral")
    applied(Gptq(bits=1, **SMALL), heavy)
    applied(Gptq(bits=8, **SMALL), light)
    first = [network.model.layers[0].self_attn.q_proj.codes for network in (heavy, light)]
    later = [network.model.layers[2].self_attn.q_proj.codes for network in (heavy, light)]
    assert torch.equal(*first)
    assert not torch.equal(*later)


@pytest.mark.parametrize("name", ["camera_q", "gptq", "camera_pq"])
def test_composes_after_pruning(name):
    network = build("deepseek")
    applied(CameraP(ratio=0.4), network)
    before = network(tokens()).logits
    report = applied(METHODS[name], network)
    assert report.effect == "quantized"
    after = network(tokens()).logits
    assert after.isfinite().all()
    assert float((after - before).square().mean()) < float(before.square().mean())


@pytest.mark.parametrize("name", METHODS)
def test_packed_weights_cannot_be_changed_again(name):
    network = build("mixtral")
    applied(METHODS["rtn"], network)
    for method in (METHODS[name], CameraP(ratio=0.2)):
        with pytest.raises(UserError, match="quantized already"):
            applied(method, network)


@pytest.mark.parametrize("name", METHODS)
def test_refuses_a_model_that_is_no_decoder(name):
    with pytest.raises(UserError, match=r"no decoder layers|has none"):
        METHODS[name].check(ModelStructure("Encoder", "encoder", stacks=(), parameters=1))


def test_needs_calibration_text_but_for_rounding():
    with pytest.raises(UserError, match="calibration"):
        METHODS["gptq"].apply(model_of(build("mixtral")), Context(seed=0))
    report = METHODS["rtn"].apply(model_of(build("mixtral")), Context(seed=0))
    assert report.details["calibration"] is None
    assert not METHODS["rtn"].uses_calibration


def test_a_tied_head_is_not_quantized_alone():
    network = build("mixtral")
    network.lm_head.weight = network.model.embed_tokens.weight
    with pytest.raises(UserError, match="head_bits=16"):
        applied(Rtn(head_bits=8), network)


@pytest.mark.parametrize(
    ("kind", "knobs"),
    [
        (CameraQ, {"mean_bits": 2.5}),
        (CameraQ, {"shares": None}),
        (CameraQ, {"shares": None, "mean_bits": 3.5}),
        (CameraQ, {"shares": (1, 1)}),
        (CameraQ, {"shares": (0, 0, 0)}),
        (CameraQ, {"shares": (1, -1, 1)}),
        (CameraQ, {"bits": (1, 2, 3)}),
        (CameraQ, {"bits": (9, 2, 1)}),
        (CameraQ, {"bits": ()}),
        (CameraQDagger, {"scope": "layer"}),
        (Mc, {"mean_bits": 0.5}),
        (Mc, {"mean_bits": float("nan")}),
        (Gptq, {"bits": 16}),
        (Gptq, {"damping": 0}),
        (Gptq, {"attention_bits": 9}),
        (Rtn, {"rounding": "gptq"}),
        (CameraPQ, {"budget_bits": 0}),
        (CameraPQ, {"bits": (0, 4)}),
    ],
)
def test_refuses_wrong_knobs(kind, knobs):
    with pytest.raises(ValidationError):
        kind(**knobs)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (Mc(bits=(3, 2, 1), mean_bits=1.0), "one expert at each of"),
        (CameraPQ(bits=(2, 1), budget_bits=1.1), r"need at least"),
        (CameraQ(bits=(8, 4, 1), shares=None, mean_bits=1.02), "cannot give a mean"),
    ],
)
def test_refuses_budgets_that_some_layer_cannot_keep(method, reason):
    with pytest.raises(UserError, match=reason):
        method.check(inspect_model(build("mixtral")))


@pytest.mark.parametrize("name", ["gptq", "camera_q", "camera_q_dagger", "rtn"])
def test_every_matrix_of_an_expert_is_counted(name):
    report = applied(METHODS[name], build("mixtral"))
    for layer in report.layers:
        assert sum(layer.rounding.values()) == 3 * 6


def test_the_last_layer_runs_once(monkeypatch):
    run, calls = LayerStream.run, []

    def counted(self, index, *, advance):
        calls.append((index, advance))
        run(self, index, advance=advance)

    monkeypatch.setattr(LayerStream, "run", counted)
    applied(METHODS["gptq"], build("mixtral"))
    assert calls == [(0, False), (0, True), (1, False), (1, True), (2, False)]


@pytest.mark.parametrize(("name", "matrices"), [("mc", 3), ("camera_pq", 2)])
def test_experts_are_rounded_once_however_much_text_there_is(name, matrices, monkeypatch):
    round_to_nearest, calls = grid.round_to_nearest, []
    network = build("mixtral")
    (block, *_) = inspect_model(network).moe
    method = METHODS[name]

    def counted(weight_RC, *rest):
        calls.append(len(weight_RC))
        return round_to_nearest(weight_RC, *rest)

    planner = method.planners(model_of(network), context())(block)
    monkeypatch.setattr(grid, "round_to_nearest", counted)
    for _ in range(3):
        with observe_experts({block: planner}, chunk=4):
            network(tokens(8, 12))
    bits = [b for b in method.bits if b]
    assert len(calls) == matrices * len(bits) * block.num_experts
