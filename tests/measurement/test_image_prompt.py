"""One prompt with an image: the time of some calls, the cache that it leaves."""

import pytest
import torch

from bench.measurement.image_prompt import TIMED_CALLS, prompt_tokens, time_prefill
from bench.method import Context
from bench.models.model import Model
from bench.schema import ModelConfig
from methods.token_pruning.fastv import FastV
from methods.visual_engine.cost.closed_form import LayerCost, PromptLengths
from methods.visual_engine.cost.flops import decoder_shape, layer_costs
from methods.visual_engine.decoder import visual_engine_of
from tests.methods.visual_engine.cache_sizes import expected_cache_bytes
from tests.methods.visual_engine.tiny_mllms import build, prompt

BEFORE, AFTER = 6, 4


def loaded(name):
    about = ModelConfig(name=name, source="tests", kind="image_text")
    return Model(about, build(name), None, "", None, torch.device("cpu"))


def call(name):
    return prompt(name, [BEFORE, (4, 5), AFTER])


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_vl", "internvl_qwen2"])
def test_the_cache_holds_what_the_plan_leaves(name):
    model = loaded(name)
    sizes = prompt_tokens(model, call(name))
    rows = PromptLengths(sizes.visual, BEFORE, sizes.text, float(sizes.visual))
    dense = time_prefill(model, call(name))
    engine = visual_engine_of(model.network)
    shape = decoder_shape(engine)
    every = LayerCost(shape.heads, shape.groups, shape.heads, shape.widths[0])
    assert dense.cache_bytes == expected_cache_bytes(shape, [every] * shape.depth, rows, 4)
    engine.plan.set_execution("skip")
    engine.plan.cut_at(3)
    engine.plan.keep_heads([(0, 1, 2, 3), (0, 1), (0, 1), ()])
    found = time_prefill(model, call(name))
    assert (
        found.cache_bytes
        == expected_cache_bytes(shape, layer_costs(engine), rows, 4)
        < dense.cache_bytes
    )


def test_time_is_the_median_of_some_calls():
    model = loaded("llava_llama")
    found = time_prefill(model, call("llava_llama"))
    assert len(found.seconds) == TIMED_CALLS
    assert min(found.seconds) <= found.median <= max(found.seconds)
    assert prompt_tokens(model, call("llava_llama")).scope == "prefill 1x(25 visual + 10 text)"


def test_a_methods_own_work_is_timed_apart():
    model = loaded("llava_llama")
    assert time_prefill(model, call("llava_llama")).overhead == []
    FastV(after=2, keep=0.5, average=None).apply(model, Context(seed=1))
    found = time_prefill(model, call("llava_llama"))
    assert len(found.overhead) == TIMED_CALLS
    assert all(own > 0 for own in found.overhead)
