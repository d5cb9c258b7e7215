"""CAMERA-P with state=removed: the outputs of the zeroed model, smaller, and prunable again."""

import copy

import pytest
import torch
from pydantic import ValidationError

from bench.config.run_config import validate
from bench.data.calibration import Calibration
from bench.errors import UserError
from bench.method import Context
from bench.models.model import Model
from bench.models.structure.model_structure import inspect_model
from bench.schema import ModelConfig
from methods.camera.pruning import CameraP
from tests.models.tiny_networks import ARCHITECTURES, build, tokens, unfuse


def model_of(network):
    config = ModelConfig(name="tiny", source="tests")
    return Model(config, network, None, "", None, torch.device("cpu"))


def pruned(network, rows=None, **knobs):
    model = model_of(network)
    text = Calibration(tokens() if rows is None else rows, "calibration")
    report = CameraP(**({"ratio": 0.4, "align": 4} | knobs)).apply(model, Context(0, text))
    return model, report


@pytest.mark.sample(10)
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("layout", ["fused", "list"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_removed_and_zeroed_give_the_same_logits(name, layout, scope):
    def made():
        return build(name) if layout == "fused" else unfuse(build(name))

    knobs = {"scope": scope, "sequential": scope == "layer"}
    small, report = pruned(made(), state="removed", **knobs)
    dark, other = pruned(made(), state="zeroed", **knobs)
    rows = tokens(seed=1)
    torch.testing.assert_close(
        small.network(rows).logits, dark.network(rows).logits, rtol=1e-5, atol=1e-5
    )
    assert (report.effect, other.effect) == ("removed", "zeroed")
    gone = report.details["removed_parameters"]
    assert gone == other.details["removed_parameters"]
    padding = 3 * 16 * report.details["padding_micro_experts"]
    assert dark.structure.parameters - small.structure.parameters == gone - padding
    assert small.structure.moe_parameters == dark.structure.moe_parameters - gone


@pytest.mark.parametrize(("ratio", "align", "kept"), [(0.4, 4, 16), (0.4, 8, 16), (0.95, 8, 8)])
@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v2", "mixtral"])
def test_aligned_experts_keep_one_width_and_the_report_says_the_ratio(name, ratio, align, kept):
    def made():
        return build(name, moe_intermediate_size=24, intermediate_size=24)

    knobs = {"ratio": ratio, "scope": "expert", "aligned": True, "align": align}
    small, report = pruned(made(), **knobs)
    dark, _ = pruned(made(), state="zeroed", **knobs)
    rows = tokens(seed=1)
    torch.testing.assert_close(
        small.network(rows).logits, dark.network(rows).logits, rtol=1e-5, atol=1e-5
    )
    assert {width for block in small.structure.moe for width in block.widths} == {kept}
    # DeepSeek's two shared experts, as wide as a routed one each; Qwen2's own width of 20.
    shared = {"deepseek_v2": 2 * kept, "mixtral": 0}.get(name, max(align, 12 if align == 4 else 16))
    shared = 8 if (name, ratio) == ("qwen2_moe", 0.95) else shared
    assert {block.d_shared for block in small.structure.moe} == {shared}
    left = small.structure.moe_parameters / dark.structure.moe_parameters
    assert report.details["ratio_of_moe"] == pytest.approx(1 - left)
    assert report.details["padding_micro_experts"] == 0
    planned = CameraP(**knobs).planned_removals(dark.structure)
    assert planned == [layer.removed for layer in report.layers]


@pytest.mark.parametrize("knobs", [{}, {"scope": "expert", "allocation": "least_error"}])
def test_aligned_needs_scope_expert_and_no_budget(knobs):
    with pytest.raises(ValidationError, match="aligned"):
        CameraP(ratio=0.4, aligned=True, **knobs)


@pytest.mark.parametrize("first", ["removed", "zeroed"])
def test_pruning_again_starts_from_what_is_left(first):
    model, _ = pruned(build("deepseek"), ratio=0.3, state=first)
    left = [block.micro_experts for block in model.structure.moe]
    text = Calibration(tokens(), "calibration")
    report = CameraP(ratio=0.5, align=4).apply(model, Context(0, text))
    assert report.details["micro_experts"] == sum(left)
    assert [block.micro_experts for block in model.structure.moe] == [n - n // 2 for n in left]
    assert model.network(tokens()).logits.isfinite().all()


def test_ratio_zero_leaves_the_network_as_it_is():
    network = build("qwen2_moe")
    before = copy.deepcopy(network.state_dict())
    model, report = pruned(network, ratio=0)
    assert report.effect == "none"
    assert [block.layout for block in model.structure.moe] == ["fused", "fused"]
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_work_that_remains_follows_the_calibration_text():
    _, report = pruned(build("mixtral"), ratio=0.5, sequential=False)
    network = build("mixtral")
    for block, layer in zip(inspect_model(network).moe, report.layers, strict=True):
        visits = _visits(build("mixtral"), block.layer)
        left = [12 - lost for lost in layer.removed_per_expert]
        expected = sum(n * w for n, w in zip(visits, left, strict=True)) / sum(visits) / 12
        assert layer.kept_work == pytest.approx(expected)


def _visits(network, layer):
    """How often each expert of a layer is chosen, from the router's own choices."""
    seen = []
    experts = network.model.layers[layer].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    network(tokens())
    return torch.bincount(seen[0].flatten(), minlength=6).tolist()


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"scope": "global", "sequential": False, "refit": True}, "does not support scope=global"),
        (
            {"scope": "global", "sequential": False, "allocation": "least_error"},
            "divides the budget among layers itself",
        ),
        ({"align": 0}, "greater than or equal to 1"),
        ({"refit_damping": 0}, "greater than 0"),
        ({"layer_limit": 1.5}, "less than or equal to 1"),
    ],
)
def test_refuses_what_cannot_be_done(knobs, said):
    with pytest.raises(ValidationError, match=said):
        CameraP(ratio=0.2, **knobs)


def test_a_rule_over_several_options_is_said_without_repeating_all_of_them():
    target = "methods.camera.pruning.CameraP"
    options = {"_target_": target, "ratio": 0.2, "scope": "global", "sequential": True}
    with pytest.raises(UserError) as refusal:
        validate({"method": {"camera_p": options}})
    assert str(refusal.value) == (
        "method.camera_p: scope=global ranks all layers at once: set sequential=false"
    )
