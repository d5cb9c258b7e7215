"""Image classifiers as models of a run: shipped, fresh, from a folder, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench.config.composition import compose_run_config
from bench.data.image_catalogue import image_shape
from bench.data.image_catalogue import load_image_set as load_images
from bench.errors import UserError
from bench.models import embedded
from bench.models.classifiers import serialization
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from bench.models.embedded.classifiers import NAMES, classifier_accuracy
from bench.models.loading import load_model, open_folder, skeleton
from bench.models.source import resolve_model
from bench.models.structure.model_structure import inspect_model
from bench.runner.session import BaseModelCache
from bench.schema import ModelConfig

FRESH = ["lenet5", "vgg16", "resnet18", "resnet20", "mobilenet_v1", "densenet40", "resnet50"]


def named(name, *overrides):
    return compose_run_config([f"model={name}", *overrides]).model


def fresh(seed, **more):
    return ModelConfig(
        name="f", source="fresh:micro_vgg", kind="image_classifier", images="digits", seed=seed,
        device="cpu", **more,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_classifier_is_as_good_as_its_log_says(name):
    model = load_model(resolve_model(named(name), offline=True))
    log = json.loads((Path(next(iter(embedded.__path__))) / name / "training.json").read_text())
    test = load_images("digits").test
    assert classifier_accuracy(model.network, test) == pytest.approx(
        log["results"]["test_accuracy"], abs=2 / len(test)
    )
    assert log["results"]["test_accuracy"] > 0.94
    assert log["data"]["test"] == test.fingerprint()
    assert model.tokenizer is None and model.processor is None
    assert model.structure.architecture == name
    assert model.structure.layers == () and model.structure.moe == ()


@pytest.mark.parametrize("name", FRESH)
def test_the_papers_networks_have_the_shape_of_their_data(name):
    config = named(name, "seed=5")
    network = skeleton(resolve_model(config, offline=True))
    images = image_shape(config.images)
    assert (network.config.architecture, config.seed) == (name, 5)
    assert (network.config.channels, network.config.size) == (images.channels, images.size)
    assert all(weight.is_meta for weight in network.parameters())
    assert inspect_model(network).vision.classes == images.classes


@pytest.mark.broad
def test_fresh_weights_are_those_of_the_seed_also_within_a_process():
    cache = BaseModelCache()
    weights = {}
    for seed in (1, 2, 1):
        source = resolve_model(fresh(seed), offline=True)
        head = cache.acquire(source, will_change=False).network.head[2].weight.clone()
        assert torch.equal(head, weights.setdefault((seed, source.fingerprint), head))
    assert len(weights) == 2
    assert not torch.equal(*weights.values())


def test_drawing_fresh_weights_leaves_the_runs_generator_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    load_model(resolve_model(fresh(1), offline=True))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_saved_classifier_is_opened_in_one_call(tmp_path):
    network = load_model(resolve_model(fresh(1), offline=True)).network
    serialization.save_classifier(network, tmp_path)
    again = open_folder(tmp_path, kind="image_classifier", device="cpu")
    image = torch.randn(3, 1, 8, 8)
    assert torch.equal(again.network(image), network(image))
    assert again.fingerprint


def test_what_is_not_a_classifier_or_taken_for_something_else_is_one_sentence(tmp_path):
    serialization.save_classifier(
        load_model(resolve_model(fresh(1), offline=True)).network, tmp_path
    )
    with pytest.raises(UserError, match=r"image classifier \(micro_vgg\): set model\.kind"):
        skeleton(
            resolve_model(ModelConfig(name="x", source="local", path=str(tmp_path)), offline=True)
        )
    moe = ModelConfig(name="x", source="embedded:micro_moe", kind="image_classifier")
    with pytest.raises(UserError, match="does not describe an image classifier"):
        skeleton(resolve_model(moe, offline=True))
    with pytest.raises(UserError, match=r"needs model\.kind=image_classifier"):
        skeleton(resolve_model(fresh(1).model_copy(update={"kind": "causal_lm"}), offline=True))
    with pytest.raises(UserError, match="device_map"):
        load_model(resolve_model(fresh(1, device_map="offload_cpu"), offline=True))


def test_images_that_are_too_small_for_a_network_are_one_sentence():
    config = fresh(1).model_copy(update={"source": "fresh:vgg16"})
    with pytest.raises(UserError, match="vgg16 does not fit images of size 8"):
        skeleton(resolve_model(config, offline=True))


@pytest.mark.parametrize("kind", ["causal_lm", "image_classifier"])
def test_a_config_that_is_not_json_is_one_sentence(kind, tmp_path):
    serialization.save_classifier(
        load_model(resolve_model(fresh(1), offline=True)).network, tmp_path
    )
    (tmp_path / "config.json").write_text("{")
    config = ModelConfig(name="x", source="local", path=str(tmp_path), kind=kind)
    with pytest.raises(UserError, match=r"config\.json is corrupt: it is not JSON"):
        skeleton(resolve_model(config, offline=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": "fresh:resnet19"}, "did you mean 'resnet18'"),
        ({"images": "cifar"}, "did you mean 'cifar10'"),
        ({"images": None}, "model.images is missing"),
    ],
)
def test_fresh_weights_of_nothing_are_one_sentence(change, said):
    with pytest.raises(UserError, match=said):
        resolve_model(fresh(1).model_copy(update=change), offline=True)


def test_a_state_dict_from_before_batches_were_counted_is_read_as_torch_reads_it(tmp_path):
    config = VisionConfig(architecture="torchvision/resnet18", size=32, classes=3)
    first, second = build_classifier(config), build_classifier(config)
    state = first.features[0].state_dict() if not len(first.head) else first.state_dict()
    old = {name: w for name, w in state.items() if not name.endswith("num_batches_tracked")}
    save_file(old, tmp_path / "old.safetensors")
    serialization.load_state(second, tmp_path / "old.safetensors")
    found = second.state_dict()
    assert all(torch.equal(found[name], w) for name, w in first.state_dict().items())
