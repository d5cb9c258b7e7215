"""Counted and arithmetic FLOPs agree for prompts with images: dense, every strategy, pruning."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.config.composition import compose_run_config
from bench.measurement.flops import analytic_vlm
from bench.measurement.flops.cost_rows import multimodal_parts
from bench.measurement.image_prompt import count_prefill
from bench.method import Context
from bench.models.macs import flops_provider_of, macs_by_part
from bench.models.model import Model
from bench.schema import ModelConfig
from methods.token_pruning.fastv import FastV
from methods.token_pruning.tower.agilepruner import AgilePruner
from methods.token_pruning.tower.hiprune import HiPrune
from methods.token_pruning.tower.vispruner import VisPruner
from methods.token_pruning.visionzip import VisionZip
from methods.visual_engine.decoder import visual_engine_of
from methods.visual_tokens.head_pruning import HeadPruning
from methods.visual_tokens.strategies import LayerDrop, NeighborAttention, SparseFFN
from tests.measurement.flops.agreement import agree
from tests.methods.token_pruning.recorded_steps import LLAVA_METHODS, METHODS
from tests.methods.visual_engine.tiny_mllms import (
    ARCHITECTURES,
    build,
    laid_out_prompt,
    prompt,
)

CONTEXT = Context(seed=1)
HEADS = HeadPruning(keep=0.6, choose="random", whole_layers=1)
STRATEGIES = {
    "neighbor_attention": NeighborAttention(window=3),
    "head_pruning": HEADS,
    "head_pruning, text": HEADS.model_copy(update={"dropped_heads": "text_only"}),
    "sparse_ffn": SparseFFN(keep=0.4, choose="random"),
    "layer_drop": LayerDrop(share=0.5),
}
THREE = ("llava_llama", "qwen2_vl", "internvl_qwen2")


def preset(name):
    """A shipped preset, its scores drawn, since a random network's are none."""
    (method,) = compose_run_config([f"method={name}", "model=micro_llava"]).method.values()
    return method.model_copy(update={"heads": "random", "neurons": "random", "whole_layers": 1})


def loaded(name, *methods, **changes):
    about = ModelConfig(name=name, source="tests", kind="image_text")
    model = Model(about, build(name, **changes), None, "", None, torch.device("cpu"))
    for method in methods:
        method.apply(model, CONTEXT)
    return model


def both_agree(model, *row):
    """Hold prompt and token against arithmetic; return the counted prompt and its products."""
    return both_agree_on(model, prompt(model.name, list(row or (6, (4, 6), 4))))


def both_agree_on(model, call):
    counted, token = count_prefill(model, call)
    products = analytic_vlm.image_prompt_macs(model.network, model.structure, call)
    agree(counted, products)
    agree(token, analytic_vlm.token_after_prompt_macs(model.network, model.structure, call))
    return counted, products


@cache
def counted_dense(name):
    return count_prefill(loaded(name), prompt(name, [6, (4, 6), 4]))[0]


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_network_as_it_is(name):
    counted, products = both_agree(loaded(name))
    parts = {part: 2 * macs for part, macs in macs_by_part(products).items()}
    modules = multimodal_parts(counted)
    for part in ("vision", "projector", "head"):
        assert parts.pop(part) == modules[part] > 0
    assert sum(parts.values()) == modules["decoder"]


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy_alone(name, strategy):
    counted, _ = both_agree(loaded(name, STRATEGIES[strategy]))
    dense = counted_dense(name)
    if strategy != "neighbor_attention":  # a dense mask of so few rows costs what it hides
        assert counted.total < dense.total
    assert counted.causal < dense.causal


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("label", ["yopo_25", "yopo_12"])
def test_both_presets(name, label):
    both_agree(loaded(name, preset(label)))


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "llava_qwen2_moe"])
def test_a_preset_on_experts(name):
    both_agree(loaded(name, preset("yopo_12")))


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("method", ["fastv", "visionzip"])
def test_pruned_tokens(name, method):
    _, products = both_agree(loaded(name, METHODS[method]))
    assert macs_by_part(products)["method"] > 0


@pytest.mark.sample(6)
@pytest.mark.parametrize("method", sorted(METHODS | LLAVA_METHODS))
def test_every_pruning_method_says_what_choosing_costs(method):
    both_agree(loaded("llava_llama", (METHODS | LLAVA_METHODS)[method]))


@pytest.mark.broad
@settings(max_examples=8)
@given(
    st.sampled_from(THREE),
    st.booleans(),
    st.integers(0, 30),
    st.tuples(st.integers(4, 6), st.integers(4, 6)),
    st.integers(1, 10),
)
def test_choosing_by_words_whose_number_depends_on_the_prompt(name, recycle, before, frame, after):
    """Half of the question is taken for them: good to 1 % where the image is not tiny beside it."""
    method = METHODS["sparsevlm"].model_copy(update={"recycle": recycle})
    _, products = both_agree(loaded(name, method), before, frame, after)
    least = before + after + frame[0] * frame[1]  # tokens, each of which meets a matrix at least
    assert macs_by_part(products)["method"] > least


