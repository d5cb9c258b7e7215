"""Trial removal: what a tracer misreads is not cut, whatever the layers are."""

import pytest
import torch
from torch import nn

from bench.errors import UserError
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from methods.wgsef.groups.choice import GroupChoice, families_of
from methods.wgsef.groups.partition import GroupFamily, GroupPartition, Slice
from methods.wgsef.groups.verification import mark_unremovable
from methods.wgsef.removal import smaller_classifier

IMAGE = torch.zeros(1, 3, 8, 8)


class Mixed(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.between = between
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.second(self.between(self.first(x))).mean((2, 3)))


class Mixer(nn.Module):
    """Mean over all channels, as a normalisation over channels has."""

    def forward(self, x):
        return x / (1 + x.square().mean(1, keepdim=True)).sqrt()


def first_filters():
    """The filters of the first convolution, as a tracer that sees nothing between would say."""
    owned = tuple(Slice.whole(f"first.{key}", (0,), 8) for key in ("weight", "bias"))
    reader = Slice.whole("second.weight", (1,), 8)
    return GroupFamily("first", "filters", 8, owned, (reader,))


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (nn.ReLU(), None),
        # A mean over channels is another one when a zero channel is left out.
        (Mixer(), "without them its outputs change"),
        (nn.ChannelShuffle(2), "without them its forward fails"),
        (nn.Sigmoid(), "without them its outputs change"),
        (nn.GroupNorm(2, 8), "without them its forward fails"),
    ],
)
def test_a_family_is_removable_only_if_removed_equals_zeroed(between, reason):
    torch.manual_seed(0)
    network = Mixed(between)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    (family,) = mark_unremovable(network, [first_filters()], IMAGE)
    if reason is None:
        assert family.unremovable_reason is None
    else:
        assert reason in family.unremovable_reason
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    # One that fails leaves the others alone.
    hidden = GroupFamily(
        "second", "filters", 6,
        tuple(Slice.whole(f"second.{key}", (0,), 6) for key in ("weight", "bias")),
        (Slice.whole("head.weight", (1,), 6),),
    )  # fmt: skip
    marked = mark_unremovable(network, [first_filters(), hidden], IMAGE)
    assert [f.unremovable_reason is None for f in marked] == [reason is None, True]


def test_a_head_of_zeros_hides_nothing():
    network = Mixed(Mixer())
    torch.nn.init.zeros_(network.head.weight)
    (family,) = mark_unremovable(network, [first_filters()], IMAGE)
    assert family.unremovable_reason == "without them its outputs change"


def test_channels_that_a_layer_does_not_have_are_one_sentence():
    wrong = GroupFamily("first", "filters", 9, (Slice.whole("first.weight", (0,), 9),))
    with pytest.raises(UserError, match=r"filters of first are not understood"):
        mark_unremovable(Mixed(nn.ReLU()), [wrong], IMAGE)


NETWORKS = ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "regnet_x_400mf", "vit_b_16"]
SLOW = ["convnext_tiny", "densenet121", "googlenet", "efficientnet_b0", "vgg11_bn", "swin_t"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NETWORKS, *SLOW])
def test_torchvisions_networks_are_exported_as_zeroed_or_refused(name):
    torch.manual_seed(0)
    config = VisionConfig(architecture=f"torchvision/{name}", channels=3, size=64, classes=10)
    network = build_classifier(config).eval()
    images = torch.randn(2, 3, 64, 64)
    try:
        families = families_of(network, GroupChoice(groups=("filters",)))
    except UserError as error:
        assert "not understood" in str(error) or "cannot be traced" in str(error)
        return
    partition = GroupPartition(network, families)
    dead = torch.rand(partition.groups) < 0.4
    partition.scale_((~dead).double())
    parts = zip(families, partition.split(dead), strict=True)
    cut = [(f, d) for f, d in parts if f.unremovable_reason is None]
    smaller = smaller_classifier(network, *zip(*cut, strict=True))
    torch.testing.assert_close(smaller(images), network(images), atol=1e-5, rtol=1e-5)
