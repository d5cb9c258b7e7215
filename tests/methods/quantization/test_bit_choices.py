"""What CAMERA-PQ and MC measure and choose, against direct transcriptions of their definitions."""

import itertools
from functools import partial

import pytest
import torch

from bench.errors import UserError
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


@pytest.mark.sample(2)
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


@pytest.mark.sample(3)
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


@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_mixture_has_the_factors_of_the_official_code(name):
    """n of all slots, the sum of the softmax before top-k, norms at the block's output, summed."""
    network = build(name)
    method = Mc(bits=(3, 2, 1), mean_bits=2, group=8, variant="code")
    (block, *_), halves = inspect_model(network).moe, tokens().split(3)
    planner = McPlanner(method, block)
    n_E, w_E, error_EB = torch.zeros(6), torch.zeros(6), torch.zeros(6, 3)
    inputs = []
    for rows in halves:
        hook = block.block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        with observe_experts({block: planner}, chunk=7):
            network(rows)
        hook.remove()
        x_BLD = inputs.pop()
        logits_TE, _, index_TK = block.router(x_BLD.flatten(0, 1))
        softmax_TE, y_BLD = logits_TE.float().softmax(1), block.block(x_BLD)
        for token, slots in enumerate(index_TK.tolist()):
            for expert in slots:
                n_E[expert] += 1
                w_E[expert] += softmax_TE[token, expert]
        for expert, place in itertools.product(range(6), range(3)):
            view = block.expert(expert)
            before = [part.clone() for part in (view.gate, view.up, view.down)]
            for part, old in zip((view.gate, view.up, view.down), before, strict=True):
                part.copy_(round_weights(old, (3, 2, 1)[place], 8))
            error_EB[expert, place] += (block.block(x_BLD) - y_BLD).norm()
            for part, old in zip((view.gate, view.up, view.down), before, strict=True):
                part.copy_(old)
    wanted = (n_E / n_E.sum())[:, None] * (w_E / w_E.sum())[:, None] ** 1.5 * error_EB
    torch.testing.assert_close(planner.losses().float(), wanted, rtol=1e-3, atol=1e-7)


# Layer 0 of Mixtral-8x7B as MC's repository ships it (Aaronhuang-778/MC-MoE at 7aa062c): slots of
# each expert, sums of its router weights, errors at 1, 2 and 3 bits, and the widths of each budget.
SLOTS = [68862, 63387, 62746, 63751, 66314, 70431, 56466, 72331]
WEIGHTS = [19892, 22812, 21596, 21344, 19124, 16805, 17566, 18465]
ERRORS = [
    [455.0, 180.4, 78.21],
    [3856, 708.0, 370.0],
    [736.0, 372.7, 156.3],
    [663.2, 341.5, 143.5],
    [525.4, 273.9, 114.7],
    [434.2, 218.1, 92.07],
    [3275, 677.8, 289.0],
    [450.3, 231.8, 97.39],
]
WIDTHS = {
    12: "13211121",
    13: "13221121",
    14: "23221121",
    15: "23221131",
    16: "23222131",
    17: "23322131",
    18: "23322132",
    19: "23332132",
    20: "23332232",
}


@pytest.mark.parametrize("budget", WIDTHS)
def test_mixture_chooses_the_published_widths_from_the_published_factors(budget):
    network = build("mixtral", num_local_experts=8)
    method = Mc(bits=(3, 2, 1), mean_bits=budget / 8, group=8, variant="code")
    planner = McPlanner(method, inspect_model(network).moe[0])
    planner.tokens_E = torch.tensor(SLOTS, dtype=torch.float64)
    planner.weight_E = torch.tensor(WEIGHTS, dtype=torch.float64)
    planner.norm_EB = torch.tensor(ERRORS, dtype=torch.float64).flip(1)
    planner.plans()
    assert "".join(map(str, planner.details()["bits_per_expert"])) == WIDTHS[budget]


def test_mixture_with_official_factors_needs_a_router_of_hidden_states():
    network = build("mixtral")
    gate = network.model.layers[0].mlp.gate
    network.model.layers[0].mlp.gate.forward = lambda x, bias: gate(x)
    with pytest.raises(UserError, match="use variant=mean_weight"):
        Mc(variant="code").check(inspect_model(network))


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
