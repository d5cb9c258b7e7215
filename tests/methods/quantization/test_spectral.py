"""Spectral experts against slow transcriptions: the quantizer, the basis, the choice of bits."""

import copy
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.errors import UserError
from bench.measurement.flops.counter import count_flops
from bench.models.expert_hooks import observe_experts
from bench.models.loading import open_folder
from bench.models.saving import save_model
from bench.models.structure.model_structure import inspect_model
from methods.camera.pruning import CameraP
from methods.moe.quantizer import grid
from methods.moe.quantizer.bit_budget import choose_bits_of_directions
from methods.moe.quantizer.observers import BlockHessians
from methods.quantization import spectral
from methods.quantization.spectral import BitsMoeStyle
from methods.quantization.spectral_experts import SpectralExperts
from tests.methods.method_application import applied
from tests.models.test_saving import model_of
from tests.models.tiny_networks import build, llama, tokens

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
UNQUANTIZED = {"attention_bits": 16, "shared_bits": 16, "dense_bits": 16}
SMALL = BitsMoeStyle(mean_bits=8, group=4, min_tokens=1, **UNQUANTIZED)


def released_quantizer(x, bits, rounds=50):
    """One group of values, as the release's `quantize_symmetric` reads: value by value."""
    tiny, top = 1e-8, 2 ** (bits - 1) - 1
    scale = max(sum(abs(v) for v in x) / len(x), tiny)
    if bits == 1:
        return [1.0 if v >= 0 else -1.0 for v in x], scale
    if bits > 4:
        scale = max(max(abs(v) for v in x) / top, tiny)
        return [min(max(round(v / scale), -top - 1), top) for v in x], scale
    for _ in range(rounds):
        codes = [min(max(round(v / scale), -top - 1), top) for v in x]
        fit = sum(v * c for v, c in zip(x, codes, strict=True)) / len(x)
        scale = max(fit / (sum(c * c for c in codes) / len(x) + tiny), tiny)
    return codes, scale


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_the_quantizer_is_the_released_one(bits):
    x_KF = torch.randn(3, 10, generator=torch.manual_seed(bits)).double()
    code_KF, scale_KG = grid.quantize_signed(x_KF, bits, 4)
    assert scale_KG.shape == (3, 3)
    for row, x_F in enumerate(x_KF.tolist()):
        for group in range(3):
            place = slice(4 * group, 4 * group + 4)
            codes, scale = released_quantizer(x_F[place], bits)
            assert code_KF[row, place].tolist() == codes
            assert float(scale_KG[row, group]) == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_alternation_makes_the_error_larger(bits, monkeypatch):
    x_KF = torch.randn(50, 16, generator=torch.manual_seed(0)).double()
    errors = []
    for rounds in range(1, 8):
        monkeypatch.setattr(grid, "ALTERNATIONS", rounds)
        code_KF, scale_K1 = grid.quantize_signed(x_KF, bits, 16)
        errors.append((x_KF - code_KF * scale_K1).square().sum(1))
    for before, after in pairwise(errors):
        assert bool((after <= before + 1e-9).all())


def observed(network):
    """Every block with what its experts saw of the calibration text."""
    found = {block: BlockHessians(block) for block in inspect_model(network).moe}
    with observe_experts(found):
        network(tokens())
    return found


def test_the_factors_of_all_directions_are_the_weights():
    for block, seen in observed(build("qwen2_moe")).items():
        experts = spectral.smoothed(seen.experts, 1)
        views = [block.expert(expert) for expert in range(block.num_experts)]
        for name in ("gate", "up"):
            found = spectral.input_spectrum([getattr(v, name) for v in views], experts, 1e-3)
            for view, factor_KF in zip(views, found.factor_EKF, strict=True):
                rebuilt = factor_KF.T @ found.basis_KD
                torch.testing.assert_close(rebuilt, getattr(view, name).double(), **CLOSE)
        found = spectral.output_spectrum([view.down for view in views], experts)
        for view, factor_KF in zip(views, found.factor_EKF, strict=True):
            rebuilt = found.basis_KD.T @ factor_KF
            torch.testing.assert_close(rebuilt, view.down.double(), **CLOSE)


def test_the_energy_of_a_direction_is_what_its_outputs_lose():
    for block, seen in observed(build("qwen2_moe")).items():
        views = [block.expert(expert) for expert in range(block.num_experts)]
        experts = spectral.smoothed(seen.experts, 0)
        gate = spectral.input_spectrum([view.gate for view in views], experts, 1e-9)
        down = spectral.output_spectrum([view.down for view in views], experts)
        for expert in range(block.num_experts):
            inputs, hidden = experts[expert].inputs.total, experts[expert].hidden.total
            for place in (0, 3):
                lost_FD = torch.outer(gate.factor_EKF[expert, place], gate.basis_KD[place])
                lost = float((lost_FD @ inputs @ lost_FD.T).trace())
                assert float(gate.energy_EK[expert, place]) == pytest.approx(lost, rel=1e-6)
                lost_DF = torch.outer(down.basis_KD[place], down.factor_EKF[expert, place])
                lost = float((lost_DF @ hidden @ lost_DF.T).trace())
                assert float(down.energy_EK[expert, place]) == pytest.approx(lost, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 60), st.sampled_from([0, 3, 10]))
