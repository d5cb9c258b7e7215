"""The methods as plug-ins: every config fits, applying removes, wrong models are refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from pydantic import ValidationError

from bench.config.composition import compose_section
from bench.errors import UserError
from bench.method import Context
from bench.models.classifiers import architectures
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from bench.models.model import Model
from bench.models.structure.model_structure import inspect_model
from bench.schema import ModelConfig
from methods.wgsef import competitors
from methods.wgsef import sparse_training as methods

CONF = Path(__file__).parents[3] / "conf" / "method"
FILES = sorted(
    path
    for path in CONF.glob("*.yaml")
    if "methods.wgsef.sparse_training.W" in path.read_text()
    or "methods.wgsef.competitors." in path.read_text()
)
FOLLOWED = {"data": "digits", "data_folder": None, "split": "test"}
SHARED = yaml.safe_load((CONF.parent / "config.yaml").read_text())


def model(name="micro_vgg", **changes):
    torch.manual_seed(0)
    network = build_classifier(
        VisionConfig(**{"architecture": name, "channels": 1, "size": 8, **changes})
    )
    config = ModelConfig(name=name, source=name)
    return Model(config, network, None, "", None, torch.device("cpu"))


def knobs(path):
    given = OmegaConf.to_container(compose_section("method", path.stem).method[path.stem])
    module, _, name = given.pop("_target_").rpartition(".")
    maker = getattr({"competitors": competitors}.get(module.rpartition(".")[2], methods), name)
    # What the benchmark says, which only Hydra can look up.
    assert all(given[key].startswith("${oc.select:benchmark.images.") for key in FOLLOWED)
    # What all methods of a sweep share.
    assert given["recipe"] == {key: f"${{recipe.{key}}}" for key in SHARED["recipe"]}
    assert given.get("unit", "${unit}") == "${unit}"
    shared = {key: SHARED[key] for key in ("recipe", "unit") if key in given}
    return maker, given | FOLLOWED | shared


@pytest.mark.sample(4)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_is_a_method_that_removes_the_share_it_was_given(path):
    maker, given = knobs(path)
    given |= {"ratio": 0.5, "recipe": {"epochs": 1, "batch": 200}}
    subject = model()
    dense = sum(weight.numel() for weight in subject.network.parameters())
    report = maker(**given).apply(subject, Context(seed=0))
    assert report.effect == "removed"
    assert report.details["kept"] == report.details["groups"] // 2 == 80
    assert sum(report.details["kept_by_layer"].values()) == 80
    assert report.details["budget"] == {"unit": "groups", "dense": 160, "kept": 80}
    assert sum(weight.numel() for weight in subject.network.parameters()) < 0.6 * dense


def test_the_configs_name_every_knob_of_their_class():
    assert len(FILES) == 11
    for path in (*FILES, CONF / "train.yaml"):
        maker, given = knobs(path)
        assert set(given) == set(maker.model_fields), path.stem
        assert set(given["recipe"]) == set(maker.model_fields["recipe"].annotation.model_fields)


def test_two_of_four_weights_stay_in_every_run():
    subject = model()
    method = methods.Wgsef(
        groups="weights",
        layers={"weights": "features.3*"},
        scope="pattern",
        pattern=(2, 4),
        recipe={"epochs": 1, "batch": 200},
    )
    report = method.apply(subject, Context(seed=0))
    assert report.effect == "zeroed"
    assert 2 * report.details["kept"] == report.details["groups"]
    (name,) = report.details["groups_by_layer"]
    weight = subject.network.get_parameter(f"{name}.weight").detach()
    assert ((weight.reshape(-1, 4) != 0).sum(1) == 2).all()


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"scope": "pattern"}, "need each other"),
        ({"pattern": (2, 4)}, "need each other"),
        ({"scope": "pattern", "pattern": (4, 4)}, "0 < N < M"),
        ({"scope": "pattern", "pattern": (2, 4), "unit": "macs"}, "counts groups, not unit=macs"),
    ],
)
def test_a_pattern_that_says_nothing_is_refused(knobs, said):
    with pytest.raises(ValidationError, match=said):
        methods.Wgsef(groups="weights", **knobs)


def test_training_alone_needs_no_trace_of_the_forward(monkeypatch):
    def refuse(*_):
        raise UserError("cannot be traced")

    monkeypatch.setattr("methods.wgsef.groups.convolution.coupled_filters", refuse)
    recipe = {"epochs": 1, "batch": 400}
    methods.Train(recipe=recipe).apply(model("micro_lenet"), Context(seed=0))


class TwoHeads(torch.nn.Module):
    """A network with a second output in training."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))

    def forward(self, image):
        logits = self.head(image)
        return (logits, logits) if self.training else logits


