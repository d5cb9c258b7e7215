"""What CAMERA-PQ and MC measure and choose, against direct transcriptions of their definitions."""

import itertools
from functools import partial

import pytest
import torch

from bench.models.bitpacking.packed_modules import packed_linears
from bench.models.expert_hooks import observe_experts
from bench.models.structure.model_structure import inspect_model
from methods.camera.joint import (
    BitOptions,
    CameraPQ,
    ReplacementErrors,
    solve_bit_budget,
)
from methods.moe.quantizer.grid import round_weights
from methods.quantization.mixture import Mc, McPlanner
from tests.methods.quantization.quantized_networks import SMALL, applied, context, model_of
from tests.models.tiny_networks import ARCHITECTURES, build, tokens, unfuse


class Tokens:
    """Keeps what the routed experts of a block receive."""

    def __init__(self):
        self.seen = {}

    def routed(self, expert, x_SD, hidden_SF, weight_S):
        self.seen.setdefault(expert, []).append((x_SD, weight_S))

    def shared(self, *_):
        pass

    def output(self, *_):
        pass

    def of(self, expert):
        return [torch.cat(parts) for parts in zip(*self.seen.get(expert, ()), strict=True)]


def watched(network, observer):
    """Let calibration text pass through a network with its first MoE block watched."""
    block = inspect_model(network).moe[0]
    other = Tokens()
    for each in (observer(block), other):
        with observe_experts({block: each}, chunk=7):
            network(tokens())
        if each is not other:
            measured = each
    return block, measured, other


@pytest.mark.parametrize("layout", ["fused", "list"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replacement_error_is_that_of_replacing_one_micro_expert(name, layout):
    options = BitOptions(bits=(3, 1, 0), group=8, block=1, clip="minmax")
    network = build(name) if layout == "fused" else unfuse(build(name))
    block, measured, seen = watched(network, lambda block: ReplacementErrors(block, options))
    losses_IO = iter(measured.losses)
    for expert, parts in enumerate(measured.blocks):
        view = block.expert(expert)
        for (place,) in parts:
            found_O = next(losses_IO)
            if expert not in seen.seen:
                assert not found_O.any()
                continue
            x_SD, weight_S = seen.of(expert)
            channel = slice(int(place), int(place) + 1)

            def output(bits, x=x_SD, weight=weight_S, channel=channel, view=view):
                """What the micro-expert adds to the block's output."""
                gate, up, down = view.gate[channel], view.up[channel], view.down[:, channel]
                if bits is not None:
                    gate, up, down = (round_weights(part, bits, 8) for part in (gate, up, down))
                return (view.act(x @ gate.T) * (x @ up.T) @ down.T) * weight[:, None]

            exact = output(None)
            wanted = [(exact - output(bits)).square().sum() for bits in (3, 1)]
            wanted.append(exact.square().sum())
            torch.testing.assert_close(
                found_O.float(), torch.stack(wanted), rtol=1e-3, atol=1e-5 * float(wanted[-1])
            )


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("budget_bits", [1.0, 3.5, 6.0, 9.25])
def test_bytes_stay_within_the_budget(scope, budget_bits):
    network = build("mixtral")
    method = CameraPQ(budget_bits=budget_bits, scope=scope, block=4, **SMALL)
    report = applied(method, network)
    weights = 3 * 16 * 12 * 6
    held = dict.fromkeys(range(3), 0)
    for name, linear in packed_linears(network):
        if ".experts." in name:
            layer = int(name.split(".")[2])
            held[layer] += sum(b.numel() * b.element_size() for b in linear.buffers())
    assert sum(held.values()) <= 3 * weights * budget_bits / 8
    if scope == "layer":
        assert max(held.values()) <= weights * budget_bits / 8
    bits = report.details["bits"]["experts"]
    assert bits["weight_bits"] + bits["overhead_bits"] == 8 * sum(held.values())
    removed = [layer.removed for layer in report.layers]
    kept = [sum(block.widths) for block in inspect_model(network).moe]
    assert [72 - count for count in removed] == kept


def test_more_bytes_never_foresee_more_error():
    options = BitOptions(bits=(4, 3, 2, 1, 0), group=8, block=4, clip="minmax")
    block, measured, _ = watched(build("olmoe"), lambda block: ReplacementErrors(block, options))
    errors = []
    for budget in range(0, 40000, 4000):
        (chosen,) = solve_bit_budget([measured], budget)
        cost = options.cost_in_bits(block)[torch.arange(len(chosen)), chosen].sum()
        assert cost <= budget
        errors.append(float(measured.losses[torch.arange(len(chosen)), chosen].sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(measured.energy)


def test_nothing_kept_is_an_expert_that_adds_nothing():
    network = build("deepseek")
    applied(CameraPQ(budget_bits=1e-6, block=4, **SMALL), network)
    blocks = inspect_model(network).moe
    assert all(block.widths == (0,) * 6 for block in blocks)
    x, index = torch.randn(3, 16), torch.tensor([[0, 1]] * 3)
    assert not blocks[0].experts(x, index, torch.ones(3, 2)).any()
    assert network(tokens()).logits.isfinite().all()


def test_mixture_weighs_frequency_router_and_rounding_error():
    method = Mc(bits=(4, 2, 1), mean_bits=2, alpha=0.5, beta=2, group=8)
    block, measured, seen = watched(build("qwen2_moe"), partial(McPlanner, method))
    total = sum(len(x) for parts in seen.seen.values() for x, _ in parts)
    for expert, loss_B in enumerate(measured.losses()):
        if expert not in seen.seen:
            assert not loss_B.any()
            continue
        x_SD, weight_S = seen.of(expert)
        view = block.expert(expert)
        factor = (len(x_SD) / total) ** 0.5 * float(weight_S.mean()) ** 2
        for bits, found in zip((4, 2, 1), loss_B, strict=True):
            gate, up, down = (
                round_weights(part, bits, 8) for part in (view.gate, view.up, view.down)
            )
            y_SD = view.combine(view.hidden(x_SD))
            error = y_SD - (view.act(x_SD @ gate.T) * (x_SD @ up.T)) @ down.T
            assert float(found) == pytest.approx(factor * float(error.norm()), rel=1e-3)


def test_mixture_chooses_the_best_of_all_allowed():
    network = build("mixtral")
    method = Mc(**SMALL)
    _, measured, _ = watched(network, partial(McPlanner, method))
    loss_EB = measured.losses()

    def loss(bits):
        return sum(float(loss_EB[expert, 3 - b]) for expert, b in enumerate(bits))

    allowed = [
        bits
        for bits in itertools.product((3, 2, 1), repeat=6)
        if sum(bits) <= 12 and 3 in bits and 2 in bits
    ]
    measured.plans()
    found = measured.details()["bits_per_expert"]
    assert tuple(found) in allowed
    assert loss(found) == pytest.approx(min(map(loss, allowed)), rel=1e-6)


def test_global_scope_measures_before_anything_is_changed():
    network = build("mixtral")
    method = CameraPQ(budget_bits=6, block=4, scope="global", **SMALL)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    method.planners(model_of(network), context())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
