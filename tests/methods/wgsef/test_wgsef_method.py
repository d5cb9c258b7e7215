"""The methods as plug-ins: every config fits, applying removes, wrong models are refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from pydantic import ValidationError

from bench.errors import UserError
from bench.method import Context
from bench.models.config import ModelConfig
from bench.models.model import Model
from bench.models.vision import VisionConfig, build
from methods.wgsef import method as methods

CONF = Path(__file__).parents[3] / "conf" / "method"
FILES = sorted(path for path in CONF.glob("*.yaml") if "methods.wgsef.method." in path.read_text())


def model(name="micro_vgg", **changes):
    torch.manual_seed(0)
    network = build(VisionConfig(**{"architecture": name, "channels": 1, "size": 8, **changes}))
    config = ModelConfig(name=name, source=name)
    return Model(config, network, None, "", None, torch.device("cpu"))


def knobs(path):
    given = yaml.safe_load(path.read_text())
    maker = getattr(methods, given.pop("_target_").rpartition(".")[2])
    return maker, given


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_is_a_method_that_removes_the_share_it_was_given(path):
    maker, given = knobs(path)
    given |= {"ratio": 0.5, "recipe": {"epochs": 1, "batch": 200}}
    subject = model()
    dense = sum(weight.numel() for weight in subject.network.parameters())
    report = maker(**given).apply(subject, Context(seed=0))
    assert report.saving == "removed"
    assert report.details["kept"] == report.details["groups"] // 2 == 80
    assert sum(report.details["kept_by_layer"].values()) == 80
    assert sum(weight.numel() for weight in subject.network.parameters()) < 0.6 * dense


def test_the_configs_name_every_knob_of_their_class():
    assert len(FILES) == 10
    for path in FILES:
        maker, given = knobs(path)
        assert set(given) == set(maker.model_fields), path.stem
        assert set(given["recipe"]) == set(maker.model_fields["recipe"].annotation.model_fields)


def test_groups_that_cannot_be_removed_are_reported_as_zeroed():
    wgsef = methods.Wgsef(groups="filter_shapes", recipe={"epochs": 1, "batch": 200})
    subject = model()
    report = wgsef.apply(subject, Context(seed=0))
    assert report.saving == "zeroed"
    zero = sum(int((weight == 0).sum()) for weight in subject.network.parameters())
    assert zero > 0.4 * sum(weight.numel() for weight in subject.network.parameters())


@pytest.mark.parametrize("algorithm", ["envelope", "hspg", "debiased"])
def test_every_algorithm_of_the_paper_removes_residual_branches(algorithm):
    wgsef = methods.Wgsef(
        algorithm=algorithm, groups="depth", ratio=0.4, recipe={"epochs": 1, "batch": 200}
    )
    subject = model("micro_resnet")
    wgsef.apply(subject, Context(seed=0))
    assert len(subject.network.config.removed) == 1


def test_going_on_from_the_models_own_weights_starts_from_them():
    subject = model()
    before = subject.network.head[2].weight.detach().clone()
    wgsef = methods.Wgsef(restart=False, ratio=0.1, recipe={"epochs": 1, "rate": 1e-9, "decay": 0})
    wgsef.apply(subject, Context(seed=5))
    after = subject.network.head[2].weight
    assert all(any(torch.allclose(a, b, atol=1e-5) for b in before.T) for a in after.T)


def test_a_language_model_is_one_sentence():
    anatomy = SimpleNamespace(layers=(torch.nn.Identity(),), architecture="LlamaForCausalLM")
    with pytest.raises(UserError, match="for image classifiers, not LlamaForCausalLM"):
        methods.Wgsef().check(anatomy)


def test_images_of_another_size_are_one_sentence():
    with pytest.raises(UserError, match="size 28 and 10 classes; digits has 1, 8 and 10"):
        methods.Wgsef().apply(model("lenet5", size=28), Context(seed=0))


@pytest.mark.parametrize("wrong", [{"ratio": 0}, {"ratio": 1}, {"strength": 0}, {"k": 3}])
def test_knobs_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        methods.Wgsef(**wrong)
