"""FLOPs as rows of a record: both ways, both conventions, and what is missing is named."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from bench.config.composition import compose_run_config
from bench.errors import UserError
from bench.measurement import image_prompt
from bench.measurement.costs import count_costs
from bench.measurement.flops.cost_rows import flops_costs, prompt_flops_costs
from bench.method import Context
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from bench.models.model import Model
from bench.records.record import Cost, MissingMeasurement
from bench.schema import CostsConfig, FlopsConfig, ModelConfig
from methods.visual_engine.decoder import visual_engine_of
from methods.visual_tokens.strategies import LayerDrop
from tests.methods.token_pruning.recorded_steps import METHODS
from tests.methods.visual_engine import tiny_mllms
from tests.models import tiny_networks

QUICK = CostsConfig(name="tiny", batch=2, length=24)


def model_of(network, kind="causal_lm"):
    about = ModelConfig(name="tiny", source="tests", kind=kind)
    return Model(about, network, None, "", None, torch.device("cpu"))


def values(rows):
    """Values by what they are of; a number that is not there is None."""
    return {(row.scope, row.quantity, row.how): getattr(row, "value", None) for row in rows}


def missing_rows(rows):
    return [row for row in rows if isinstance(row, MissingMeasurement)]


@pytest.fixture
def multimodal():
    """FLOP rows of a tiny vision-language model, whose prompt no processor makes."""

    def rows(*methods, then=lambda model: None, **flops_config):
        model = model_of(tiny_mllms.build("llava_llama"), "image_text")
        for method in methods:
            method.apply(model, Context(seed=1))
        then(model)
        call = tiny_mllms.prompt("llava_llama", [6, (5, 5), 4])
        config = CostsConfig(name="tiny", flops=FlopsConfig(**flops_config))
        return list(prompt_flops_costs(model, config, call))

    return rows


def test_a_language_model_has_text_and_a_token_in_both_ways_and_conventions():
    found = values(flops_costs(model_of(tiny_networks.build("qwen2_moe")), QUICK))
    for scope in ("forward 2x24", "token after 2x24"):
        for how in ("counted", "analytic"):
            full, causal = found[scope, "flops", how], found[scope, "flops_causal", how]
            assert 0 < causal <= full
            assert found[scope, "macs", how] == full / 2
            assert found[scope, "macs_causal", how] == causal / 2
        assert found[scope, "flops", "counted"] == found[scope, "flops", "analytic"]
    assert (
        found["forward 2x24", "flops_causal", "counted"] < found["forward 2x24", "flops", "counted"]
    )


def test_the_first_row_of_a_scope_is_what_was_counted():
    rows = list(flops_costs(model_of(tiny_networks.build("mixtral")), QUICK))
    first = next(row for row in rows if row.quantity == "flops")
    assert first.how == "counted" and sum(first.parts.values()) == first.value
    analytic = next(row for row in rows if row.quantity == "flops" and row.how == "analytic")
    assert set(analytic.parts) == {"text", "attention", "routed", "router", "head"}
    assert sum(analytic.parts.values()) == analytic.value


def test_an_image_classifier():
    network = build_classifier(VisionConfig(architecture="micro_vgg", channels=1, size=8)).eval()
    found = values(flops_costs(model_of(network, "image_classifier"), QUICK))
    scope = "forward 2x1x8x8"
    assert found[scope, "flops", "counted"] == found[scope, "flops", "analytic"] > 0
    assert found[scope, "flops_causal", "counted"] == found[scope, "flops", "counted"]


def test_a_prompt_with_an_image(multimodal):
    rows = [multimodal(), multimodal(LayerDrop(layers=2))]
    assert missing_rows([*rows[0], *rows[1]]) == []
    dense, cut = map(values, rows)
    prompt, token = "prefill 1x(25 visual + 10 text)", "token after 1x(25 visual + 10 text)"
    for how in ("counted", "analytic"):
        assert 0 < cut[prompt, "flops", how] < dense[prompt, "flops", how]
        assert 0 < cut[token, "flops", how] < dense[token, "flops", how]
    visual = ("visual_flops", "analytic")
    assert 0 < cut[prompt, *visual] < 0.5 * dense[prompt, *visual]
    assert (token, *visual) not in dense


def test_a_prompt_is_processed_once_for_all_that_is_counted_of_it(monkeypatch):
    asked = []

    def prompt(model, words):
        asked.append(words)
        return tiny_mllms.prompt("llava_llama", [6, (5, 5), 4])

    monkeypatch.setattr(image_prompt, "build_image_prompt", prompt)
    model = model_of(tiny_mllms.build("llava_llama"), "image_text")
    found = count_costs(model, CostsConfig(name="tiny", words=7))
    assert asked == [7]
    had = {(cost.scope, cost.quantity) for cost in found.costs}
    scope = "prefill 1x(25 visual + 10 text)"
    assert {(scope, name) for name in ("flops", "cache_bytes", "seconds")} <= had
    assert ("model", "bytes") in had


def test_a_convention_is_a_row_of_its_own_and_never_the_default(multimodal):
    scope = "prefill 1x(25 visual + 10 text)"
    assert not [key for key in values(multimodal()) if key[1].startswith("flops_yopo")]
    found = values(multimodal(convention="yopo"))
    one = 8 * 25 * 32**2 + 6 * 25 * 32 * 48 + 4 * 25**2 * 32
    assert found[scope, "flops_yopo", "analytic"] == 4 * one
    cut = values(multimodal(LayerDrop(layers=2), convention="vtw"))
    layers = [35, 35, 10, 10]
    wanted = sum(4 * n * 32**2 + 2 * n**2 * 32 + 2 * n * 32 * 48 for n in layers)
    assert cut[scope, "flops_vtw", "analytic"] == wanted


def test_a_convention_of_prompts_is_missing_where_there_are_none():
    config = CostsConfig(name="tiny", length=9, flops=FlopsConfig(convention="yopo"))
    rows = list(flops_costs(model_of(tiny_networks.llama()), config))
    reason = "yopo covers prompts with images only"
    assert missing_rows(rows) == [
        MissingMeasurement(
            scope="forward 1x9", quantity="flops_yopo", reason=reason, how="analytic"
        )
    ]


def test_what_depends_on_values_is_named_and_reckoned_all_the_same():
    network = tiny_networks.unfuse(tiny_networks.build("mixtral"))
    found = values(flops_costs(model_of(network), QUICK))
    assert found["forward 2x24", "flops", "counted"] is None
    fused = values(flops_costs(model_of(tiny_networks.build("mixtral")), QUICK))
    key = ("forward 2x24", "flops", "analytic")
    assert found[key] == fused[key]


def test_a_length_that_the_model_cannot_take_is_a_gap():
    model = model_of(tiny_networks.llama())
    longest = CostsConfig(name="tiny", length=model.max_length)
    assert missing_rows(flops_costs(model, longest)) == []
    found = list(flops_costs(model, CostsConfig(name="tiny", length=model.max_length + 1)))
    assert {(gap.scope, gap.quantity) for gap in missing_rows(found)} == {
        (f"{call} 1x{model.max_length + 1}", "flops") for call in ("forward", "token after")
    }
    assert len(missing_rows(found)) == len(found)


def test_an_unknown_convention_is_one_sentence():
    with pytest.raises(UserError, match=r"costs\.flops\.convention=yolo: input should be 'yopo'"):
        compose_run_config(["costs.flops.convention=yolo"])
    assert compose_run_config(["costs.flops.convention=vtw"]).costs.flops.convention == "vtw"


def test_a_method_that_does_not_say_what_choosing_multiplies_is_a_gap(multimodal):
    def silent(model):
        plan = visual_engine_of(model.network).plan
        plan.steps = [replace(each, macs=None) for each in plan.steps]

    (gap,) = missing_rows(multimodal(METHODS["fastv"], then=silent))
    assert (gap.quantity, gap.how) == ("method_flops", "analytic")
    assert gap.reason == "fastv does not report the FLOPs of its selection"
    assert missing_rows(multimodal(METHODS["fastv"])) == []


def test_gaps_are_named_and_never_a_zero():
    network = tiny_networks.llama()
    layer = network.model.layers[0]
    layer.self_attn.head_dim = None
    del layer.self_attn.head_dim
    layer.forward = lambda x, **_: x
    rows = list(flops_costs(model_of(network), QUICK))
    missing = [gap for gap in missing_rows(rows) if gap.how == "analytic"]
    assert [gap.scope for gap in missing] == ["forward 2x24", "token after 2x24"]
    assert all("LlamaAttention does not state the number" in gap.reason for gap in missing)
    assert not [row for row in rows if isinstance(row, Cost) and row.how == "analytic"]


def test_an_operator_without_a_formula_takes_the_count_with_it():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.addr(x, x[:, 0], x[0])

    network = build_classifier(VisionConfig(architecture="micro_lenet", channels=1, size=8)).eval()
    network.head.append(Odd())
    counted = list(flops_costs(model_of(network, "image_classifier"), QUICK))
    assert missing_rows(counted) == [
        MissingMeasurement(
            scope="forward 2x1x8x8",
            quantity="flops",
            reason="no formula for aten.addr",
            how="counted",
        )
    ]
    assert not [row for row in counted if isinstance(row, Cost) and row.how == "counted"]
