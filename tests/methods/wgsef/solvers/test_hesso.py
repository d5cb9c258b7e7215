"""HESSO against a slow transcription, group by group, and the fading of its oracle."""

import math

import pytest
import torch

from methods.wgsef.competitors import Hesso
from methods.wgsef.solvers.hesso import HessoSolver, normalised_mean
from methods.wgsef.solvers.optimizers import ProximalAdam, ProximalSGD
from tests.methods.wgsef.solvers.solver_setup import RATE, close, gradients, groups, solver_context


@pytest.fixture
def context():
    return solver_context()


def slow_scores(x, g):
    """The five terms of every group, each divided by its norm over all groups."""
    columns = [[], [], [], [], []]
    for v, d in zip(x, g, strict=True):
        dot = float(v @ d)
        columns[0].append(float(v.norm()))
        columns[1].append(float(v.norm()) / len(v))
        columns[2].append(dot / (float(v.norm()) * float(d.norm()) + 1e-8) + 1)
        columns[3].append(abs(dot))
        columns[4].append(dot**2 / 2)
    sizes = [math.sqrt(sum(value**2 for value in column)) + 1e-8 for column in columns]
    return [
        sum(0.2 * value / size for value, size in zip(row, sizes, strict=True))
        for row in zip(*columns, strict=True)
    ]


def lowest_outside_floors(context, scores, gone, count):
    """The groups of least score, where every family keeps a twentieth, at least one."""
    protected, start = set(), 0
    for size in context.partition.sizes:
        mine = sorted(range(start, start + size), key=lambda j: (-scores[j], j))
        protected |= set(mine[: max(1, math.ceil(0.05 * size))])
        start += size
    free = [j for j in range(len(scores)) if j not in protected and j not in gone]
    return set(sorted(free, key=lambda j: scores[j])[:count])


@pytest.mark.parametrize("adam", [False, True])
def test_periods_follow_their_definition(context, adam):
    """Start at step 2, two periods of 3 steps: what trains and what fades, step by step."""
    solver = HessoSolver(context, start=0.2, span=0.6, periods=2)
    maker = ProximalAdam if adam else ProximalSGD
    optimizer = maker(context.network.parameters(), solver, RATE)
    half = context.partition.groups // 2
    gone, fading = set(), set()
    for step in range(10):
        gradients(context, seed=step)
        x = groups(context)
        optimizer.step()
        place = (step - 2) % 3
        if step in (2, 5):
            # The direction is that of the whole step, which weights that do not fade still show.
            plain = solver_context_after(context, x, optimizer, step, adam)
            scores = slow_scores(x, plain)
            share = (half // 2) if step == 2 else half - len(gone)
            fading = lowest_outside_floors(context, scores, gone, share)
        found = groups(context)
        alive = [float(v.norm()) > 0 for v in found]
        if step in (2, 3, 5, 6):
            assert {j for j, on in enumerate(solver.fading_M.tolist()) if on} == fading
        if step in (4, 7):
            gone |= fading
        assert all(not alive[j] for j in gone)
        assert sum(alive) == len(found) - len(gone)
        expected = [1.0] * len(found)
        if 2 <= step < 8:
            for j in fading:
                expected[j] = (3 - place - 1) / 3
        for j in gone:
            expected[j] = 0.0
        assert solver.gate_M.tolist() == pytest.approx(expected)
    assert len(gone) == half


def solver_context_after(context, x, optimizer, step, adam):
    """The direction of the step just taken, by the optimizer's own formula."""
    tensors = {}
    for name, weight in context.partition.parameters.items():
        if adam:
            state = optimizer.state[weight]
            first = state["exp_avg"] / (1 - 0.9 ** float(state["step"]))
            tensors[name] = first / optimizer.metric(weight)
        else:
            tensors[name] = weight.grad
    return groups(context, tensors)


def test_marked_groups_fade_on_a_straight_line(context):
    """With zero gradients: 3/4, 2/4, 1/4 and 0 of the start, the others untouched."""
    solver = HessoSolver(context, start=0.0, span=0.4, periods=1)
    optimizer = ProximalSGD(context.network.parameters(), solver, RATE)
    start = groups(context)
    for place in range(6):
        for weight in context.network.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        marked = (solver.fading_M | solver.gone_M).tolist()
        share = max(0, 3 - place) / 4
        close(
            groups(context), [v * (share if on else 1) for v, on in zip(start, marked, strict=True)]
        )
    assert sum(marked) == context.partition.groups // 2
    assert solver.fractional == 0


def test_scores_by_hand():
    mean_M = normalised_mean([torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])])
    assert mean_M.tolist() == pytest.approx([0.3, 0.9])


def test_an_interrupted_training_goes_on_where_it_was(context):
    solver = HessoSolver(context, start=0.0, span=0.8, periods=2)
    optimizer = ProximalSGD(context.network.parameters(), solver, RATE)
    for step in range(6):
        gradients(context, seed=step)
        optimizer.step()
    again = HessoSolver(context, start=0.0, span=0.8, periods=2)
    again.load(solver.state())
    assert torch.equal(again.gone_M, solver.gone_M)
    assert torch.equal(again.fading_M, solver.fading_M)
    assert again.step == solver.step


def test_a_span_beyond_the_selection_is_refused():
    with pytest.raises(ValueError, match="end after the selection"):
        Hesso(start=0.5, span=0.6)