def test_auxiliary_outputs_are_refused_before_weights_load(monkeypatch):
    monkeypatch.setitem(architectures._MODULES, "nets.TwoHeads", TwoHeads)
    said = r"returns tuple in training mode, but logits of shape \(20, 10\) are needed"
    with pytest.raises(UserError, match=said):
        methods.Train(recipe={"batch": 20}).check(model("nets.TwoHeads").structure)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["micro_lenet", "micro_resnet", "micro_mobilenet"])
def test_training_without_sparsity_keeps_every_weight_and_learns(name):
    subject, recipe = model(name), {"epochs": 2, "batch": 100}
    report = methods.Train(recipe=recipe).apply(subject, Context(seed=0))
    assert (report.effect, report.trained) == ("none", True)
    assert {k: v.shape for k, v in subject.network.state_dict().items()} == {
        k: v.shape for k, v in model(name).network.state_dict().items()
    }
    assert report.details["history"][1]["loss"] < report.details["history"][0]["loss"]
    # The recipe is that of sparse training: until its selection, plain training is the same.
    rival = competitors.MagnitudePruning(ratio=0.5, recipe={**recipe, "sparse_share": 1.0})
    other = rival.apply(model(name), Context(seed=0)).details["history"][0]
    again = methods.Train(recipe={**recipe, "sparse_share": 1.0}).apply(
        model(name), Context(seed=0)
    )
    assert again.details["history"][0]["loss"] == other["loss"]


def test_groups_that_cannot_be_removed_are_reported_as_zeroed():
    wgsef = methods.Wgsef(groups="filter_shapes", recipe={"epochs": 1, "batch": 200})
    subject = model()
    report = wgsef.apply(subject, Context(seed=0))
    assert report.effect == "zeroed"
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


@pytest.mark.sample(4)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_method_can_go_on_from_a_loaded_network(path):
    maker, given = knobs(path)
    given |= {"ratio": 0.5, "recipe": {"epochs": 1, "batch": 200}, "restart": False}
    subject = model()
    # As models are loaded.
    subject.network.eval().requires_grad_(False)
    report = maker(**given).apply(subject, Context(seed=0))
    assert report.details["kept"] < report.details["groups"]


def test_going_on_from_the_models_own_weights_starts_from_them():
    subject = model()
    before = subject.network.head[2].weight.detach().clone()
    wgsef = methods.Wgsef(restart=False, ratio=0.1, recipe={"epochs": 1, "rate": 1e-9, "decay": 0})
    wgsef.apply(subject, Context(seed=5))
    after = subject.network.head[2].weight
    assert all(any(torch.allclose(a, b, atol=1e-5) for b in before.T) for a in after.T)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"scope": "layer", "unit": "macs"}, "scope=layer counts groups, not unit=macs"),
        ({"k": 5, "scope": "layer"}, "needs scope=global and unit=groups"),
        ({"k": 5, "unit": "bytes"}, "needs scope=global and unit=groups"),
        ({"scope": "isomorphic", "groups": "channels"}, "needs groups=filters"),
        ({"groups": ["filters", "weights"], "unit": "seconds"}, "unit=seconds needs .*got weights"),
        ({"reach": 1.5}, "less than or equal to 1"),
    ],
)
def test_budgets_that_contradict_each_other_are_refused(wrong, sentence):
    with pytest.raises(ValidationError, match=sentence):
        methods.Wgsef(**wrong)


