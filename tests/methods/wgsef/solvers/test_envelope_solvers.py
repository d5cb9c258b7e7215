"""The paper's solvers against slow transcriptions of their definitions, group by group."""

import math

import pytest
import torch

from methods.wgsef.solvers.envelope import DebiasedSolver, EnvelopeHalfSpaceSolver, EnvelopeSolver
from methods.wgsef.solvers.optimizers import ProximalAdam, ProximalSGD
from tests.methods.wgsef.solvers.solver_setup import (
    RATE,
    close,
    gradients,
    groups,
    sgd_step,
    solver_context,
    units,
)


@pytest.fixture
def context():
    return solver_context()


def test_the_envelope_solver_minimises_its_objective_over_gates(context):
    solver = EnvelopeSolver(context, strength=5.0)
    unit = units(context)
    x, g = sgd_step(context, solver)
    t = [xj - RATE * gj for xj, gj in zip(x, g, strict=True)]
    b = [RATE * 5.0 * u * u for u in unit]
    free = unprotected(context, [u * float(tj.norm()) for u, tj in zip(unit, t, strict=True)])
    k = len(t) // 2 - (len(t) - len(free))
    low, high = 0.0, 1e6
    for _ in range(200):
        eta = (low + high) / 2
        gates = [min(1, max(0, eta * math.sqrt(b[j]) * float(t[j].norm()) - b[j])) for j in free]
        low, high = (eta, high) if sum(gates) < k else (low, eta)
    expected = list(t)
    for j, u in zip(free, gates, strict=True):
        expected[j] = (u / (u + b[j]) if u > 1e-7 else 0.0) * t[j]
    close(groups(context), expected)


def unprotected(context, scores):
    start, free = 0, []
    for family in context.partition.families:
        order = sorted(range(start, start + family.groups), key=lambda j: -scores[j])
        free += order[max(1, math.ceil(0.05 * family.groups)) :]
        start += family.groups
    return free


def test_the_envelope_after_adam_acts_in_the_group_mean_of_adams_metric(context):
    solver = EnvelopeSolver(context, strength=5.0)
    gradients(context)
    optimizer = ProximalAdam(context.network.parameters(), solver, RATE)
    seen = {}
    allocation = context.allocation
    original = allocation.shrink

    def spy(operator, norm_M, strength, progress):
        seen["metric"] = strength.metric
        return original(operator, norm_M, strength, progress)

    allocation.shrink = spy
    optimizer.step()
    metric = groups(
        context, {n: w.grad.abs() + 1e-8 for n, w in context.partition.parameters.items()}
    )
    means = torch.stack([h.mean() for h in metric])
    torch.testing.assert_close(seen["metric"], means, atol=1e-6, rtol=1e-4)


def test_the_half_space_step_of_the_envelope_uses_its_gradient(context):
    solver = EnvelopeHalfSpaceSolver(context, strength=0.2, warmup=0.0)
    unit, k = units(context), context.allocation.k(1.0)
    x, g = sgd_step(context, solver)
    z = sorted((u * float(xj.norm()) for u, xj in zip(unit, x, strict=True)), reverse=True)
    low, high = 0.0, 1e6
    for _ in range(200):
        eta = (low + high) / 2
        low, high = (eta, high) if sum(min(1, eta * one) for one in z) < k else (low, eta)
    expected = []
    for u, xj, gj in zip(unit, x, g, strict=True):
        gate = min(1, eta * u * float(xj.norm()))
        y = xj - RATE * (gj + 0.2 * u * u / gate * xj)
        expected.append(torch.zeros_like(y) if y @ xj < 0 else y)
    close(groups(context), expected)


def test_the_debiased_homotopy_ends_with_at_most_k_groups(context):
    solver = DebiasedSolver(context)
    optimizer = ProximalSGD(context.network.parameters(), solver, RATE)
    alive = []
    for step in range(context.steps):
        gradients(context, seed=step)
        optimizer.step()
        alive.append(sum(bool(xj.any()) for xj in groups(context)))
        assert alive[-1] >= context.allocation.k(1.0)
    assert alive[-1] == context.allocation.k(1.0) < alive[0]
