"""The paper's solvers against slow transcriptions of their definitions, group by group."""

import math

import pytest
import torch

from methods.wgsef.prox import operators
from methods.wgsef.solvers.envelope import (
    AUTO_TOTAL,
    DebiasedSolver,
    EnvelopeForm,
    EnvelopeHalfSpaceSolver,
    EnvelopeSolver,
)
from methods.wgsef.solvers.group_lasso import GroupLassoSolver
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


@pytest.mark.parametrize("ridge", [True, False])
@pytest.mark.parametrize("metric", ["unit", "euclidean"])
@pytest.mark.parametrize("strength", [5.0, "auto"])
def test_the_envelope_solver_minimises_its_objective_over_gates(context, strength, metric, ridge):
    solver = EnvelopeSolver(context, EnvelopeForm(strength, metric, ridge))
    unit = units(context)
    x, g = sgd_step(context, solver)
    t = [xj - RATE * gj for xj, gj in zip(x, g, strict=True)]
    # The ramp 2 c t / T^2 of a training of T steps, at t = 1.
    lam = 2 * AUTO_TOTAL / context.steps**2 if strength == "auto" else RATE * 5.0
    assert solver.total_strength == pytest.approx(lam)
    d = [u * u for u in unit]
    h = d if metric == "unit" else [1.0] * len(d)
    b = [lam * d[j] / h[j] for j in range(len(t))]
    # Without ridge its linearisation at t is subtracted: the prox of F at (1 + b) t.
    lift = [1.0 if ridge else 1 + b[j] for j in range(len(t))]
    norm = [lift[j] * float(t[j].norm()) for j in range(len(t))]
    a = [math.sqrt(lam * d[j]) * norm[j] for j in range(len(t))]
    free = unprotected(context, [u * z for u, z in zip(unit, norm, strict=True)])
    k = len(t) // 2 - (len(t) - len(free))
    low, high = 0.0, 1e6
    for _ in range(200):
        eta = (low + high) / 2
        gates = [min(1, max(0, eta * a[j] - b[j])) for j in free]
        low, high = (eta, high) if sum(gates) < k else (low, eta)
    expected = list(t)
    for j, u in zip(free, gates, strict=True):
        expected[j] = (u / (u + b[j]) if u > 1e-7 else 0.0) * lift[j] * t[j]
    close(groups(context), expected)
    assert 0 < solver.fractional < len(t)


def unprotected(context, scores):
    start, free = 0, []
    for family in context.partition.families:
        order = sorted(range(start, start + family.groups), key=lambda j: -scores[j])
        free += order[max(1, math.ceil(0.05 * family.groups)) :]
        start += family.groups
    return free


def test_the_automatic_strength_sums_to_its_total_whatever_rate_and_interval(context):
    for every, rate in ((1, RATE), (5, RATE), (1, 1e-4)):
        solver = EnvelopeSolver(context, EnvelopeForm(every=every))
        optimizer = ProximalSGD(context.network.parameters(), solver, rate)
        for step in range(context.steps):
            gradients(context, seed=step)
            optimizer.step()
        # The sum of t / T over T steps is (T + 1) / 2; over every fifth of ten, 15 / 10.
        steps = range(every, context.steps + 1, every)
        share = every * 2 * sum(steps) / context.steps**2
        assert solver.total_strength == pytest.approx(AUTO_TOTAL * share)


def test_a_given_strength_sums_to_itself_times_the_rates(context):
    for make in (
        lambda: EnvelopeSolver(context, EnvelopeForm(strength=0.3)),
        lambda: EnvelopeHalfSpaceSolver(context, EnvelopeForm(strength=0.3)),
        lambda: GroupLassoSolver(context, 0.3),
    ):
        solver = make()
        optimizer = ProximalSGD(context.network.parameters(), solver, RATE)
        for step in range(context.steps):
            optimizer.param_groups[0]["lr"] = RATE * step
            gradients(context, seed=step)
            optimizer.step()
        expected = 0.3 * RATE * sum(range(context.steps))
        assert solver.total_strength == pytest.approx(expected)


@pytest.mark.parametrize("metric_name", ["unit", "euclidean"])
def test_the_envelope_after_adam_acts_in_the_group_mean_of_adams_metric(context, metric_name):
    solver = EnvelopeSolver(context, EnvelopeForm(5.0, metric_name))
    unit = units(context)
    gradients(context)
    optimizer = ProximalAdam(context.network.parameters(), solver, RATE)
    seen = {}
    allocation = context.allocation
    original = allocation.shrink

    def spy(operator, norm_M, strength, progress):
        seen.update(metric=strength.metric, lam=strength.lam)
        return original(operator, norm_M, strength, progress)

    allocation.shrink = spy
    optimizer.step()
    metric = groups(
        context, {n: w.grad.abs() + 1e-8 for n, w in context.partition.parameters.items()}
    )
    means = torch.stack([h.mean() for h in metric])
    expected, lam = means, RATE * 5.0
    if metric_name == "unit":
        # Relative within the layer, times d_j; the size of the whole network's goes into lambda.
        relative = torch.cat([part / part.mean() for part in context.partition.split(means)])
        expected, lam = torch.tensor(unit).square() * relative, lam / float(means.mean())
    torch.testing.assert_close(seen["metric"], expected.double(), atol=1e-6, rtol=1e-4)
    assert seen["lam"] == pytest.approx(lam, rel=1e-4)


@pytest.mark.parametrize("ridge", [True, False])
@pytest.mark.parametrize("metric", ["unit", "euclidean"])
def test_the_half_space_step_of_the_envelope_uses_its_gradient(context, metric, ridge):
    solver = EnvelopeHalfSpaceSolver(context, EnvelopeForm(0.2, metric, ridge), warmup=0.0)
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
        pull = (u * u if metric == "euclidean" else 1.0) * (1 / gate - (0 if ridge else 1))
        y = xj - RATE * (gj + 0.2 * pull * xj)
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


def test_without_ridge_the_step_is_the_debiased_operator_of_a_smaller_lambda():
    # In the unit metric the difference-of-convex step at lam is prox_debiased at lam / (1 + lam).
    torch.manual_seed(0)
    norm_LM, k = torch.rand(3, 40, dtype=torch.float64), 11
    for lam in (1e-3, 0.1, 2.0):
        step = operators.prox_envelope((1 + lam) * norm_LM, k, lam)
        direct = operators.prox_debiased(norm_LM, k, lam / (1 + lam))
        torch.testing.assert_close((1 + lam) * step.scale, direct.scale, atol=1e-9, rtol=1e-9)
