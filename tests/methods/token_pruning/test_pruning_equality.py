"""Skipping pruned tokens equals masking them in transformers' own layers, for every method."""

import pytest
import torch
from transformers import DynamicCache

from methods.token_pruning.controls import RandomTokens
from methods.token_pruning.fastv import FastV
from methods.visual_engine.decoder import visual_engine_of
from methods.visual_engine.plan import VisualPlan
from methods.visual_tokens.strategies import VTW, LayerDrop, NeighborAttention
from tests.methods.token_pruning.recorded_steps import (
    CONTEXT,
    METHODS,
    applied,
    loaded,
    record_steps,
    removals,
)
from tests.methods.visual_engine.masked_reference import Removal, masked_reference
from tests.methods.visual_engine.test_visual_equality import text_of
from tests.methods.visual_engine.tiny_mllms import IMAGE, build, prompt
from tests.methods.visual_tokens.test_visual_strategies import context as images
from tests.methods.visual_tokens.test_visual_strategies import four

TOLERANCE = 1e-5
NAMES = ["llava_llama", "qwen2_vl", "internvl_qwen3"]

# Other offsets, padding, numbers of images and sizes of images; the last sample has none.
BATCH = ([2, (3, 4), 6], [7, (4, 5), 2, (2, 3), 3], [9])


def assert_skipped_is_masked(name, network, engine, call, tokens=4):
    """Same logits of every text token of the prompt, then the same tokens and their logits."""
    stock, seen = build(name), record_steps(engine)
    settings = {"max_new_tokens": tokens, "do_sample": False, "output_logits": True}
    shape = call["input_ids"].shape
    with torch.no_grad():
        ours = network(**call).logits
        gone = removals(seen, shape)
        # generate counts positions without padding, on which a choice may depend.
        seen.clear()
        got = network.generate(**call, **settings, return_dict_in_generate=True)
        with masked_reference(stock, engine.plan, gone):
            expected = stock(**call).logits
        with masked_reference(stock, engine.plan, removals(seen, shape)):
            wanted = stock.generate(**call, **settings, return_dict_in_generate=True)
    assert gone
    where = text_of(call)
    assert (ours - expected)[where].abs().max() < TOLERANCE
    assert torch.equal(got.sequences, wanted.sequences)
    assert (torch.stack(got.logits) - torch.stack(wanted.logits)).abs().max() < TOLERANCE
    return gone


@pytest.mark.sample(12)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_skipped_is_masked(name, method):
    network, engine = applied(name, METHODS[method])
    gone = assert_skipped_is_masked(name, network, engine, prompt(name, *BATCH))
    assert all(bool(removal.gone_BS.any()) for removal in gone)


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", ["llava_qwen2_moe", "qwen2_5_vl", "qwen3_vl", "internvl_phi3"])
@pytest.mark.parametrize("method", ["fastv", "sparsevlm", "visionzip"])
def test_other_architectures(name, method):
    network, engine = applied(name, METHODS[method])
    assert_skipped_is_masked(name, network, engine, prompt(name, *BATCH))


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["fastv", "divprune", "dart", "prumerge_plus"])
def test_pruning_composes_with_every_strategy(name, method):
    """Windows hold between tokens that stay; heads, neurons and layers are skipped as ever."""
    model, lent = loaded(name), images(name)
    for each in [METHODS[method], *four()]:
        each.apply(model, lent)
    engine = visual_engine_of(model.network)
    assert_skipped_is_masked(name, model.network, engine, prompt(name, *BATCH))


def test_selections_compose():
    network, engine = applied(
        "qwen2_vl", METHODS["divprune"], FastV(after=2, keep=3, average=None), NeighborAttention()
    )
    gone = assert_skipped_is_masked("qwen2_vl", network, engine, prompt("qwen2_vl", *BATCH))
    assert [removal.after for removal in gone] == [0, 2]


@pytest.mark.sample(12)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_all_tokens_is_dense(name, method):
    everything = {
        "pyramid_drop": {"ratio": 1.0},
        "sparsevlm": {"keep": (1.0, 1.0), "layers": (1, 2)},
    }.get(method, {"keep": "all"})
    network, _ = applied(name, METHODS[method].model_copy(update=everything))
    call = prompt(name, *BATCH)
    dense = build(name)(**call).logits
    assert (network(**call).logits - dense)[text_of(call)].abs().max() < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_vtw_is_layer_drop_alone_and_the_removal_of_everything(name):
    call = prompt(name, *BATCH)
    network, _ = applied(name, VTW(layers=2))
    dropped, _ = applied(name, LayerDrop(layers=2))
    ours = network(**call).logits
    assert torch.equal(ours, dropped(**call).logits)
    stock = build(name)
    with masked_reference(stock, VisualPlan.dense(4), [Removal(2, call["input_ids"] == IMAGE)]):
        expected = stock(**call).logits
    assert (ours - expected)[text_of(call)].abs().max() < TOLERANCE


