"""Classifiers of torchvision and of the user: built, loaded, pruned, and what is refused."""

import importlib

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from bench.config.composition import compose_run_config
from bench.errors import MissingData, UserError
from bench.models.classifiers.serialization import load_classifier_folder, save_classifier
from bench.models.loading import load_model, skeleton
from bench.models.source import resolve_model
from bench.schema import CostsConfig, ModelConfig

NETS = """
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self, width=4, classes=5):
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.second = nn.Conv2d(width, 8, 3, padding=1)
        self.last = nn.Linear(8, classes)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


class Talking(Small):
    def forward(self, x):
        return {"logits": super().forward(x)}


class Breaking(Small):
    def forward(self, x):
        raise KeyError("no such thing")


limit = 3
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """The package `ownnets` of a user, newly imported."""
    (tmp_path / "ownnets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "ownnets", raising=False)
    return importlib.import_module("ownnets")


def chosen(*overrides):
    return compose_run_config([*overrides, "model.device=cpu"]).model


def module(name, *overrides):
    shape = ["model.channels=1", "model.size=8", "model.classes=5"]
    packages = "packages=[methods,ownnets]"
    return chosen("model=module", f"model._target_=ownnets.{name}", packages, *shape, *overrides)


def loaded(config):
    return load_model(resolve_model(config, offline=True))


def refused(config, match, kind=UserError):
    with pytest.raises(kind, match=match) as raised:
        skeleton(resolve_model(config, offline=True))
    assert "\n" not in str(raised.value)


def test_a_torchvision_network_is_the_one_of_torchvision(tmp_path):
    theirs = torchvision.models.resnet18(num_classes=7).eval()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    name = ["model=torchvision/resnet18", "model.classes=7", "model.size=64"]
    model = loaded(chosen(*name, f"model.path={tmp_path / 'weights.safetensors'}"))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.network(images), theirs(images))
    assert model.name == "torchvision/resnet18"

    save_classifier(model.network, tmp_path / "saved")
    assert torch.equal(load_classifier_folder(tmp_path / "saved")(images), theirs(images))


GOOGLENET = ["model=torchvision/googlenet", "model.classes=7", "model.size=32"]


def test_weights_that_may_need_images_in_another_scale_need_the_users_word(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file({"fc.bias": torch.zeros(7)}, file)
    refused(chosen(*GOOGLENET, f"model.path={file}"), "needs model.arguments: give .*transform_in")
    refused(chosen(*GOOGLENET, "model.arguments={transform: true}"), "unexpected keyword argument")


@pytest.mark.broad
def test_torchvisions_own_weights_score_as_in_torchvision(tmp_path):
    arguments = {"num_classes": 7, "transform_input": True, "init_weights": False}
    theirs = torchvision.models.googlenet(**arguments).eval()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    path = f"model.path={tmp_path / 'weights.safetensors'}"
    model = loaded(chosen(*GOOGLENET, path, "model.arguments={transform_input: true}"))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.network(images), theirs(images))
    # Auxiliary heads, which no forward reads after training, are not counted as parameters.
    assert not any("aux" in name for name, _ in model.network.named_parameters())


def test_a_network_that_computes_its_widths_is_built_without_weights():
    state = torch.random.get_rng_state()
    config = chosen("model=torchvision/regnet_x_400mf", "model.classes=7", "model.size=32")
    network = skeleton(resolve_model(config, offline=True))
    assert {weight.device.type for weight in network.parameters()} == {"meta"}
    assert torch.equal(torch.random.get_rng_state(), state)


def test_fresh_weights_follow_the_seed():
    name = ["model=torchvision/squeezenet1_1", "model.images=cifar10", "model.size=64"]
    first, again, other = (loaded(chosen(*name, f"seed={seed}")) for seed in (1, 1, 2))
    hashes = [
        next(iter(m.network.state_dict().values())).sum().item() for m in (first, again, other)
    ]
    assert hashes[0] == hashes[1] != hashes[2]
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.network.config.classes == 10


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["model=torchvision/resnet19"], "unknown torchvision model 'resnet19': did you mean"),
        (["model=torchvision/fcn_resnet50"], "unknown torchvision model"),
        (["model=torchvision/resnet18", "model.images=mnist"], "takes 3 channels; the images .* 1"),
        (["model=torchvision/alexnet", "model.size=16"], "does not fit images of size 16"),
        (["model=torchvision/vit_b_16", "model.size=40"], "vit_b_16 does not fit"),
        (["model=torchvision/resnet18", "model.images=folder"], "and model.size and model.classes"),
    ],
)
def test_what_torchvision_cannot_build_is_refused(overrides, match):
    refused(chosen(*overrides), match)


def test_a_state_dict_of_another_network_is_refused(tmp_path):
    file = tmp_path / "weights.safetensors"
    weights = ["model=torchvision/resnet18", f"model.path={file}"]
    refused(chosen(*weights), "is not a file", MissingData)
    save_file(torchvision.models.resnet18(num_classes=7).state_dict(), file)
    with pytest.raises(
        UserError, match=r"does not fit torchvision/resnet18: .*fc.weight"
    ) as raised:
        loaded(chosen(*weights))
    assert "\n" not in str(raised.value)
    file.write_bytes(file.read_bytes()[:-3])
    refused(chosen(*weights), "cut off")


def test_a_users_network_is_the_users(nets, tmp_path):
    model = loaded(module("Small", "model.arguments={width: 6}"))
    own = nets.Small(width=6)
    own.load_state_dict(model.network.features[0].state_dict())
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(model.network(images), own(images))

    save_file(own.state_dict(), tmp_path / "own.safetensors")
    again = module("Small", "model.arguments={width: 6}", f"model.path={tmp_path}/own.safetensors")
    assert torch.equal(loaded(again).network(images), own(images))


def test_a_users_network_is_counted_by_what_it_executes(nets):
    from bench.measurement.costs import count_costs

    report = count_costs(loaded(module("Small")), CostsConfig(name="x"))
    (flops,) = [c for c in report.costs if (c.quantity, c.how) == ("flops", "counted")]
    assert flops.value == 2 * (64 * 4 * 9 + 64 * 8 * 4 * 9 + 8 * 5)
    assert "not built here" in report.missing[0].reason


def test_a_users_network_can_be_pruned_and_saved(nets, tmp_path):
    from methods.wgsef.groups.choice import GroupChoice, families_of
    from methods.wgsef.groups.partition import GroupPartition
    from methods.wgsef.removal import smaller_classifier

    network = loaded(module("Small")).network
    families = families_of(network, GroupChoice(groups=("channels",)))
    partition = GroupPartition(network, families)
    dead_M = torch.arange(partition.groups) % 2 == 0
    partition.scale_((~dead_M).double())
    smaller = smaller_classifier(network, families, partition.split(dead_M))
    save_classifier(smaller, tmp_path / "smaller")
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(smaller(images), network(images))
    again = loaded(module("Small", f"model.path={tmp_path / 'smaller'}")).network
    assert torch.equal(again(images), smaller(images))
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("Talking", "returns dict for one image, but logits of shape"),
        ("Breaking", "does not fit images of size 8 .*no such thing"),
        ("Missing", "_target_=ownnets.Missing: AttributeError"),
        ("limit", "is not a class of torch.nn.Module"),
    ],
)
def test_a_users_network_that_is_none_is_refused(name, match, nets):
    refused(module(name), match)


def test_arguments_and_shapes_that_do_not_fit_are_refused(nets):
    refused(module("Small", "model.arguments={depth: 6}"), "cannot be called with model.arguments")
    refused(module("Small", "model.classes=4"), r"returns \(1, 5\) for one image")
    refused(module("Small", "model.classes=null"), "model.images is missing: module needs")


def test_code_runs_only_from_a_named_package(nets):
    with pytest.raises(UserError, match=r"model._target_=ownnets.Small: only code from methods"):
        chosen("model=module", "model._target_=ownnets.Small")
    with pytest.raises(UserError, match=r"model._target_ is missing: give model._target_="):
        chosen("model=module")
    with pytest.raises(UserError, match="required by model=module and by no other"):
        chosen("model=micro_lenet", "+model._target_=methods.dense.Dense")


def test_a_saved_folder_imports_no_class(nets, tmp_path):
    save_classifier(loaded(module("Small")).network, tmp_path / "saved")
    text = (tmp_path / "saved" / "config.json").read_text().replace("ownnets.Small", "os.system")
    (tmp_path / "saved" / "config.json").write_text(text)
    config = chosen(f"model={tmp_path / 'saved'}", "model.kind=image_classifier")
    refused(config, "os.system is a class of your own: load it with model=module")


def test_a_recorded_config_is_read_again(nets):
    run = compose_run_config(
        ["model=module", "model._target_=ownnets.Small", "packages=[methods,ownnets]",
         "model.channels=1", "model.size=8", "model.classes=5"]
    )  # fmt: skip
    plain = run.plain()["model"]
    assert plain["_target_"] == "ownnets.Small" and "target" not in plain
    assert ModelConfig(**plain) == run.model