@pytest.mark.parametrize(
    "method", ["visionzip", "prumerge_plus", "dart", "sparsevlm", "pyramid_drop"]
)
def test_every_release_says_what_choosing_costs(method):
    both_agree(loaded("llava_llama", METHODS[method].model_copy(update={"variant": "release"})))


@pytest.mark.parametrize(
    "method", [VisPruner(keep=5), HiPrune(keep=5), AgilePruner(keep=5)], ids=str
)
def test_what_reads_more_of_the_tower_says_what_that_costs(method):
    both_agree(loaded("llava_llama", method))


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("name", analytic_vlm.TILED)
def test_images_in_tiles(name, pruned):
    model = loaded(name, *([METHODS["divprune"]] if pruned else []))
    both_agree_on(model, laid_out_prompt(name, [4, (2, 3), 5]))


def test_a_method_that_does_not_say_is_named():
    model = loaded("llava_llama", METHODS["fastv"])
    assert flops_provider_of(model.network).unaccounted == ()
    plan = visual_engine_of(model.network).plan
    plan.steps = [replace(each, macs=None) for each in plan.steps]
    assert flops_provider_of(model.network).unaccounted == ("fastv",)


@pytest.mark.broad
@settings(max_examples=6, deadline=None)
@given(
    st.sampled_from(sorted(ARCHITECTURES)),
    st.lists(st.sampled_from(sorted(STRATEGIES)), max_size=3, unique=True),
    st.sampled_from([None, FastV(after=1, keep=0.4, average=None), VisionZip(keep=0.5)]),
    st.integers(0, 30),
    st.tuples(st.integers(2, 6), st.integers(2, 6)),
    st.integers(1, 30),
    st.sampled_from([2, 3, 5]),
)
def test_random_plans_on_random_prompts(name, strategies, pruning, before, frame, after, layers):
    chosen = {key.split(",")[0]: STRATEGIES[key] for key in strategies}
    methods = [*chosen.values(), *([pruning] if pruning else [])]
    model = loaded(name, *methods, num_hidden_layers=layers)
    both_agree(model, before, frame, after)


def test_windows_in_bands():
    """Enough rows that windows are cut into bands: the kernel is asked for less, too."""
    dense, _ = both_agree(loaded("qwen2_vl"), 3, (16, 12), 5)
    counted, products = both_agree(loaded("qwen2_vl", NeighborAttention(window=3)), 3, (16, 12), 5)
    assert counted.total < dense.total
    attention = [p for p in products if p.part == "attention" and p.tokens == "visual"]
    # Neighbours of a 3x3 window with borders clipped, and the three words before the image.
    cells = (3 * 16 - 2) * (3 * 12 - 2)
    seen = sum(p.macs - p.masked for p in attention) / (2 * 8 * 4)
    assert seen == 3 * (cells + 3 * 16 * 12)


def test_two_images():
    for strategy in STRATEGIES.values():
        both_agree(loaded("qwen2_vl", strategy), 4, (2, 3), 5, (4, 3), 6)


def test_a_plan_goes_with_a_copy_and_follows_the_weights():
    model = loaded("llava_qwen2_moe", STRATEGIES["sparse_ffn"])
    twin = model.copy()
    assert flops_provider_of(twin.network) is not flops_provider_of(model.network)
    LayerDrop(layers=1).apply(twin, CONTEXT)
    counted, _ = both_agree(twin)
    assert counted.total < both_agree(model)[0].total


def test_the_official_form_computes_everything():
    masked = loaded("llava_llama", HEADS.model_copy(update={"execution": "masked"}))
    dense = loaded("llava_llama")
    call = prompt("llava_llama", [6, (4, 6), 4])
    found = analytic_vlm.image_prompt_macs(masked.network, masked.structure, call)
    assert found == analytic_vlm.image_prompt_macs(dense.network, dense.structure, call)
    assert count_prefill(masked, call)[0].total == pytest.approx(
        2 * sum(p.macs for p in found), rel=0.01
    )


def test_counting_changes_nothing():
    model = loaded("llava_llama", METHODS["fastv"], STRATEGIES["head_pruning"])
    call = prompt("llava_llama", [6, (4, 6), 4])
    before = model.network(**call).logits
    copied = copy.deepcopy(call)
    both_agree(model)
    assert torch.equal(model.network(**call).logits, before)
    assert all(torch.equal(call[key], copied[key]) for key in call)