def test_fresh_weights_leave_the_random_state_of_the_process_alone():
    subject, method = model(), methods.Wgsef()
    state = torch.get_rng_state()
    first, second = (method._network(subject, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    expected = build_classifier(subject.network.config)
    for one, other, wanted in zip(
        *(n.parameters() for n in (first, second, expected)), strict=True
    ):
        assert torch.equal(one, other) and torch.equal(one, wanted)


def test_a_language_model_is_one_sentence():
    structure = SimpleNamespace(vision=None, architecture="LlamaForCausalLM")
    with pytest.raises(UserError, match="the model is LlamaForCausalLM"):
        methods.Wgsef().check(structure)


def test_images_of_another_size_are_one_sentence():
    with pytest.raises(UserError, match="size 28 and 10 classes; digits has 1, 8 and 10"):
        methods.Wgsef().apply(model("lenet5", size=28), Context(seed=0))


@pytest.mark.parametrize(
    "wrong", [{"ratio": 0}, {"ratio": 1}, {"strength": 0}, {"k": 0}, {"kk": 3}]
)
def test_knobs_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        methods.Wgsef(**wrong)


def test_k_groups_stay_when_k_is_given():
    subject = model()
    wgsef = methods.Wgsef(k=50, recipe={"epochs": 1, "batch": 200})
    wgsef.check(subject.structure)
    report = wgsef.apply(subject, Context(seed=0))
    assert report.details["kept"] == report.details["alive_before_selection"] == 50


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"k": 161}, "k=161 is too large: the network has 160 filters"),
        ({"k": 9}, "leaves 9 of 160 groups, fewer than the floors of all layers together"),
        ({"data": "mnist"}, "built for 1 channels, size 8 and 10 classes; mnist has 1, 28 and 10"),
        ({"data": "mnits"}, "did you mean 'mnist'"),
        ({"recipe": {"batch": 1201}}, "batch=1201 is larger than the training set of 1200 images"),
        ({"recipe": {"batch": 1100}, "split": "validation"}, "the training set of 1000 images"),
        ({"groups": "depth"}, "no residual branches"),
        ({"groups": "columns", "scope": "pattern", "pattern": [2, 4]}, r"not fit the 1 columns"),
    ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_loaded(knobs, said):
    with torch.device("meta"):
        network = build_classifier(VisionConfig(architecture="micro_vgg", channels=1, size=8))
    with pytest.raises(UserError, match=said):
        methods.Wgsef(**knobs).check(inspect_model(network))


@pytest.mark.parametrize("restart", [True, False])
def test_a_trained_network_has_the_type_of_its_model(restart):
    """The record states that type, and costs are compared with a dense model of it."""
    recipe = {"epochs": 1, "batch": 700}
    for method in (methods.Train(restart=restart, recipe=recipe), methods.Wgsef(
        ratio=0.5, restart=restart, recipe=recipe
    )):  # fmt: skip
        subject = model()
        subject.network.bfloat16()
        method.apply(subject, Context(seed=0))
        assert {p.dtype for p in subject.network.parameters()} == {torch.bfloat16}


def test_groups_that_a_competitor_cannot_rank_are_refused_before_a_weight_is_loaded():
    with torch.device("meta"):
        network = build_classifier(VisionConfig(architecture="micro_lenet", channels=1, size=8))
    with pytest.raises(UserError, match="slimming needs BatchNorm scales"):
        competitors.Slimming(ratio=0.5).check(inspect_model(network))
    for kind in (competitors.GroupNorm, competitors.GrowingReg):
        with pytest.raises(ValidationError, match="set groups=filters"):
            kind(groups="rows")


def test_a_folder_of_checkpoints_is_not_shared_by_two_networks(tmp_path):
    """The training of the second would end at once, in the weights of the first."""
    knobs = {"restart": False, "checkpoints": str(tmp_path), "recipe": {"epochs": 1, "batch": 400}}
    methods.Train(**knobs).apply(model(), Context(seed=0))
    other = model()
    with torch.no_grad():
        next(other.network.parameters()).mul_(0.5)
    with pytest.raises(UserError, match="holds a checkpoint of a different run"):
        methods.Train(**knobs).apply(other, Context(seed=0))


def test_looking_at_a_network_draws_nothing_from_the_runs_generator():
    with torch.device("meta"):
        network = build_classifier(VisionConfig(architecture="micro_lenet", channels=1, size=8))
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    methods.Wgsef().check(inspect_model(network))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_homotopy_that_ends_early_leaves_groups_to_the_selection():
    recipe = {"epochs": 2, "batch": 200, "sparse_share": 0.5}
    reports = {
        reach: methods.Wgsef(reach=reach, recipe=recipe).apply(model(), Context(seed=0)).details
        for reach in (0.3, 1.0)
    }
    assert reports[0.3]["fractional_before_selection"] > 0
    assert reports[1.0]["fractional_before_selection"] == 0
    assert reports[0.3]["kept"] == reports[1.0]["kept"] == reports[1.0]["alive_before_selection"]


def test_choosing_knobs_never_sees_a_test_image():
    wgsef = methods.Wgsef(split="validation")
    splits = wgsef._splits(model().network.config)
    assert (len(splits.train), len(splits.test)) == (1000, 200)
    assert "held out" in splits.provenance


@pytest.mark.parametrize("knobs", [{"k": 50}, {"scope": "pattern", "pattern": [2, 4]}])
def test_a_ratio_that_does_not_count_is_null(knobs):
    """Else a run would be called `wgsef 0.2` whatever it removes, and trained again at 0.4."""
    wgsef = methods.Wgsef(ratio=0.2, **knobs)
    assert wgsef == methods.Wgsef(ratio=0.4, **knobs)
    assert wgsef.ratio is None
    with pytest.raises(ValidationError, match="ratio=null needs k or pattern"):
        methods.Wgsef(ratio=None)
