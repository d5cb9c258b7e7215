"""What a prompt with an image costs: the counter on a real call against arithmetic on shapes."""

import pytest
import torch

from bench.measurement.operators import attention, counter, grouped
from bench.measurement.prefill import REPEATS, measure
from bench.method import Context
from bench.models.config import ModelConfig
from bench.models.model import Model
from methods.token_pruning.fastv import FastV
from methods.visual_tokens.cost import Prompt, cache_bytes, dense_work, prefill_flops, stock_flops
from methods.visual_tokens.engine import engine_of
from methods.visual_tokens.work import shape_of, work_of
from tests.methods.visual_tokens.tiny_mllms import ARCHITECTURES, build, prompt

BEFORE, AFTER = 6, 4


def loaded(name):
    about = ModelConfig(name=name, source="tests", kind="image_text")
    return Model(about, build(name), None, "", None, torch.device("cpu"))


def measured(model, name):
    return measure(model, prompt(name, [BEFORE, (4, 5), AFTER]))


def lengths(found):
    return Prompt(found.visual, BEFORE, found.text, float(found.visual))


def gates(engine, rows):
    """FLOPs of routers and shared gates, which the formulas of the strategies leave out."""
    total = 0
    for layer, count in zip(engine.decoder.layers, rows, strict=True):
        moe = layer.moe
        if moe is not None:
            total += 2 * count * moe.d_model * (moe.num_experts + (moe.shared_gate is not None))
    return total


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_product_of_a_dense_prefill_is_seen(name):
    model = loaded(name)
    found = measured(model, name)
    engine = engine_of(model.network)
    analytic = stock_flops(shape_of(engine), lengths(found))
    rows = [found.visual + found.text] * len(engine.decoder.layers)
    expected = analytic["text"] + analytic["visual"] + gates(engine, rows)
    assert found.flops["decoder"] == pytest.approx(expected, rel=1e-9)
    assert found.flops["head"] == analytic["head"]
    assert found.flops["vision"] > 0
    parts = (value for part, value in found.flops.items() if part != "total")
    assert found.flops["total"] == sum(parts)


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_vl", "internvl_qwen2"])
def test_skipped_work_is_not_counted_and_not_held(name):
    model = loaded(name)
    dense = measured(model, name)
    engine = engine_of(model.network)
    engine.plan.agree("skip")
    engine.plan.cut_at(3)
    engine.plan.keep_heads([(0, 1, 2, 3), (0, 1), (0, 1), ()])
    engine.plan.keep_neurons([(torch.arange(12),)] * 4)
    found = measured(model, name)
    shape, work = shape_of(engine), work_of(engine)
    analytic = prefill_flops(shape, work, lengths(found))
    # Visual rows attend to text before them; the kernel is asked for all text rows.
    after = sum(layer.queries for layer in work) * 4 * found.visual * AFTER * shape.head_dim
    most = analytic["text"] + analytic["visual"] + after
    assert found.flops["decoder"] == pytest.approx(most, rel=0.01)
    assert found.flops["decoder"] < 0.6 * dense.flops["decoder"]
    assert found.flops["vision"] == dense.flops["vision"]
    assert found.cache_bytes == cache_bytes(shape, work, lengths(found), 4)
    assert dense.cache_bytes == cache_bytes(shape, dense_work(shape), lengths(dense), 4)


def test_time_is_the_median_of_some_calls():
    found = measured(loaded("llava_llama"), "llava_llama")
    assert len(found.seconds) == REPEATS
    assert min(found.seconds) <= found.median <= max(found.seconds)
    assert found.shapes == "prefill 1x(25 visual + 10 text)"


def test_attention_and_grouped_products_are_seen_on_a_cpu():
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    with counter() as counted:
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert (
        counted.get_total_flops()
        == 2 * 2 * 4 * 7 * 9 * (8 + 8)
        == attention(q.shape, k.shape, v.shape)
    )
    assert grouped((10, 3), (4, 3, 5)) == 2 * 10 * 3 * 5


def test_a_methods_own_work_is_timed_apart():
    model = loaded("llava_llama")
    assert measured(model, "llava_llama").overhead == []
    FastV(after=2, keep=0.5, average=None).apply(model, Context(seed=1))
    found = measured(model, "llava_llama")
    assert len(found.overhead) == REPEATS
    assert all(own > 0 for own in found.overhead)
