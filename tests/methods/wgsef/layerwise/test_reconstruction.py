"""Layer-wise selection against brute force, least squares and optimality certificates."""

from itertools import combinations

import pytest
import torch

from methods.wgsef.layerwise.reconstruction import Reconstruction
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
