"""Skipping equals masking, for every architecture and for every shape of batch."""

import copy

import pytest
import torch
from transformers import DynamicCache

from bench.models.structure.model_structure import inspect_model
from methods.dense.units import find_units, remove_units
from methods.visual_engine.decoder import visual_engine_of
from methods.visual_engine.settings import Window
from tests.methods.visual_engine.masked_reference import masked_reference
from tests.methods.visual_engine.tiny_mllms import ARCHITECTURES, IMAGE, build, prompt

TOLERANCE = 1e-5
SMALL = Window(1)
BATCH = ([2, (3, 4), 6], [7, (3, 2), 2, (2, 2), 3], [9])


def some_heads(engine, seed=1):
    """Random heads, another number in every layer; one layer keeps none."""
    rng = torch.Generator().manual_seed(seed)
    heads = [layer.attention_view().heads for layer in engine.decoder.layers]
    return [
        tuple(torch.randperm(number, generator=rng)[:kept].tolist())
        for number, kept in zip(heads, (3, 0, 1, 2), strict=True)
    ]


def some_neurons(engine, seed=1):
    """A random third of the neurons of every feed-forward."""
    rng = torch.Generator().manual_seed(seed)
    units = [layer.units() for layer in engine.decoder.layers]
    return [
        tuple(torch.randperm(u.width, generator=rng)[: u.width // 3] for u in layer)
        for layer in units
    ]


def planned(name, *, heads=True, neurons=True, window=SMALL, cut=3, **changes):
    """A network under a plan, and an untouched copy of it."""
    network = build(name)
    stock = copy.deepcopy(network)
    engine = visual_engine_of(network)
    engine.plan.set_execution("skip")
    engine.plan.set_window(window)
    engine.plan.cut_at(cut)
    if heads:
        engine.plan.keep_heads(some_heads(engine))
    if neurons:
        engine.plan.keep_neurons(some_neurons(engine))
    for key, value in changes.items():
        setattr(engine.plan, key, value)
    return network, stock, engine.plan


def text_of(call):
    return (call["input_ids"] != IMAGE) & call["attention_mask"].bool()


def assert_equal(network, stock, plan, call, tokens=16):
    """Same logits at every text position, then the same greedy tokens and their logits."""
    settings = {"max_new_tokens": tokens, "do_sample": False, "output_logits": True}
    with torch.no_grad():
        with masked_reference(stock, plan):
            expected = stock(**call).logits
            wanted = stock.generate(**call, **settings, return_dict_in_generate=True)
        ours = network(**call).logits
        got = network.generate(**call, **settings, return_dict_in_generate=True)
    where = text_of(call)
    assert (ours - expected)[where].abs().max() < TOLERANCE
    assert torch.equal(got.sequences, wanted.sequences)
    assert (torch.stack(got.logits) - torch.stack(wanted.logits)).abs().max() < TOLERANCE
    return ours[where]


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_skip_equals_mask_and_every_setting_matters(name):
    network, stock, plan = planned(name)
    call = prompt(name, [5, (3, 4), 6])
    before = assert_equal(network, stock, plan, call)

    def changed():
        return (network(**call).logits[text_of(call)] - before).abs().max() > 1e-3

    engine = visual_engine_of(network)
    for change, back in (
        (lambda: plan.set_window(Window(2)), lambda: plan.set_window(Window(1))),
        (lambda: plan.cut_at(2), lambda: plan.cut_at(3)),
        (
            lambda: plan.keep_heads(some_heads(engine, 2)),
            lambda: plan.keep_heads(some_heads(engine)),
        ),
        (
            lambda: plan.keep_neurons(some_neurons(engine, 2)),
            lambda: plan.keep_neurons(some_neurons(engine)),
        ),
    ):
        change()
        assert changed()
        back()
        assert not changed()


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_batches_with_other_offsets_paddings_and_numbers_of_images(name):
    assert_equal(*planned(name), prompt(name, *BATCH), tokens=6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_on_the_right(name):
    network, stock, plan = planned(name)
    call = prompt(name, [5, (3, 4), 6], [2, (3, 4), 3])
    padding = int((call["attention_mask"][1] == 0).sum())
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in call:
            call[key][1] = call[key][1].roll(-padding)
    with torch.no_grad(), masked_reference(stock, plan):
        expected = stock(**call).logits
    with torch.no_grad():
        ours = network(**call).logits
    where = text_of(call)
    assert padding and (ours - expected)[where].abs().max() < TOLERANCE


@pytest.mark.sample(12)
@pytest.mark.parametrize("name", ["llava_mistral", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "settings",
    [
        {"window": None},
        {"window": Window(1, causal=True)},
        {"dropped_heads": "text_only"},
        {"dropped_heads": "text_only", "window": None},
        {"heads": False, "neurons": False, "window": None, "cut": 2},
        {"heads": False, "neurons": False, "cut": 4},
        {"neurons": False, "window": None, "cut": 4},
        {"heads": False, "window": None, "cut": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [([4, (3, 4), 5], [4, (3, 4), 5]), BATCH], ids=["even", "ragged"])
def test_every_form_of_every_strategy(name, settings, rows):
    assert_equal(*planned(name, **settings), prompt(name, *rows), tokens=4)


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_vl"])
def test_an_image_may_begin_the_prompt_and_text_may_lie_between_images(name):
    assert_equal(*planned(name), prompt(name, [(3, 4), 2, (2, 2), 4]), tokens=4)
    assert_equal(
        *planned(name, window=None, dropped_heads="text_only"), prompt(name, [(3, 4), 3]), tokens=4
    )


@pytest.mark.parametrize(
    "rows",
    [
        ([4, (12, 12), 5], [4, (12, 12), 5]),
        ([4, (12, 12), 5], [6, (9, 16), 2]),
        ([4, (6, 7), 5, (9, 2), 3], [30]),
        ([7], [2, (3, 3), 2]),
    ],
)
def test_many_tokens_go_in_bands(rows, monkeypatch):
    monkeypatch.setattr("methods.visual_engine.masks.BAND_QUERIES", 40)
    monkeypatch.setattr("methods.visual_engine.masks.BANDED_FROM", 1)
    assert_equal(*planned("qwen2_vl"), prompt("qwen2_vl", *rows), tokens=3)
    assert_equal(*planned("qwen2_vl", window=Window(2, True)), prompt("qwen2_vl", *rows), tokens=3)


def test_grouped_heads_kept_in_part_need_their_group_only():
    network, stock, plan = planned("internvl_qwen2", heads=False)
    plan.keep_heads([(0,), (2, 3), (1, 2), (0, 1, 2, 3)])
    assert_equal(network, stock, plan, prompt("internvl_qwen2", [5, (3, 4), 6]))
    cache = DynamicCache()
    network(**prompt("internvl_qwen2", [5, (3, 4), 6]), past_key_values=cache)
    assert [layer.visual_keys.shape[1] for layer in cache.layers[:3]] == [1, 1, 2]
    assert cache.layers[3].visual_keys is None


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_vl", "qwen3_vl_moe"])
def test_reordered_weights_compute_the_same(name):
    network, stock, plan = planned(name)
    dense = stock(**(call := prompt(name, [5, (3, 4), 6]))).logits
    engine = visual_engine_of(network)
    engine.weight_cache.reorder()
    with engine.dense():
        assert (network(**call).logits - dense).abs().max() < TOLERANCE
    assert_equal(network, stock, plan, call)
    weights = engine.weight_cache.layer(0)
    if name != "qwen3_vl_moe":
        down = engine.decoder.layers[0].feed_forward.down_proj.weight
        assert weights.feed_forward.view.down.data_ptr() == down.data_ptr()
    if name == "llava_llama":
        assert weights.q.weight.data_ptr() == weights.view.q.weight.data_ptr()


def test_weights_that_change_later_are_cut_out_anew():
    network, stock, plan = planned("llava_llama")
    call = prompt("llava_llama", [5, (3, 4), 6])
    network(**call)
    for net in (network, stock):
        layer = net.model.language_model.layers[1]
        layer.mlp.down_proj.weight.mul_(0.5)
        layer.self_attn.v_proj.weight.mul_(2)
    assert_equal(network, stock, plan, call)


def test_a_copy_of_the_network_has_a_plan_of_its_own():
    network, _stock, _plan = planned("llava_llama")
    twin = copy.deepcopy(network)
    call = prompt("llava_llama", [5, (3, 4), 6])
    before = network(**call).logits
    visual_engine_of(twin).plan.cut_at(1)
    twin.model.language_model.layers[0].mlp.up_proj.weight.mul_(3)
    assert (twin(**call).logits - before)[text_of(call)].abs().max() > 1e-2
    assert torch.equal(network(**call).logits, before)


def test_gradients_reach_the_weights_that_visual_rows_use():
    network, stock, plan = planned("llava_llama")
    call = prompt("llava_llama", [5, (3, 4), 6])
    where = text_of(call)
    with masked_reference(stock, plan):
        stock.requires_grad_(True)
        stock(**call).logits[where].square().sum().backward()
    network.requires_grad_(True)
    for _ in range(2):
        network.zero_grad()
        network(**call).logits[where].square().sum().backward()
    for layer in (0, 1):
        for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"):
            expected = stock.model.language_model.layers[layer].get_submodule(path).weight.grad
            got = network.model.language_model.layers[layer].get_submodule(path).weight.grad
            assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llava_llama", "internvl_qwen2"])
def test_layers_that_lost_different_numbers_of_heads(name):
    """As FLAP leaves them: a config has one number of heads for all layers."""
    network = build(name)
    units = list(find_units(inspect_model(network), "flap", ("heads",)))
    for unit, lost in zip(units, (1, 0, 1, 0), strict=True):
        remove_units(unit, torch.arange(unit.heads.groups) < lost)
    stock = copy.deepcopy(network)
    plan = visual_engine_of(network).plan
    plan.set_execution("skip")
    plan.set_window(SMALL)
    plan.cut_at(3)
    assert_equal(network, stock, plan, prompt(name, *BATCH), tokens=4)
