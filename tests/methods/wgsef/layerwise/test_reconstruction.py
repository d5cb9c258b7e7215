"""Layer-wise selection against brute force, least squares and optimality certificates."""

from itertools import combinations, pairwise

import pytest
import torch

from bench.errors import UserError
from methods.wgsef.layerwise.reconstruction import (
    BackwardElimination,
    Reconstruction,
    _PenalisedReconstruction,
    damped_inverse,
    envelope_gates,
    select_by_elimination,
    select_by_homotopy,
)
from methods.wgsef.prox.operators import envelope_value
from tests.methods.wgsef.layerwise.oracles import (
    by_elimination,
    by_energy,
    by_envelope,
    by_homotopy,
)
from tests.methods.wgsef.prox.oracles import fenchel_young_gap

SELECTORS = [by_energy, by_homotopy, by_elimination]


def layer(atoms=24, outputs=6, tokens=400, seed=0):
    """A rectified layer with correlated atoms of unlike energy: activations, read-out, problem."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, 10, generator=generator, dtype=torch.float64)
    mix = torch.randn(10, atoms, generator=generator, dtype=torch.float64)
    phi_TM = torch.relu(mixed @ mix) * torch.logspace(-1, 1, atoms, dtype=torch.float64)
    weight_MD = torch.randn(atoms, outputs, generator=generator, dtype=torch.float64)
    return phi_TM, weight_MD, Reconstruction.from_gram(phi_TM.T @ phi_TM / tokens, weight_MD)


def test_the_error_is_that_of_the_outputs():
    phi_TM, weight_MD, problem = layer()
    changed_MD = weight_MD + 0.1 * torch.randn_like(weight_MD)
    output_TD = phi_TM @ weight_MD
    expected = (phi_TM @ changed_MD - output_TD).square().sum() / output_TD.square().sum()
    found = problem.error(changed_MD * problem.scale[:, 0])
    assert found == pytest.approx(float(expected), rel=1e-9)
    torch.testing.assert_close(problem.weights(problem.readout), weight_MD)


def test_the_refit_is_least_squares():
    phi_TM, weight_MD, problem = layer()
    keep_M = torch.arange(24) % 3 > 0
    expected = torch.linalg.lstsq(phi_TM[:, keep_M], phi_TM @ weight_MD).solution
    found = problem.weights(problem.refit(keep_M, damping=0.0))
    torch.testing.assert_close(found[keep_M], expected, rtol=1e-6, atol=1e-8)
    assert not found[~keep_M].any()


@pytest.mark.parametrize("select", SELECTORS)
@pytest.mark.parametrize("k", [1, 7, 24])
def test_every_selector_keeps_k_atoms_and_the_refit_helps(select, k):
    _, _, problem = layer()
    v_MD = select(problem, k)
    keep_M = v_MD.norm(dim=1) > 0
    assert int(keep_M.sum()) == k
    assert problem.error(problem.refit(keep_M)) <= problem.error(v_MD) + 1e-9


def test_elimination_drops_what_brute_force_would_drop_first():
    phi_TM, weight_MD, problem = layer(atoms=10)
    output_TD = phi_TM @ weight_MD
    left = list(range(10))
    for k in range(9, 4, -1):
        errors = {}
        for drop in left:
            rest = [j for j in left if j != drop]
            solved = torch.linalg.lstsq(phi_TM[:, rest], output_TD).solution
            errors[drop] = float((phi_TM[:, rest] @ solved - output_TD).square().sum())
        left.remove(min(errors, key=errors.get))
        v_MD = by_elimination(problem, k, damping=1e-12)
        assert (v_MD.norm(dim=1) > 0).nonzero()[:, 0].tolist() == left
        assert problem.error(v_MD) == pytest.approx(
            problem.error(problem.refit(v_MD.norm(dim=1) > 0, damping=1e-12)), rel=1e-5
        )


@pytest.mark.broad
def test_the_envelope_finds_its_global_optimum():
    _, _, problem = layer()
    k, lam = 6, 0.3
    v_MD = by_envelope(problem, k, lam, steps=3000)
    y_MD = (problem.target - problem.gram @ v_MD) / lam
    gap = fenchel_young_gap(v_MD[None], y_MD[None], torch.ones(1, 24).double(), k)
    assert abs(float(gap)) <= 1e-7 * float((v_MD * y_MD).sum().abs())


def test_homotopy_and_elimination_are_near_the_best_subset():
    _, _, problem = layer(atoms=12, seed=4)
    k = 5
    best = min(
        problem.error(problem.refit(torch.isin(torch.arange(12), torch.tensor(subset))))
        for subset in combinations(range(12), k)
    )
    refitted = {
        select.__name__: problem.error(problem.refit(select(problem, k).norm(dim=1) > 0))
        for select in SELECTORS
    }
    assert refitted["by_elimination"] <= 1.5 * best
    assert refitted["by_homotopy"] <= 3 * best


def test_atoms_that_never_fire_are_the_first_to_go():
    phi_TM, weight_MD, _ = layer()
    phi_TM[:, :5] = 0
    problem = Reconstruction.from_gram(phi_TM.T @ phi_TM / 400, weight_MD)
    for select in SELECTORS:
        assert problem.error(select(problem, 19)) <= 1e-6


@pytest.mark.parametrize("width", [1, 3])
def test_a_lazy_elimination_is_one_that_inverts_anew(width):
    phi_TM, weight_MD, _ = layer(atoms=24)
    problem = Reconstruction.from_gram(phi_TM.T @ phi_TM / 400, weight_MD, width)
    damping, atoms = 1e-6, 24 // width
    state = BackwardElimination(problem, damping)
    gram_MM = problem.gram + damping * torch.eye(24)
    left = list(range(atoms))
    for _ in range(atoms - 1):
        places = [atom * width + i for atom in left for i in range(width)]
        inverse = torch.linalg.inv(gram_MM[places][:, places])
        v_KD = inverse @ problem.target[places]
        torch.testing.assert_close(state.v_MD[places], v_KD, atol=1e-7, rtol=1e-6)
        costs = []
        for n in range(len(left)):
            own = slice(n * width, (n + 1) * width)
            costs.append(
                float((v_KD[own].T @ torch.linalg.inv(inverse[own, own]) @ v_KD[own]).trace())
            )
        cost, atom = state.cheapest()
        assert atom == left[costs.index(min(costs))]
        assert cost == pytest.approx(min(costs), rel=1e-6)
        state.drop(atom)
        left.remove(atom)


def test_a_floor_keeps_atoms_in_the_problem_that_loses_least():
    phi_TM, weight_MD, problem = layer(atoms=10)
    weak = Reconstruction.from_gram(phi_TM.T @ phi_TM / 400, 1e-6 * weight_MD)
    free = select_by_elimination([problem, weak], 8)
    held = select_by_elimination([problem, weak], 8, floor=2)
    assert [int(mask.sum()) for mask in free] == [8, 0]
    assert [int(mask.sum()) for mask in held] == [6, 2]
    # In units of its own output the weak layer is worth as much as the other.
    fair = select_by_elimination([problem.of_unit_output(), weak.of_unit_output()], 8)
    assert [int(mask.sum()) for mask in fair] == [4, 4]


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("k", [2, 5])
def test_the_homotopy_is_gates_and_ridge_regressions_in_turn(width, k):
    phi_TM, weight_MD, _ = layer(seed=3)
    problem = Reconstruction.from_gram(phi_TM.T @ phi_TM / 400, weight_MD, width)
    (found_A,) = select_by_homotopy([problem], k)
    assert torch.equal(found_A, problem.norms(by_homotopy(problem, k))[0] > 0)


@pytest.mark.parametrize("twin", [1.0, 1e-3, 1e-6, 0.0])
def test_a_minimiser_is_a_ridge_regression_however_alike_activations_are(twin):
    phi_TM, weight_MD, _ = layer(atoms=24)
    phi_TM[:, 1] = phi_TM[:, 0] + twin * phi_TM[:, 1]
    problem = Reconstruction.from_gram(phi_TM.T @ phi_TM / 400, weight_MD)
    gate_M = torch.linspace(0.05, 1.2, 24, dtype=torch.float64).clamp(max=1)
    found_MD = _PenalisedReconstruction(problem).minimiser(gate_M, 0.7)
    gram_MM = problem.gram + 1e-8 * torch.eye(24)
    ridge_MM = (0.7 * (1 / gate_M - 1)).diag()
    expected_MD = torch.linalg.solve(gram_MM + ridge_MM, gram_MM @ problem.readout)
    scale = float(expected_MD.abs().max())
    torch.testing.assert_close(found_MD, expected_MD, rtol=0, atol=2e-5 * scale)


def test_each_half_step_of_the_homotopy_lowers_its_objective():
    _, _, problem = layer()
    k, lam, state = 7, 0.4, _PenalisedReconstruction(problem)
    v_MD, values = problem.readout, []
    for _ in range(30):
        norm_1A = problem.norms(v_MD)
        envelope = envelope_value(norm_1A, torch.ones_like(norm_1A), torch.tensor([k]))
        excess = float(envelope) - 0.5 * float(norm_1A.square().sum())
        gap_MD = v_MD - problem.readout
        values.append(0.5 * float((gap_MD * (problem.gram @ gap_MD)).sum()) + lam * excess)
        v_MD = state.minimiser(envelope_gates(norm_1A, k)[0], lam)
    assert all(new <= old + 1e-9 for old, new in pairwise(values))
    assert values[-1] < 0.9 * values[0]


def test_eigenvalues_just_below_zero_are_damped_away():
    """A Gram matrix of fewer tokens than activations, added up in single precision."""
    torch.manual_seed(0)
    tokens_TM = torch.randn(20, 60)
    gram_MM = (tokens_TM.T @ tokens_TM).double()
    gram_MM /= gram_MM.diagonal().mean()
    gram_MM -= 1e-6 * torch.eye(60)
    assert torch.linalg.eigvalsh(gram_MM)[0] < -1e-8
    inverse_MM = damped_inverse(gram_MM, 1e-8)
    assert torch.linalg.eigvalsh(inverse_MM)[0] > 0
    with pytest.raises(UserError, match="NaN or infinite"):
        damped_inverse(torch.full((2, 2), torch.nan), 1e-8)
