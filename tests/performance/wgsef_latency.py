"""Latency of an exported network over the dense one, both in torch on one thread.

Filters are zeroed by their norm at the ratio and removed, as a run's export does; what remains
computes the same. No training: the time does not depend on the weights' values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import Classifier, VisionConfig
from methods.wgsef.groups.convolution import filters
from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.removal import smaller_classifier
from methods.wgsef.solvers.allocation import LayerAllocation
from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times

RATIO = 0.7
BATCH = 8
ROUNDS = 15
GOALS = {"vgg16": 0.4, "resnet18": 0.4}


def figures() -> list[Figure]:
    """Measure images of CIFAR-10's size."""
    torch.set_num_threads(1)
    found = []
    for name, goal in GOALS.items():
        torch.manual_seed(0)
        dense = build_classifier(VisionConfig(architecture=name)).eval()
        image_BCHH = torch.randn(BATCH, 3, 32, 32)
        small = _pruned(dense, image_BCHH[:1])
        whole, cut = times([_forward(n, image_BCHH) for n in (dense, small)], ROUNDS)
        least, value = ratio(cut, whole)
        how = f"median of {ROUNDS}, interleaved; minimum {least:.2f}; batch {BATCH}, 32x32"
        title = f"latency without {RATIO:.0%} of the filters / dense ({name})"
        found.append(Figure(title, value, f"<= {goal:g}", value <= goal, how))
    return found


def _pruned(dense: Classifier, example: torch.Tensor) -> Classifier:
    """Return the network without its weakest filters, the same share of every layer."""
    network = build_classifier(dense.config).eval()
    network.load_state_dict(dense.state_dict())
    families = filters(network, example)
    partition = GroupPartition(network, families)
    keep_M = LayerAllocation(partition, RATIO).select(partition.norms())
    partition.scale_(keep_M.double())
    return smaller_classifier(network, families, partition.split(~keep_M))


def _forward(network: nn.Module, image_BCHH: torch.Tensor) -> Callable[[], object]:
    def forward() -> object:
        with torch.inference_mode():
            return network(image_BCHH)

    return forward
