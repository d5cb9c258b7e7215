"""Counted and arithmetic FLOPs agree for image classifiers, as built and as WGSEF exports them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.measurement.flops import analytic
from bench.measurement.flops.cost_rows import count_image_flops, image_parts
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from bench.models.macs import macs_by_part
from methods.wgsef.groups import convolution, residual
from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.removal import smaller_classifier
from tests.measurement.flops.agreement import agree

MICRO = ["micro_lenet", "micro_vgg", "micro_resnet", "micro_mobilenet", "micro_densenet"]
PAPER = ["lenet5", "vgg16", "resnet18", "resnet50", "mobilenet_v1", "densenet40"]


def exported(name, kind, share, size=8):
    """A classifier without a random share of its groups."""
    network = build_classifier(VisionConfig(architecture=name, channels=1, size=size)).eval()
    families = getattr(convolution, kind)(network, torch.randn(1, 1, size, size))
    partition = GroupPartition(network, families)
    dead_M = torch.rand(partition.groups) < share
    partition.scale_((~dead_M).double())
    return network, smaller_classifier(network, families, partition.split(dead_M))


@pytest.mark.broad
@settings(max_examples=6, deadline=None)
@given(
    st.sampled_from(MICRO),
    st.sampled_from(["filters", "channels"]),
    st.sampled_from([0.3, 0.7]),
    st.integers(1, 3),
)
def test_exported_classifiers(name, kind, share, batch):
    dense, small = exported(name, kind, share)
    for network in (dense, small):
        agree(count_image_flops(network, batch), analytic.classifier_macs(network, batch))
    assert count_image_flops(small, batch).total < count_image_flops(dense, batch).total


def test_a_residual_branch_that_is_gone():
    network = build_classifier(VisionConfig(architecture="micro_resnet", channels=1, size=8)).eval()
    families = residual.depth(network, torch.randn(1, 1, 8, 8))
    GroupPartition(network, families).scale_(torch.tensor([1.0, 0.0, 1.0]).double())
    small = smaller_classifier(network, families, [torch.tensor([False, True, False])])
    agree(count_image_flops(small, 2), analytic.classifier_macs(small, 2))


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", PAPER)
def test_the_networks_of_the_paper(name):
    size = 28 if name == "lenet5" else 32
    with torch.device("meta"):
        network = build_classifier(VisionConfig(architecture=name, channels=1, size=size)).eval()
    counted, products = count_image_flops(network, 2), analytic.classifier_macs(network, 2)
    agree(counted, products)
    parts = {part: 2 * macs for part, macs in macs_by_part(products).items()}
    assert parts == {part: flops for part, flops in image_parts(counted).items() if flops}
