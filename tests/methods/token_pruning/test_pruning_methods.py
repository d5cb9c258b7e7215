"""Budgets, reports, costs and configs of the pruning methods."""

import importlib
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bench.config.composition import compose_run_config
from bench.errors import UserError
from bench.measurement.model_size import kv_cache_bytes
from methods.token_pruning.controls import Downsample, RandomTokens
from methods.token_pruning.divprune import DivPrune
from methods.token_pruning.fastv import FastV
from methods.token_pruning.pyramid_drop import PyramidDrop
from methods.token_pruning.sparsevlm import SparseVLM
from methods.visual_engine.cost.closed_form import LayerCost, PromptLengths
from methods.visual_engine.cost.flops import average_tokens, decoder_shape, layer_costs
from methods.visual_engine.decoder import visual_engine_of
from methods.visual_engine.settings import Quota, tokens_left
from methods.visual_tokens.strategies import VTW, LayerDrop
from tests.methods.token_pruning.recorded_steps import CONTEXT, METHODS, applied, loaded
from tests.methods.visual_engine.cache_sizes import expected_cache_bytes
from tests.methods.visual_engine.tiny_mllms import build, prompt

CONFIGS = Path(importlib.import_module("conf").__file__).parent / "method"


@pytest.mark.parametrize("depth, kept", [(32, 115), (40, 121)])
def test_fastv_at_an_average_of_144(depth, kept):
    assert Quota.averaging(144, 2, depth).kept(576, 576) == kept
    assert Quota.averaging(0.25, 2, depth).kept(576, 576) == kept


@given(st.integers(1, 2000), st.floats(0.05, 1), st.integers(0, 8), st.integers(9, 60))
def test_an_average_is_an_average(n, share, after, depth):
    if share * depth <= after + 0.5:
        return
    kept = Quota.averaging(share, after, depth).kept(n, n)
    average = (after * n + (depth - after) * kept) / depth
    # Rounding moves k by half a token, and one token always stays.
    assert abs(average - share * n) <= 1 or kept == 1


def test_averages_that_cannot_be_met():
    with pytest.raises(UserError, match=r"average=0.05 cannot be met: 2 of 32 layers"):
        Quota.averaging(0.05, 2, 32)
    with pytest.raises(UserError, match="cannot be met for an image of 4000 tokens"):
        Quota.averaging(144, 2, 32).kept(4000, 4000)
    with pytest.raises(UserError, match=r"average=0\.2 cannot be met: the first stage"):
        PyramidDrop(average=0.2)._steps(32, CONTEXT)


def test_pyramid_drop_of_32_layers():
    steps = PyramidDrop()._steps(32, CONTEXT)
    assert [each.after for each in steps] == [8, 16, 24]
    left = [tokens_left([s.quota for s in steps[: i + 1]], 576) for i in range(3)]
    assert left == [288, 144, 72]
    steep = PyramidDrop(average=0.3)._steps(32, CONTEXT)
    left = [576] + [tokens_left([s.quota for s in steep[: i + 1]], 576) for i in range(3)]
    assert sum(left) / 4 == pytest.approx(0.3 * 576, abs=1)


@pytest.mark.parametrize("average", [192, 128, 64])
def test_sparsevlm_tables_average_what_they_are_called(average):
    steps = SparseVLM(average=average)._steps(32, CONTEXT)
    assert [each.after for each in steps] == [2, 6, 15]
    tokens = [tokens_left([s.quota for s in steps if s.after <= layer], 576) for layer in range(32)]
    assert sum(tokens) / 32 == pytest.approx(average, rel=0.08)
    plain = SparseVLM(average=average, recycle=False)._steps(32, CONTEXT)
    table = {192: [300, 200, 110], 128: [303, 110, 36], 64: [66, 30, 17]}[average]
    assert [s.quota.kept(576, 576) for s in plain] == table
    assert [s.after for s in SparseVLM()._steps(28, CONTEXT)] == [2, 5, 13]


def test_amounts_are_numbers_shares_or_everything():
    assert [Quota.of(amount).kept(100, 100) for amount in (7, 0.07, 1, 1.0, "all", 400)] == [
        7,
        7,
        1,
        100,
        100,
        100,
    ]
    for wrong in (0, -3, 1.5, "some", True):
        with pytest.raises(ValidationError):
            DivPrune(keep=wrong)


def test_one_budget_at_a_time():
    for knobs in ({"average": 5}, {"keep": None}):
        with pytest.raises(UserError, match="set exactly one of them"):
            FastV(**knobs).check(loaded("llava_llama").structure)


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match="fastv selects after 9 layers, but the decoder has 4"):
        FastV(after=9, keep=3, average=None).check(loaded("llava_llama").structure)
    with pytest.raises(UserError, match="execution=masked: token pruning removes tokens"):
        DivPrune(execution="masked").check(loaded("llava_llama").structure)
    with pytest.raises(UserError, match="one share for each"):
        SparseVLM(keep=(0.5,)).check(loaded("llava_llama").structure)
    for knobs in ({"keep": (), "layers": (1, 2, 3)}, {"keep": (0.5, 0.4, 0.3), "layers": ()}):
        with pytest.raises(UserError, match="give one share for each layer"):
            SparseVLM(**knobs).check(loaded("llava_llama").structure)
    with pytest.raises(UserError, match="fastv reads the attention of layer 1, but dart already"):
        applied("llava_llama", METHODS["dart"], FastV(after=2, keep=3, average=None))
    network, _ = applied("llava_llama", RandomTokens(keep=9), Downsample(keep=4))
    with pytest.raises(UserError, match="downsample needs whole images"):
        network(**prompt("llava_llama", [4, (5, 5), 3]))


