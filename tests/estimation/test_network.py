"""Operators of a network, one layer of each form; FLOPs and memory of classifiers."""

import pytest
import torch
import torchvision

from bench.estimation import network as networks
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from bench.models.structure.model_structure import inspect_model
from tests.models.tiny_networks import build, build_dense, llama


@pytest.mark.parametrize(
    "make",
    [llama, lambda: build("qwen3_moe"), lambda: build("deepseek_v2"), lambda: build_dense("gpt2")],
    ids=["llama", "qwen3_moe", "deepseek_v2", "gpt2"],
)
def test_layers_that_are_built_alike_count_like_all_of_them(make, monkeypatch):
    network = make()
    structure = inspect_model(network)
    found = networks._tally(network, structure)
    monkeypatch.setattr(networks, "layer_form", id)
    whole = networks._tally(network, structure)
    assert (found.operators, found.elements) == (whole.operators, whole.elements)
    assert not any("forward" in vars(layer) for layer in structure.layers)


class Chain(torch.nn.Module):
    """Two convolutions of 4 and 2 channels with a ReLU between; its FLOPs have no formula."""

    config = VisionConfig(architecture="chain", size=8, channels=1, classes=2)

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.two = torch.nn.Conv2d(4, 2, 3, padding=1)
        self.head = torch.nn.Sequential()

    def forward(self, image_BCHH):
        return self.two(self.one(image_BCHH).relu()).mean((2, 3))


def test_what_a_classifier_holds_and_keeps_is_counted_in_numbers_of_an_image():
    found, pixels = networks.classifier_work(Chain(), 4), 8 * 8
    # While the second convolution runs: the output of the ReLU, that of the first being freed.
    assert found.widest == 2 * 4 * pixels
    # The image, and the output of the ReLU once, for it and for the second convolution.
    assert found.kept == (1 + 4) * pixels
    assert (found.matrix, found.missing) == (2 * pixels * 9 * (1 * 4 + 4 * 2), None)


@pytest.mark.parametrize("name", ["shufflenet_v2_x1_0", "vit_b_16"])
def test_flops_of_torchvisions_networks_are_those_that_it_publishes(name):
    config = VisionConfig(architecture=f"torchvision/{name}", size=224, channels=3, classes=1000)
    with torch.device("meta"):
        network = build_classifier(config)
    published = torchvision.models.get_model_weights(name).DEFAULT.meta["_ops"]
    assert networks.classifier_work(network, 4).matrix == pytest.approx(2e9 * published, rel=2e-3)


class Headed(torch.nn.Module):
    """A convolution with BatchNorm, and a head of more weights than the image has activations."""

    config = VisionConfig(architecture="headed", size=8, channels=1, classes=2)

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.Flatten()
        )
        self.head = torch.nn.Sequential(torch.nn.Linear(4 * 8 * 8, 100))

    def forward(self, image_BCHH):
        return self.head(self.body(image_BCHH))


def test_weights_are_no_activations_and_results_of_several_tensors_are():
    found, pixels = networks.classifier_work(Headed(), 4), 8 * 8
    # While BatchNorm runs, which also returns two numbers per channel.
    assert found.widest == 2 * 4 * pixels + 2 * 4


def test_a_counted_network_still_computes_and_has_no_gradients():
    network = Chain()
    networks.classifier_work(network, 4)
    assert network(torch.ones(1, 1, 8, 8)).shape == (1, 2)
    assert all(weight.grad is None for weight in network.parameters())
