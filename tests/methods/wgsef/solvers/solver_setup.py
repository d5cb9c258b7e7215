"""Set-up of solver tests: a small network with its groups, and the groups as vectors."""

import torch

from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from methods.wgsef.groups import convolution
from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.solvers.allocation import GlobalAllocation
from methods.wgsef.solvers.optimizers import ProximalSGD
from methods.wgsef.solvers.solver import SolverContext

RATE = 0.1


def solver_context():
    """A small VGG with groups of unlike norms, half of which may stay."""
    torch.manual_seed(0)
    network = build_classifier(VisionConfig(architecture="micro_vgg", channels=1, size=8))
    image = torch.randn(1, 1, 8, 8)
    partition = GroupPartition(network, convolution.filters(network, image))
    partition.scale_(torch.rand(partition.groups).double() + 0.2)
    allocation = GlobalAllocation(partition, 0.5)
    return SolverContext(network, partition, allocation, steps=10, epoch=5, example=image)


def gradients(context, seed=1):
    """Give every weight a random gradient."""
    torch.manual_seed(seed)
    for weight in context.network.parameters():
        weight.grad = torch.randn_like(weight) * 0.1


def groups(context, tensors=None):
    """All groups as flat vectors: of the weights, or of other tensors of their shapes."""
    found = []
    for family in context.partition.families:
        for j in range(family.groups):
            parts = []
            for owned in family.owned_slices:
                weight = context.partition.parameters[owned.tensor].detach()
                tensor = weight if tensors is None else tensors[owned.tensor]
                parts += [tensor[u].flatten() for u in owned.units[owned.groups == j].tolist()]
            found.append(torch.cat(parts).double())
    return found


def slopes(context):
    """The gradients of all groups as flat vectors."""
    return groups(context, {n: w.grad for n, w in context.partition.parameters.items()})


def close(found, expected):
    """Compare groups with groups."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def sgd_step(context, solver):
    """Take one step; the groups and their gradients before it."""
    gradients(context)
    x, g = groups(context), slopes(context)
    ProximalSGD(context.network.parameters(), solver, RATE).step()
    return x, g


def units(context):
    """One over the mean norm of each group's layer."""
    means = []
    for family in context.partition.families:
        part = [v.norm() for v in groups(context)][len(means) : len(means) + family.groups]
        means += [float(sum(part) / len(part))] * family.groups
    return [1 / mean for mean in means]
