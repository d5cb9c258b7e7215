"""Residual blocks and attention heads of networks that are not ours: zeroed equals removed."""

import json

import pytest
import torch
from torch import nn
from torchvision.models.regnet import ResBottleneckBlock

from bench.errors import UserError
from bench.models.classifiers import architectures
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from bench.models.classifiers.serialization import load_classifier_folder, save_classifier
from methods.wgsef.groups import residual, transformer
from methods.wgsef.groups.choice import GroupChoice, families_of
from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.groups.verification import mark_unremovable
from methods.wgsef.removal import smaller_classifier
from tests.methods.wgsef.groups.tiny_classifiers import MIXED, resnet18, vit


def removed_after(network, choice, dead, tmp_path):
    """The zeroed network's outputs and those of the removed one, read from its folder."""
    size = network.config.size
    images = torch.randn(2, 3, size, size)
    families = families_of(network, GroupChoice(**choice))
    assert [family.unremovable_reason for family in families] == [None] * len(families)
    before = network(images)
    partition = GroupPartition(network, families)
    dead_M = dead(partition.groups)
    partition.scale_((~dead_M).double())
    zeroed = network(images)
    assert not torch.allclose(before, zeroed, atol=1e-3)
    smaller = smaller_classifier(network, families, partition.split(dead_M))
    save_classifier(smaller, tmp_path)
    loaded = load_classifier_folder(tmp_path)
    assert sum(p.numel() for p in loaded.parameters()) < sum(
        p.numel() for p in network.parameters()
    )
    return zeroed, loaded(images), loaded


def some(groups):
    return torch.arange(groups) % 3 != 1


def second(groups):
    return torch.arange(groups) == 1


def close(found, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "choice",
    [
        {"groups": ["heads"]},
        {"groups": ["depth"]},
        MIXED,
    ],
)
def test_heads_and_blocks_of_a_vision_transformer(choice, monkeypatch, tmp_path):
    network = vit(monkeypatch)
    zeroed, removed, smaller = removed_after(network, choice, some, tmp_path)
    close(removed, zeroed)
    # Trained anew, what was resized begins with drawn weights.
    fresh = build_classifier(smaller.config)
    resized = [fresh.get_submodule(name) for name in smaller.config.shapes]
    matrices = [w for layer in resized for w in layer.parameters(recurse=False) if w.ndim > 1]
    assert all(float(weight.std()) > 0 for weight in matrices)
    if choice["groups"] == ["heads"]:
        # What was pruned is pruned again: of one, two and one heads, one of the two goes.
        zeroed, removed, _ = removed_after(smaller, choice, second, tmp_path / "again")
        close(removed, zeroed)


@pytest.mark.broad
def test_blocks_of_a_resnet_become_identities_or_their_shortcuts(tmp_path):
    network = resnet18()
    zeroed, removed, smaller = removed_after(network, {"groups": ["depth"]}, some, tmp_path)
    close(removed, zeroed)
    left = {s.block.removeprefix("features.0."): s.child for s in smaller.config.removed}
    assert left == {
        "layer1.0": "", "layer2.0": "downsample", "layer2.1": "",
        "layer3.1": "", "layer4.0": "downsample",
    }  # fmt: skip


class Scaled(nn.Module):
    """Half of the input plus a branch: zero weights leave no shortcut."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))

    def forward(self, x):
        return 0.5 * x + self.branch(x)


class Plain(Scaled):
    def forward(self, x):
        return x + self.branch(x)


class Versioned(Plain):
    """A network that refuses a state dict without its version, as MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        assert metadata.get("version") == 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_the_version_of_a_module_survives_its_folder(monkeypatch, tmp_path):
    monkeypatch.setitem(architectures._MODULES, "own.Versioned", Versioned)
    network = build_classifier(VisionConfig(architecture="own.Versioned", size=8))
    save_classifier(network, tmp_path)
    image = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(load_classifier_folder(tmp_path)(image), network(image))


