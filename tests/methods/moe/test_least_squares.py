"""The refit against least squares itself, and its promise never to do harm on calibration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.errors import UserError
from bench.models.expert_hooks import observe_experts
from bench.models.structure.model_structure import inspect_model
from methods.moe.least_squares import ExpertGrams, refit_columns, refit_error, refit_experts
from methods.moe.micro_experts import channels_per_expert, expert_spans, expert_view
from tests.methods.camera.test_removal import pruned
from tests.models.tiny_networks import ARCHITECTURES, build, tokens


def drawn(rows, width, seed):
    torch.manual_seed(seed)
    phi_SF = torch.randn(rows, width, dtype=torch.float64)
    phi_SF += phi_SF.roll(1, 1)  # micro-experts that resemble each other
    return phi_SF, torch.randn(5, width)


def test_without_damping_it_is_least_squares():
    phi_SF, down_DF = drawn(50, 9, 0)
    kept_K = torch.tensor([0, 2, 3, 7])
    columns_DK = refit_columns(phi_SF.T @ phi_SF, down_DF, kept_K, damping=1e-14)
    wanted = torch.linalg.lstsq(phi_SF[:, kept_K], phi_SF @ down_DF.double().T).solution.T
    torch.testing.assert_close(columns_DK, wanted, rtol=1e-8, atol=1e-8)
    left = (phi_SF @ down_DF.double().T - phi_SF[:, kept_K] @ wanted.T).square().sum()
    assert refit_error(phi_SF.T @ phi_SF, down_DF, kept_K, columns_DK) == pytest.approx(float(left))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 30), st.integers(1, 12), st.integers(0, 12),
    st.sampled_from([1e-10, 1e-4, 1e-1, 10.0]), st.integers(0, 99),
)  # fmt: skip
def test_it_never_increases_the_calibration_error(rows, width, kept, damping, seed):
    phi_SF, down_DF = drawn(rows, width, seed)
    gram_FF = phi_SF.T @ phi_SF
    kept_K = torch.randperm(width)[: min(kept, width)].sort().values
    columns_DK = refit_columns(gram_FF, down_DF, kept_K, damping)
    before = refit_error(gram_FF, down_DF, kept_K, down_DF[:, kept_K])
    assert refit_error(gram_FF, down_DF, kept_K, columns_DK) <= before * (1 + 1e-9) + 1e-9


def test_an_expert_that_was_never_visited_stays_as_it_was():
    _, down_DF = drawn(3, 6, 0)
    kept_K = torch.tensor([1, 4])
    columns_DK = refit_columns(torch.zeros(6, 6, dtype=torch.float64), down_DF, kept_K, 1e-4)
    assert torch.equal(columns_DK, down_DF[:, kept_K].double())


def test_says_when_the_damping_is_too_small():
    phi_SF = torch.ones(4, 3, dtype=torch.float64)
    with pytest.raises(UserError, match="refit_damping=1e-300 is too small"):
        refit_columns(phi_SF.T @ phi_SF, torch.ones(2, 3), torch.tensor([0, 1]), 1e-300)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_gram_matrices_hold_every_coefficient(name):
    network = build(name)
    block = inspect_model(network).moe[-1]
    outputs, shown = [], ExpertGrams(block)
    block.block.register_forward_hook(lambda _, args, y: outputs.append((args[0], y)))
    with observe_experts({block: shown}, chunk=5):
        network(tokens())
    # Σ over experts of ‖Φ_e W_e‖² is what removing each expert alone would cost.
    x_TD, y_TD = outputs[0]
    kept = {k: v.clone() for k, v in block.block.state_dict().items()}
    nothing = torch.tensor([], dtype=torch.int64)
    for expert, _ in expert_spans(block):
        down_DF = expert_view(block, expert).down
        predicted = refit_error(shown.grams[expert].total, down_DF, nothing, down_DF[:, nothing])
        down_DF.zero_()
        measured = float((block.block(x_TD) - y_TD).double().square().sum())
        assert predicted == pytest.approx(measured, rel=1e-4, abs=1e-8)
        block.block.load_state_dict(kept)


@pytest.mark.parametrize("state", ["zeroed", "removed"])
@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek", "phimoe"])
def test_it_lowers_the_error_of_the_outputs(name, state):
    rows = tokens(rows=16, length=24)
    dense = build(name)(rows).logits
    errors, reports = [], []
    for fit in (False, True):
        model, report = pruned(build(name), rows, alpha=0.0, state=state, refit=fit)
        errors.append(float((model.network(rows).logits - dense).square().mean()))
        reports.append(report)
    plain, fitted = reports
    # Later layers are measured on other outputs, so only the first one must choose the same.
    removed = [report.layers[0].removed_per_expert for report in reports]
    assert removed[0] == removed[1]
    for layer in fitted.layers:
        assert layer.refit["error_after"] < layer.refit["error_before"]
    assert "refit" not in plain.layers[0].model_extra
    assert errors[1] < errors[0]


def test_only_kept_columns_of_experts_that_lose_something_change():
    network = build("mixtral")
    block = inspect_model(network).moe[0]
    shown = ExpertGrams(block)
    with observe_experts({block: shown}, chunk=100):
        network(tokens())
    before = {k: v.clone() for k, v in block.experts.state_dict().items()}
    gone = dict(channels_per_expert(block, torch.tensor([1, 5, 13])))
    refit_experts(shown, gone, 1e-4)
    after = block.experts.state_dict()
    assert torch.equal(before["gate_up_proj"], after["gate_up_proj"])
    changed = (before["down_proj"] != after["down_proj"]).any(1)
    kept = [[c not in gone.get(e, []) and e in gone for c in range(12)] for e in range(6)]
    assert changed.tolist() == kept
