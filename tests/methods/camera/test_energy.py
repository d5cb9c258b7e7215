"""The energy against brute force, in every architecture, layout, chunking and batching."""

import pytest
import torch

from bench.models.model import Model
from bench.models.structure.model_structure import inspect_model
from bench.schema import ModelConfig
from bench.ui import SILENT
from methods.camera.analysis import BlockEnergies, energy
from methods.moe.calibration import Moments, WalkOptions, squared_column_norms, walk_blocks
from methods.moe.micro_experts import zero_micro_experts
from tests.models.tiny_networks import ARCHITECTURES, build, tokens, unfuse

ONE_PASS = WalkOptions(batch=2, chunk=5, sequential=False)


def model_of(network):
    return Model(
        ModelConfig(name="tiny", source="tests"), network, None, "", None, torch.device("cpu")
    )


def measured(network, walk=ONE_PASS, rows=None):
    rows = tokens() if rows is None else rows
    observed = walk_blocks(model_of(network), rows, BlockEnergies, walk, SILENT)
    return [found for _, found in observed]


def energies(network, walk=ONE_PASS, alpha=0.3, normalised=False):
    found = measured(network, walk)
    return torch.cat([block.energies(alpha, normalised=normalised) for block in found])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_peak_it_is_the_error_of_removing_one(name):
    network = build(name)
    found = measured(network)[-1]
    energy_N = found.energies(0.0, normalised=False)
    block = found.block
    inputs = []
    hook = block.block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    network(tokens())
    hook.remove()

    y_TD = block.block(inputs[0]).double()
    kept = {k: v.clone() for k, v in block.block.state_dict().items()}
    for index in range(0, block.micro_experts, 7):
        zero_micro_experts(block, torch.tensor([index]))
        error = (block.block(inputs[0]).double() - y_TD).square().sum()
        block.block.load_state_dict(kept)
        torch.testing.assert_close(error, energy_N[index], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layouts_agree(name):
    fused, listed = energies(build(name)), energies(unfuse(build(name)))
    torch.testing.assert_close(fused, listed, rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("chunk", [1, 4, 10_000])
def test_batches_and_chunks_do_not_matter(batch, chunk):
    reference = energies(build("deepseek_v2"))
    found = energies(build("deepseek_v2"), WalkOptions(batch, chunk, sequential=False))
    torch.testing.assert_close(found, reference, rtol=1e-5, atol=0)


def test_formula_by_hand():
    phi_SF = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    moments = Moments(3, torch.device("cpu"))
    moments.add(slice(1, 3), phi_SF[:1] / 2, torch.tensor([2.0]))
    moments.add(slice(1, 3), phi_SF[1:], torch.tensor([1.0]))
    norm = squared_column_norms(torch.tensor([[7.0, 1.0, 2.0], [0.0, 1.0, 0.0]]))
    assert norm.tolist() == [49, 2, 4]
    assert energy(moments, norm, 0.25).tolist() == [
        0.0,
        (0.75 * 10 + 0.25 * 9) * 2,
        (0.75 * 4.25 + 0.25 * 4) * 4,
    ]
    assert energy(moments, norm, 0.0, tokens=5).tolist() == [0.0, 10 / 5 * 2, 4.25 / 5 * 4]


def test_sums_do_not_drift_in_half_precision():
    torch.manual_seed(0)
    hidden_SF = torch.randn(4096, 8).bfloat16()
    weight_S = torch.rand(4096).bfloat16()
    moments = Moments(8, torch.device("cpu"))
    for hidden, weight in zip(hidden_SF.split(16), weight_S.split(16), strict=True):
        moments.add(slice(0, 8), hidden, weight)
    exact = (hidden_SF.double() * weight_S.double()[:, None]).square().sum(0)
    torch.testing.assert_close(moments.square_sum_N, exact, rtol=1e-6, atol=0)


def test_normalised_does_not_depend_on_how_much_text():
    rows = tokens()
    twice = torch.cat([rows, rows])
    once, more = (
        measured(build("qwen2_moe"), rows=r)[0].energies(0.4, normalised=True)
        for r in (rows, twice)
    )
    torch.testing.assert_close(once, more, rtol=1e-5, atol=0)


def test_counts_tokens_and_output_power():
    network = build("deepseek_v3")
    outputs = []
    block = inspect_model(network).moe[0]
    hook = block.block.register_forward_hook(lambda _, __, output: outputs.append(output))
    network(tokens())
    hook.remove()
    found = measured(network)[0]
    assert found.tokens == tokens().numel()
    assert found.output_power == pytest.approx(float(outputs[0].square().sum()), rel=1e-5)


def test_later_layers_see_earlier_changes_only_if_sequential():
    def second(sequential):
        walk = WalkOptions(batch=2, chunk=100, sequential=sequential)
        results = []
        model = model_of(build("mixtral"))
        for _, found in walk_blocks(model, tokens(), BlockEnergies, walk, SILENT):
            results.append(found.energies(0.0, normalised=False))
            zero_micro_experts(found.block, torch.arange(40))
        return results[1]

    dense = measured(build("mixtral"))[1].energies(0.0, normalised=False)
    pruned = build("mixtral")
    zero_micro_experts(inspect_model(pruned).moe[0], torch.arange(40))
    after = measured(pruned)[1].energies(0.0, normalised=False)

    torch.testing.assert_close(second(False), dense)
    torch.testing.assert_close(second(True), after)
    assert not torch.allclose(dense, after)


def test_an_observer_starts_at_zero():
    found = BlockEnergies(inspect_model(build("olmoe")).moe[0])
    assert not found.energies(0.5, normalised=False).any()
