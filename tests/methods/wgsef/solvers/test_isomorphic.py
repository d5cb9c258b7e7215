"""Isomorphic Pruning: forms of layers, and one budget for each, against torch-pruning's own."""

from types import SimpleNamespace

import pytest
import torch
import torch_pruning
from torch import nn

from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from methods.wgsef.groups import convolution
from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.prox.operators import prox_debiased, prox_envelope
from methods.wgsef.solvers.allocation import IsomorphicAllocation, LayerAllocation, ProxParameters


def families(*sizes_and_forms):
    """As much of a partition as this allocation reads: sizes, forms, and rows per family."""
    sizes = [size for size, _ in sizes_and_forms]
    found = [SimpleNamespace(groups=size, form=form) for size, form in sizes_and_forms]
    partition = SimpleNamespace(
        families=found, sizes=sizes, groups=sum(sizes), device=torch.device("cpu")
    )
    width = max(sizes)
    places = torch.cat([torch.arange(s) + i * width for i, s in enumerate(sizes)])

    def pad(values_M):
        flat = values_M.new_zeros(len(sizes) * width).index_copy_(0, places, values_M)
        return flat.view(len(sizes), width)

    partition.pad_by_family = pad
    partition.unpad = lambda values_LN: values_LN.flatten()[places]
    return partition


def dropped(allocation, scores, progress=1.0):
    keep_M = allocation.select(torch.tensor(scores), progress)
    return [score for score, keep in zip(scores, keep_M.tolist(), strict=True) if not keep]


def test_layers_of_one_form_compete_and_others_never_do():
    partition = families((3, "block"), (2, "head"), (3, "block"))
    allocation = IsomorphicAllocation(partition, 0.5)
    scores = [1.0, 2.0, 9.0, 0.1, 0.2, 3.0, 4.0, 8.0]
    assert dropped(allocation, scores) == [1.0, 2.0, 0.1, 3.0]
    assert allocation.k(1.0) == 4
    assert dropped(allocation, scores, 0.0) == []
    # A layer keeps its floor, even where every group of it is among the lowest of its form.
    low = [1.0, 2.0, 2.5, 0.1, 0.2, 7.0, 6.0, 8.0]
    assert dropped(IsomorphicAllocation(partition, 0.67), low) == [1.0, 2.0, 0.1, 7.0, 6.0]


def network_of(name):
    torch.manual_seed(0)
    network = build_classifier(VisionConfig(architecture=name, channels=1, size=8)).eval()
    return network, torch.randn(1, 1, 8, 8)


@pytest.mark.parametrize("name", ["micro_resnet", "micro_vgg", "micro_mobilenet"])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_the_choice_is_that_of_torch_pruning(name, ratio):
    network, image = network_of(name)
    partition = GroupPartition(network, convolution.filters(network, image))
    # Over the layer's mean: where a whole layer falls below the threshold, torch-pruning skips it.
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer="mean")
    pruner = torch_pruning.pruner.BasePruner(
        network,
        image,
        importance=importance,
        pruning_ratio=ratio,
        global_pruning=True,
        isomorphic=True,
        ignored_layers=[convolution.last_layer(network, image)],
        root_module_types=[nn.Conv2d, nn.Linear],
    )
    names = {module: key for key, module in network.named_modules()}
    score, gone = {}, {}
    layers = pruner.ignored_layers
    for group in pruner.DG.get_all_groups(layers, pruner.root_module_types):
        score[names[group[0].dep.target.module]] = importance(group)
    for group in pruner.step(interactive=True):
        gone[names[group[0].dep.target.module]] = sorted(group[0].idxs)
    wanted = [gone.get(family.name, []) for family in partition.families]
    score_M = torch.cat([score[family.name] for family in partition.families]).double()
    keep_M = IsomorphicAllocation(partition, ratio, floor=0.0).select(score_M)
    found = [(~mine).nonzero().flatten().tolist() for mine in partition.split(keep_M)]
    assert found == wanted
    assert any(wanted)


@pytest.mark.parametrize("operator", [prox_envelope, prox_debiased])
def test_each_form_solves_the_equation_that_it_would_solve_alone(operator):
    partition = families((4, "a"), (6, "b"), (5, "a"))
    norm_M = torch.rand(15, generator=torch.Generator().manual_seed(1)).double() + 0.1
    allocation = IsomorphicAllocation(partition, 0.5, floor=0.0)
    scale_M, gate_M = allocation.shrink(operator, norm_M, ProxParameters(0.3), 1.0)
    for members in ([*range(4), *range(10, 15)], list(range(4, 10))):
        mine = norm_M[members]
        held = [int(norm_M[:4].argmax()), 10 + int(norm_M[10:].argmax())]
        if len(members) == 6:
            held = [4 + int(norm_M[4:10].argmax())]
        kept = len(members) - int(0.5 * len(members))
        free = [place for place, member in enumerate(members) if member not in held]
        alone = operator(mine[free][None], kept - len(held), 0.3)
        torch.testing.assert_close(scale_M[members][free], alone.scale[0])
        assert scale_M[held].tolist() == gate_M[held].tolist() == [1.0] * len(held)


def test_a_form_of_one_layer_is_a_layer():
    partition = families((4, "a"), (6, "b"), (8, "c"))
    score_M = torch.rand(18, generator=torch.Generator().manual_seed(2))
    for progress in (0.2, 1.0):
        mine, layer = (
            kind(partition, 0.5).select(score_M, progress)
            for kind in (IsomorphicAllocation, LayerAllocation)
        )
        assert torch.equal(mine, layer)


def test_a_form_whose_floors_are_all_it_may_keep():
    partition = families((2, "a"), (2, "a"), (8, "b"))
    allocation = IsomorphicAllocation(partition, 0.5)
    norm_M = torch.arange(1.0, 13.0).double()
    scale_M, gate_M = allocation.shrink(prox_envelope, norm_M, ProxParameters(0.5), 1.0)
    assert scale_M[:4].tolist() == gate_M[:4].tolist() == [0.0, 1.0, 0.0, 1.0]
