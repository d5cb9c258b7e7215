"""One prompt with an image: the time of some calls, the cache that it leaves."""

import pytest
import torch

from bench.measurement.prefill import REPEATS, lengths, measure
from bench.method import Context
from bench.models.config import ModelConfig
from bench.models.model import Model
from methods.token_pruning.fastv import FastV
from methods.visual_tokens.cost import LayerWork, Prompt, cache_bytes
from methods.visual_tokens.engine import engine_of
from methods.visual_tokens.work import shape_of, work_of
from tests.methods.visual_tokens.tiny_mllms import build, prompt

BEFORE, AFTER = 6, 4


def loaded(name):
    about = ModelConfig(name=name, source="tests", kind="image_text")
    return Model(about, build(name), None, "", None, torch.device("cpu"))


def call(name):
    return prompt(name, [BEFORE, (4, 5), AFTER])


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_vl", "internvl_qwen2"])
def test_the_cache_holds_what_the_plan_leaves(name):
    model = loaded(name)
    sizes = lengths(model, call(name))
    rows = Prompt(sizes.visual, BEFORE, sizes.text, float(sizes.visual))
    dense = measure(model, call(name))
    engine = engine_of(model.network)
    shape = shape_of(engine)
    every = LayerWork(shape.heads, shape.groups, shape.heads, shape.widths[0])
    assert dense.cache_bytes == cache_bytes(shape, [every] * shape.depth, rows, 4)
    engine.plan.agree("skip")
    engine.plan.cut_at(3)
    engine.plan.keep_heads([(0, 1, 2, 3), (0, 1), (0, 1), ()])
    found = measure(model, call(name))
    assert found.cache_bytes == cache_bytes(shape, work_of(engine), rows, 4) < dense.cache_bytes


def test_time_is_the_median_of_some_calls():
    model = loaded("llava_llama")
    found = measure(model, call("llava_llama"))
    assert len(found.seconds) == REPEATS
    assert min(found.seconds) <= found.median <= max(found.seconds)
    assert lengths(model, call("llava_llama")).scope == "prefill 1x(25 visual + 10 text)"


def test_a_methods_own_work_is_timed_apart():
    model = loaded("llava_llama")
    assert measure(model, call("llava_llama")).overhead == []
    FastV(after=2, keep=0.5, average=None).apply(model, Context(seed=1))
    found = measure(model, call("llava_llama"))
    assert len(found.overhead) == REPEATS
    assert all(own > 0 for own in found.overhead)