@pytest.mark.parametrize("method", METHODS)
def test_text_only_prompts_are_untouched(method):
    network, engine = applied("llava_llama", METHODS[method])
    call = prompt("llava_llama", [9], [4])
    assert torch.equal(network(**call).logits, build("llava_llama")(**call).logits)
    assert engine.overhead.steps == 0


@pytest.mark.parametrize("name", ["llava_llama", "internvl_qwen3"])
@pytest.mark.parametrize("method", ["fastv", "visionzip", "sparsevlm"])
@pytest.mark.parametrize("second", [[4], [3, (5, 5), 4]])
def test_a_second_turn_goes_on_with_the_pruned_cache(name, method, second):
    network, engine = applied(name, METHODS[method])
    seen, stock, caches = record_steps(engine), build(name), (DynamicCache(), DynamicCache())
    first, then = prompt(name, [5, (5, 5), 6]), prompt(name, second, seed=1)
    network(**first, past_key_values=caches[0])
    length = caches[0].get_seq_length()
    mask = torch.ones(1, length + then["input_ids"].shape[1])
    then["attention_mask"] = mask
    gone = removals(seen, first["input_ids"].shape)
    visual = [layer.visual_keys.shape[2] for layer in caches[0].layers]
    ours = network(**then, past_key_values=caches[0]).logits
    if second == [4]:
        assert visual == [layer.visual_keys.shape[2] for layer in caches[0].layers]
        with masked_reference(stock, engine.plan, gone):
            stock(**first, past_key_values=caches[1])
            expected = stock(**then, past_key_values=caches[1]).logits
        assert (ours - expected).abs().max() < TOLERANCE
    else:
        later = [layer.visual_keys.shape[2] for layer in caches[0].layers]
        assert all(more > before for more, before in zip(later, visual, strict=True))
    assert length == first["input_ids"].shape[1]


def test_beams_follow_the_tower():
    """The tower encodes once, generate repeats its features for the beams."""
    network, engine = applied("llava_llama", METHODS["visionzip"])
    call = prompt("llava_llama", [2, (5, 5), 6], [7, (5, 5), 2, (5, 5), 3])
    seen = record_steps(engine)
    ours = network.generate(**call, max_new_tokens=5, num_beams=3, do_sample=False)
    assert torch.equal(seen[0].choice.keep_IM[0], seen[0].choice.keep_IM[1])
    network(**call)
    gone = removals(seen[-1:], call["input_ids"].shape)
    gone = [
        Removal(r.after, *(p.repeat_interleave(3, 0) for p in (r.gone_BS, r.states_BSD)))
        for r in gone
    ]
    stock = build("llava_llama")
    with masked_reference(stock, engine.plan, gone):
        expected = stock.generate(**call, max_new_tokens=5, num_beams=3, do_sample=False)
    assert torch.equal(ours, expected)


def test_dropped_keys_are_not_in_the_cache():
    network, _ = applied("llava_llama", FastV(after=2, keep=5, average=None))
    cache = network(**prompt("llava_llama", [5, (5, 5), 6])).past_key_values
    assert [layer.visual_keys.shape[2] for layer in cache.layers] == [25, 25, 5, 5]


def test_random_tokens_follow_the_seed_and_not_the_batch():
    call = prompt("qwen2_vl", *BATCH)
    model = loaded("qwen2_vl")
    RandomTokens(keep=4).apply(model, CONTEXT)
    real = call["attention_mask"][0].bool()
    whole = model.network(**call).logits[0][real]
    alone = {
        "input_ids": call["input_ids"][:1, real],
        "attention_mask": call["attention_mask"][:1, real],
        "mm_token_type_ids": call["mm_token_type_ids"][:1, real],
        "pixel_values": call["pixel_values"][: 4 * 12],
        "image_grid_thw": call["image_grid_thw"][:1],
    }
    again = model.network(**alone).logits[0]
    where = alone["input_ids"][0] != IMAGE
    assert (whole - again)[where].abs().max() < TOLERANCE


@pytest.mark.sample(6)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llava_llama", "qwen3_vl"])
def test_half_precision_keeps_as_many_tokens(name, method):
    network, engine = applied(name, METHODS[method])
    seen, call = record_steps(engine), prompt(name, *BATCH)
    network.to(torch.bfloat16)
    call["pixel_values"] = call["pixel_values"].bfloat16()
    logits = network(**call).logits
    assert logits.dtype == torch.bfloat16 and logits[text_of(call)].isfinite().all()
    for each in seen:
        quota = next(s.quota for s in engine.plan.steps if s.after == each.after)
        counts = zip(each.inputs.initial_counts, each.inputs.frames.counts, strict=True)
        assert each.choice.keep_IM.sum(1).tolist() == [quota.left(n, m) for n, m in counts]
