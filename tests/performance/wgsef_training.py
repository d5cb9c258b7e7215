"""A training step with the prox over the same step without it, on the small ResNet."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bench.data.image_catalogue import load_image_set
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from methods.wgsef.groups.convolution import filters
from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.solvers.allocation import GlobalAllocation
from methods.wgsef.solvers.envelope import DebiasedSolver, EnvelopeSolver
from methods.wgsef.solvers.optimizers import ProximalSGD
from methods.wgsef.solvers.solver import MagnitudeSolver, Solver, SolverContext
from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times

GOAL = 1.08
BATCH = 64
STEPS = 4
ROUNDS = 40


def figures() -> list[Figure]:
    """Measure steps on real digits; every solver trains a network of its own."""
    torch.set_num_threads(1)
    makers: dict[str, Callable[[SolverContext], Solver]] = {
        "envelope": EnvelopeSolver,
        "debiased": DebiasedSolver,
    }
    steps = [_steps(MagnitudeSolver), *(_steps(m) for m in makers.values())]
    plain, *others = times(steps, ROUNDS, clock=time.process_time)
    found = []
    for name, seconds in zip(makers, others, strict=True):
        # Of whole steps the least time is luck on a shared machine; the median is not.
        least, value = ratio(seconds, plain)
        how = f"median of {ROUNDS} times {STEPS} steps, interleaved, CPU time; minimum {least:.2f}"
        title = f"training step with / without the prox ({name})"
        found.append(Figure(title, value, f"<= {GOAL:g}", value <= GOAL, how))
    return found


def _steps(maker: Callable[[SolverContext], Solver]) -> Callable[[], object]:
    """Return `STEPS` training steps of a fresh small ResNet under a solver."""
    torch.manual_seed(0)
    network = build_classifier(
        VisionConfig(architecture="micro_resnet", channels=1, size=8)
    ).train()
    image_BCHH, label_B = load_image_set("digits").train.fetch(torch.arange(BATCH), None)
    partition = GroupPartition(network, filters(network, image_BCHH[:1]))
    allocation = GlobalAllocation(partition, 0.7)
    # From a quarter to half of the homotopy, where most groups are undecided.
    quarter = STEPS * ROUNDS
    context = SolverContext(network, partition, allocation, 4 * quarter, 18, image_BCHH[:1])
    solver = maker(context)
    solver.step = quarter
    optimizer = ProximalSGD(network.parameters(), solver, 0.01, 0.9)

    def steps() -> None:
        # Several at once: between single steps, the other networks would evict this one's weights
        # from the cache, which does not happen in a training.
        for _ in range(STEPS):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(image_BCHH), label_B).backward()
            optimizer.step()

    return steps