def test_no_choice_of_the_same_cost_loses_less(seed, budget, shared):
    """Brute force over every choice of three directions of two experts."""
    costs = (0, 2, 5)
    draw = torch.rand(3, 2, 3, generator=torch.manual_seed(seed), dtype=torch.float64)
    loss_NEB = draw.sort(dim=2, descending=True).values

    def price(place_NE):
        spent = sum(costs[place] for row in place_NE for place in row)
        return spent + shared * sum(any(row) for row in place_NE)

    def loss(place_NE):
        return sum(
            float(loss_NEB[n, e, place]) for n, row in enumerate(place_NE)
            for e, place in enumerate(row)
        )  # fmt: skip

    found = choose_bits_of_directions(loss_NEB, costs, shared, budget).tolist()
    assert price(found) <= budget
    rows = [(flat[:2], flat[2:4], flat[4:]) for flat in product(range(3), repeat=6)]
    best = min(loss(each) for each in rows if price(each) <= price(found))
    assert loss(found) == pytest.approx(best)


class Multiplied(torch.nn.Module):
    """Fused experts called one by one, with factors multiplied out."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def matrix(self, name, expert):
        part = self.experts.factors[expert]
        value_k = part.get_buffer(f"{name}_value").float()
        place_k = part.get_buffer(f"{name}_place").long()
        basis_kD = self.experts.basis(name)[place_k] * value_k[:, None]
        stored = part.get_submodule(name).dense(torch.float32)
        return basis_kD.T @ stored if name == "down" else stored @ basis_kD

    def forward(self, x, index, weight):
        y = torch.zeros_like(x)
        for token, slot in product(range(len(x)), range(index.shape[1])):
            gate, up, down = (
                self.matrix(n, int(index[token, slot])) for n in spectral.MATRIX_NAMES
            )
            hidden = self.experts.act_fn(gate @ x[token]) * (up @ x[token])
            y[token] += weight[token, slot] * (down @ hidden)
        return y


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_the_network_computes_with_its_factors(name, tmp_path):
    network = build(name)
    report = applied(SMALL, network)
    slow = copy.deepcopy(network)
    replaced = [m for m in slow.modules() if isinstance(m, SpectralExperts)]
    assert len(replaced) == len(report.layers) > 0
    for parent in list(slow.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, SpectralExperts):
                setattr(parent, child, Multiplied(module))
    rows = tokens(2, 6, seed=1)
    torch.testing.assert_close(network(rows).logits, slow(rows).logits, **CLOSE)
    assert save_model(model_of(network), tmp_path) == "slimbench"
    again = open_folder(tmp_path).network
    torch.testing.assert_close(again(rows).logits, network(rows).logits, **CLOSE)


def test_bits_are_those_that_are_stored_and_within_the_budget():
    network = build("qwen2_moe")
    report = applied(SMALL, network)
    modules = [m for m in network.modules() if isinstance(m, SpectralExperts)]
    for module, layer in zip(modules, report.layers, strict=True):
        held = sum(t.numel() * t.itemsize for t in (*module.parameters(), *module.buffers()))
        counted = (layer.weight_bits + layer.overhead_bits) / 8
        # Codes of a level are filled up to whole bytes.
        levels = sum(len(linear.shape.levels) for linear in module.linears())
        assert counted <= held <= counted + 3 * levels
        assert layer.mean_bits_with_overhead <= SMALL.mean_bits
        assert sum(layer.directions_by_bits.values()) == sum(
            linear.shape.rows for linear in module.linears()
        )


def test_more_bits_are_closer_and_enough_of_them_are_the_model():
    whole, errors = build("qwen3_moe")(tokens()).logits, []
    for mean_bits in (4, 8, 14, 40):
        network = build("qwen3_moe")
        applied(SMALL.model_copy(update={"mean_bits": mean_bits}), network)
        errors.append(float((network(tokens()).logits - whole).norm() / whole.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2e-3


def test_flops_are_those_of_bases_and_chosen_factors():
    network = build("qwen2_moe")
    applied(SMALL, network)
    (module, *_) = (m for m in network.modules() if isinstance(m, SpectralExperts))
    count, top_k = 6, 2
    x_TD = torch.randn(count, module.basis("gate").shape[1])
    index_TK = torch.stack([torch.randperm(module.num_experts)[:top_k] for _ in range(count)])
    with count_flops() as counted:
        module(x_TD, index_TK, torch.ones(count, top_k))
    bases = count * sum(module.basis(name).numel() for name in spectral.MATRIX_NAMES)
    factors = sum(
        linear.numel
        for expert in index_TK.flatten().tolist()
        for linear in module.factors[expert].children()
    )
    assert counted.total == 2 * (bases + factors)


def test_an_expert_without_tokens_keeps_directions():
    network = build("qwen2_moe")
    (block, *_) = inspect_model(network).moe
    seen = BlockHessians(block)
    seen.routed(0, torch.randn(50, block.d_model), torch.randn(50, block.d_ff), torch.ones(50))
    experts = spectral.smoothed(seen.experts, 32)
    views = [block.expert(expert) for expert in range(block.num_experts)]
    found = spectral.output_spectrum([view.down for view in views], experts)
    assert bool((found.energy_EK.sum(1) > 0).all())


def test_models_that_cannot_share_a_basis_are_refused():
    with pytest.raises(UserError, match=r"shares a basis among experts, and .* has none"):
        applied(SMALL, llama())
    ragged = build("qwen2_moe")
    applied(CameraP(ratio=0.3), ragged)
    with pytest.raises(UserError, match="different widths"):
        SMALL.check(inspect_model(ragged))
