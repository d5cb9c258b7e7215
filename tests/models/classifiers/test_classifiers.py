"""The networks: sizes as published, a folder that gives them back, configs that do not fit."""

import json

import pytest
import torch

from bench.errors import MissingData, UserError
from bench.models.classifiers.architectures import ARCHITECTURES, build_classifier
from bench.models.classifiers.classifier import VisionConfig
from bench.models.classifiers.serialization import load_classifier_folder, save_classifier

PUBLISHED = {
    # Weights of the common definitions: LeNet-5 on MNIST, the others with ten classes of 32x32
    # RGB and no convolution biases, which BatchNorm undoes.
    "lenet5": (1, 28, 61_706),
    "vgg16": (3, 32, 14_724_042),
    "resnet18": (3, 32, 11_173_962),
    "resnet20": (3, 32, 272_474),
    "resnet50": (3, 32, 23_520_842),
    "mobilenet_v1": (3, 32, 3_217_226),
    "densenet40": (3, 32, 1_059_298),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_the_size_of_their_definition(name):
    channels, size, count = PUBLISHED[name]
    with torch.device("meta"):
        network = build_classifier(VisionConfig(architecture=name, channels=channels, size=size))
    assert sum(weight.numel() for weight in network.parameters()) == count


def test_resnet50_on_imagenet_is_torchvisions():
    from torchvision.models import resnet50

    with torch.device("meta"):
        theirs = resnet50()
        ours = build_classifier(VisionConfig(architecture="resnet50", size=224, classes=1000))
    count = sum(weight.numel() for weight in theirs.parameters())
    assert sum(weight.numel() for weight in ours.parameters()) == count
    assert ours(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, 1000)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name.startswith("micro")])
def test_small_networks_learn_a_batch_and_come_back_from_a_folder(name, tmp_path):
    torch.manual_seed(0)
    network = build_classifier(VisionConfig(architecture=name, channels=1, size=8)).train()
    images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    save_classifier(network, tmp_path)
    again = load_classifier_folder(tmp_path)
    assert again.config == network.config and not again.training
    assert torch.equal(again(images), network.eval()(images))


def test_an_unknown_architecture_is_one_sentence():
    with pytest.raises(UserError, match="did you mean 'resnet18'"):
        build_classifier(VisionConfig(architecture="resnet8"))


def test_a_folder_without_weights_is_one_sentence(tmp_path):
    VisionConfig(architecture="vgg16").write(tmp_path)
    with pytest.raises(MissingData, match=r"it has no model\.safetensors"):
        load_classifier_folder(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "micro_vgg"},
        {"classes": 3},
        {"shapes": {"features.99": [1, 1]}},
        {"shapes": {"head": [1, 1]}},
        {"removed": ["features.0"]},
        {"size": "large"},
    ],
)
def test_a_config_that_does_not_fit_is_one_sentence(change, tmp_path):
    save_classifier(
        build_classifier(VisionConfig(architecture="micro_resnet", channels=1, size=8)), tmp_path
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError) as raised:
        load_classifier_folder(tmp_path)
    assert "\n" not in str(raised.value)
