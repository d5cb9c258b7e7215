"""A training step with the prox over the same step without it, on the small ResNet."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.data.images import load
from bench.models.vision import VisionConfig, build
from methods.wgsef.groups.convolution import filters
from methods.wgsef.groups.partition import Partition
from methods.wgsef.solvers.envelope import Debiased, Envelope
from methods.wgsef.solvers.solver import Magnitude, Scene, Solver
from methods.wgsef.training.allocation import Allocation
from methods.wgsef.training.optimizers import ProximalSGD
from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times

GOAL = 1.10
BATCH = 64
ROUNDS = 60


def figures() -> list[Figure]:
    """Measure steps on real digits; every solver trains a network of its own."""
    torch.set_num_threads(1)
    makers: dict[str, Callable[[Scene], Solver]] = {"envelope": Envelope, "debiased": Debiased}
    plain, *others = times([_step(Magnitude), *(_step(m) for m in makers.values())], ROUNDS)
    found = []
    for name, seconds in zip(makers, others, strict=True):
        # Of whole steps the least time is luck on a shared machine; the median is not.
        least, value = ratio(seconds, plain)
        how = f"median of {ROUNDS}, interleaved; minimum {least:.2f}; batch {BATCH}"
        title = f"training step with / without the prox ({name})"
        found.append(Figure(title, value, f"<= {GOAL:g}", value <= GOAL, how))
    return found


def _step(maker: Callable[[Scene], Solver]) -> Callable[[], object]:
    """Return a training step of a fresh small ResNet under a solver."""
    torch.manual_seed(0)
    network = build(VisionConfig(architecture="micro_resnet", channels=1, size=8)).train()
    image_BCHH, label_B = load("digits").train.fetch(torch.arange(BATCH), None)
    partition = Partition(network, filters(network, image_BCHH[:1]))
    allocation = Allocation(partition, 0.7)
    # Half way through the homotopy, where most groups are undecided.
    solver = maker(Scene(network, partition, allocation, 4 * ROUNDS, 18, image_BCHH[:1]))
    solver.step = ROUNDS
    optimizer = ProximalSGD(network.parameters(), solver, 0.01, 0.9)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(image_BCHH), label_B).backward()
        optimizer.step()

    return step