@pytest.mark.parametrize("name, method", METHODS.items())
def test_messages_name_a_method_as_its_config_does(name, method):
    steps = method._steps(4, CONTEXT)
    assert {step.name for step in steps} == {name} and (CONFIGS / f"{name}.yaml").exists()


@pytest.mark.parametrize("method", METHODS)
def test_reports_are_what_happens(method):
    model = loaded("llava_llama")
    report = METHODS[method].apply(model, CONTEXT)
    details = report.details
    cache = model.network(**prompt("llava_llama", [4, (5, 5), 6])).past_key_values
    tokens = [layer.visual_keys.shape[2] for layer in cache.layers]
    told = [s["tokens"] for s in details["stages"] for _ in range(s["first"], s["until"])]
    assert report.effect == "skipped" and details["frame"] == 25
    assert told == tokens
    assert details["average_tokens"] == pytest.approx(sum(tokens) / 4)


def test_stages_end_at_the_cut():
    model = loaded("llava_llama")
    LayerDrop(layers=3).apply(model, CONTEXT)
    details = FastV(after=1, keep=5, average=None).apply(model, CONTEXT).details
    assert details["stages"] == [
        {"first": 0, "until": 1, "tokens": 25},
        {"first": 1, "until": 3, "tokens": 5},
        {"first": 3, "until": 4, "tokens": 0},
    ]
    assert details["average_tokens"] == average_tokens(details["stages"]) == 35 / 4
    free = FastV(after=1, keep=5, average=None).apply(loaded("qwen2_vl"), CONTEXT).details
    assert free["stages"] is None and free["selections"][0]["count"] == 5


def test_vtw_reports_its_layers():
    details = VTW().apply(loaded("llava_llama"), CONTEXT).details
    assert details["layers"] == 2 and details["average_tokens"] == 12.5


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", ["llava_llama", "internvl_qwen2"])
@pytest.mark.parametrize("method", METHODS)
def test_the_cache_is_what_the_work_says(name, method):
    network, engine = applied(name, METHODS[method])
    call = prompt(name, [6, (5, 5), 4])
    visual = int((call["input_ids"] == 60).sum())
    lengths = PromptLengths(visual, 6, 10, 0.0)
    cache = network(**call, logits_to_keep=1).past_key_values
    assert kv_cache_bytes(cache) == expected_cache_bytes(
        decoder_shape(engine), layer_costs(engine), lengths, 4
    )


def test_work_comes_back_from_a_report():
    model = loaded("llava_llama")
    details = METHODS["sparsevlm"].apply(model, CONTEXT).details
    again = [
        LayerCost(**layer | {"quotas": tuple(Quota(**quota) for quota in layer["quotas"])})
        for layer in details["work"]
    ]
    assert [layer.tokens(PromptLengths(50, 0, 4, 50, frames=2)) for layer in again] == [
        layer.tokens(PromptLengths(50, 0, 4, 50, frames=2))
        for layer in layer_costs(visual_engine_of(model.network))
    ]
    assert again[0].tokens(PromptLengths(50, 0, 4, 50, frames=2)) == 50


def test_choosing_is_timed_apart():
    network, engine = applied("llava_llama", METHODS["sparsevlm"])
    call = prompt("llava_llama", [6, (5, 5), 4])
    with engine.overhead.measured() as overhead:
        network.generate(**call, max_new_tokens=3)
    assert overhead.steps == 2 and overhead.seconds > 0
    assert not engine.overhead.synchronized
    overhead.reset()
    assert engine.overhead.seconds == 0


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", [*METHODS, "vtw"])
def test_every_config_makes_its_method(name):
    knobs = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    module, _, kind = knobs.pop("_target_").rpartition(".")
    method = getattr(importlib.import_module(module), kind)(**knobs)
    assert compose_run_config([f"method={name}"]).method == {name: method}
    network = build("llava_llama", num_hidden_layers=32, hidden_size=16, intermediate_size=8)
    model = loaded("llava_llama")
    model.network = network
    details = method.apply(model, CONTEXT).details
    share = details["average_tokens"] / details["frame"]
    expected = {"vtw": 0.5, "pyramid_drop": 0.47, "sparsevlm": 1 / 3}.get(name, 0.25)
    # On 25 tokens rounding shows, and so does the one more that each recycling leaves.
    assert share == pytest.approx(expected, abs=0.05)
    assert torch.isfinite(network(**prompt("llava_llama", [3, (5, 5), 4])).logits).all()