class Stage(nn.Sequential):
    """A module of blocks, which passes its input on as well once all of its weights are zero."""


def test_only_the_innermost_modules_that_pass_on_their_input_are_blocks():
    network = nn.Sequential(Stage(Plain(), Scaled(), Plain()), Stage(Plain()), nn.Conv2d(3, 2, 1))
    (family,) = residual.depth(network, torch.zeros(1, 3, 4, 4))
    assert [(s.block, s.child, s.rectified) for s in family.shortcuts] == [
        ("0.0", "", False), ("0.2", "", False), ("1.0", "", False),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"no residual branches to remove in layers.depth=2\*"):
        residual.depth(network, torch.zeros(1, 3, 4, 4), "2*")


def test_a_projection_is_the_shortcut_though_it_comes_before_the_branch():
    block = ResBottleneckBlock(4, 8, 2, nn.BatchNorm2d, nn.ReLU, group_width=4)
    network = nn.Sequential(block, nn.Conv2d(8, 2, 1))
    (family,) = residual.depth(network, torch.zeros(1, 4, 8, 8))
    assert [(s.block, s.child, s.rectified) for s in family.shortcuts] == [("0", "proj", True)]


@pytest.mark.parametrize(
    ("attention", "said"),
    [
        (nn.MultiheadAttention(8, 2, kdim=4), "heads of 0 are not understood"),
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), "heads of 0 are not understood"),
        (nn.Linear(8, 8), "has no heads of torch"),
    ],
)
def test_heads_that_are_not_understood_are_one_sentence(attention, said):
    with pytest.raises(UserError, match=said):
        transformer.attention_heads(nn.Sequential(attention))


class Encoded(nn.Module):
    """Three pre-norm layers of torch's own encoder, which are called with masks by name."""

    def __init__(self, layer):
        super().__init__()
        self.project = nn.Linear(12, 16)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(self.project(x.flatten(1).unflatten(1, (-1, 12)))).mean(1)


def test_blocks_that_are_given_masks_by_name_are_found_one_by_one():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    (family,) = residual.depth(Encoded(layer).eval(), torch.randn(1, 3, 8, 8))
    assert [s.block for s in family.shortcuts] == [f"encoder.layers.{i}" for i in range(3)]


class Asking(nn.Module):
    """Three residual blocks, of which the parent reads a setting of the first."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(ResBottleneckBlock(8, 8, 1, nn.BatchNorm2d, nn.ReLU, 8)
                                    for _ in range(3))  # fmt: skip
        self.blocks[0].scale = 1.0
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x) * self.blocks[0].scale
        return self.head(x.mean((2, 3)))


def test_every_block_is_tried_and_not_the_last_alone():
    network, image = Asking().eval(), torch.randn(1, 8, 8, 8)
    (family,) = mark_unremovable(network, residual.depth(network, image), image)
    assert "without them its forward fails" in family.unremovable_reason


@pytest.mark.parametrize(
    "change",
    [
        {"removed": [{"block": ""}]},
        {"removed": [{"block": "features.encoder.layers.encoder_layer_0", "child": "mlp.0"}]},
        {"removed": ["features.2.branch"]},
        {"shapes": {"ATTENTION": []}},
        {"shapes": {"ATTENTION": [48, 7]}},
        {"shapes": {"ATTENTION": [47, 16]}},
        {"shapes": {"ATTENTION": [96, 16]}},
    ],
)
def test_a_folder_that_asks_for_what_cannot_be_is_one_sentence(change, monkeypatch, tmp_path):
    network = vit(monkeypatch)
    save_classifier(network, tmp_path)
    (attention,) = (n for n, m in network.named_modules() if n.endswith("layer_1.self_attention"))
    content = json.loads((tmp_path / "config.json").read_text())
    text = json.dumps({**content, **change}).replace("ATTENTION", attention)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as refused:
        load_classifier_folder(tmp_path)
    assert "\n" not in str(refused.value)
