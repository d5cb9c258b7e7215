"""generate() with a split cache: turns, beams, samples, text-only prompts, what is refused."""

import copy

import pytest
import torch
from transformers import DynamicCache

from bench.errors import UserError
from bench.measurement.model_size import kv_cache_bytes
from methods.visual_engine.cost.closed_form import PromptLengths
from methods.visual_engine.cost.flops import decoder_shape, layer_costs
from methods.visual_engine.decoder import visual_engine_of
from tests.methods.visual_engine.cache_sizes import expected_cache_bytes
from tests.methods.visual_engine.masked_reference import masked_reference
from tests.methods.visual_engine.test_visual_equality import BATCH, assert_equal, planned
from tests.methods.visual_engine.tiny_mllms import ARCHITECTURES, build, prompt

NAMES = ["llava_llama", "internvl_qwen3_moe", "qwen2_vl"]


@pytest.mark.parametrize("name", NAMES)
def test_text_only_prompts_are_untouched(name):
    network, stock, _ = planned(name)
    call = prompt(name, [9], [4])
    assert torch.equal(network(**call).logits, stock(**call).logits)
    assert torch.equal(
        network.generate(**call, max_new_tokens=5, do_sample=False),
        stock.generate(**call, max_new_tokens=5, do_sample=False),
    )


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sampling_draws_the_same_tokens(name):
    network, stock, plan = planned(name)
    call = prompt(name, *BATCH)
    torch.manual_seed(5)
    ours = network.generate(**call, max_new_tokens=6, do_sample=True)
    with masked_reference(stock, plan):
        torch.manual_seed(5)
        expected = stock.generate(**call, max_new_tokens=6, do_sample=True)
    assert torch.equal(ours, expected)


def test_beams_follow_their_cache():
    network, stock, plan = planned("llava_llama")
    call = prompt("llava_llama", [5, (5, 5), 6])
    ours = network.generate(**call, max_new_tokens=6, num_beams=3, do_sample=False)
    with masked_reference(stock, plan):
        expected = stock.generate(**call, max_new_tokens=6, num_beams=3, do_sample=False)
    assert torch.equal(ours, expected)


@pytest.mark.sample(4)
@pytest.mark.parametrize("window", [True, False])
@pytest.mark.parametrize(
    "turns",
    [
        ([5, (5, 5), 6], [4], [3]),
        ([4], [2, (5, 5), 3], [5, (5, 5), 2]),
        ([(5, 5)], [3], [(5, 5)], [1]),
    ],
)
@pytest.mark.parametrize("name", ["llava_llama", "internvl_qwen3_moe"])
def test_turns_go_on_from_the_cache(name, turns, window):
    """Later calls bring only what is new: text, another image, or both."""
    settings = {} if window else {"window": None}
    network, stock, plan = planned(name, **settings)
    caches = DynamicCache(), DynamicCache()
    with torch.no_grad(), masked_reference(stock, plan):
        for number, row in enumerate(turns):
            call = prompt(name, row, seed=number)
            past = caches[0].get_seq_length()
            call["attention_mask"] = torch.ones(1, past + call["input_ids"].shape[1])
            ours = network(**call, past_key_values=caches[0]).logits
            expected = stock(**call, past_key_values=caches[1]).logits
            text = call["input_ids"] != 60
            assert not text.any() or (ours - expected)[text].abs().max() < 1e-5
            assert caches[0].get_seq_length() == caches[1].get_seq_length()


def test_generate_continues_a_conversation():
    network, stock, plan = planned("llava_llama")
    first = prompt("llava_llama", [5, (5, 5), 6])
    answers = []
    for net in (network, stock):
        cache = DynamicCache()
        with masked_reference(stock, plan):
            told = net.generate(**first, past_key_values=cache, max_new_tokens=4, do_sample=False)
            more = torch.cat([told, torch.tensor([[7, 8, 9]])], dim=1)
            answers.append(
                net.generate(more, past_key_values=cache, max_new_tokens=4, do_sample=False)
            )
    assert torch.equal(*answers)


def test_without_a_cache():
    network, _stock, _plan = planned("qwen2_vl")
    call = prompt("qwen2_vl", *BATCH)
    with_cache = network(**call, use_cache=True).logits
    without = network(**call, use_cache=False)
    assert without.past_key_values is None
    assert (without.logits - with_cache).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["llava_llama", "internvl_qwen2"])
def test_cache_holds_what_arithmetic_says(name):
    network, _, _plan = planned(name)
    call = prompt(name, [5, (5, 5), 6])
    cache = network(**call, use_cache=True).past_key_values
    engine = visual_engine_of(network)
    visual = int((call["input_ids"] == 60).sum())
    lengths = PromptLengths(visual, 5, 11, visual)
    assert kv_cache_bytes(cache) == expected_cache_bytes(
        decoder_shape(engine), layer_costs(engine), lengths, 4
    )


def test_cropping_forgets_text_and_never_images():
    network, _stock, _plan = planned("llava_llama")
    call = prompt("llava_llama", [5, (5, 5), 6])
    cache = DynamicCache()
    network(**call, past_key_values=cache)
    longer = copy.deepcopy(cache)
    step = {"attention_mask": torch.ones(1, 37)}
    expected = network(torch.tensor([[7]]), past_key_values=cache, **step).logits
    step = {"attention_mask": torch.ones(1, 38)}
    network(torch.tensor([[9, 8]]), past_key_values=longer, **step)
    longer.crop(-2)
    step = {"attention_mask": torch.ones(1, 37)}
    again = network(torch.tensor([[7]]), past_key_values=longer, **step).logits
    assert torch.allclose(again, expected, atol=1e-6)
    with pytest.raises(UserError, match="the range contains an image"):
        longer.crop(-20)


def test_other_caches_are_refused():
    network, _, _ = planned("llava_llama")
    call = prompt("llava_llama", [5, (5, 5), 6])
    with pytest.raises(UserError, match="DynamicCache"):
        network.generate(**call, max_new_tokens=2, cache_implementation="static")


def test_an_image_may_not_be_cut_into_chunks():
    network, _, _ = planned("qwen2_vl")
    call = prompt("qwen2_vl", [5, (3, 4), 6])
    with pytest.raises(UserError, match="one chunk"):
        network.generate(**call, max_new_tokens=2, prefill_chunk_size=8)


def test_dense_plan_computes_what_transformers_does():
    network, stock, plan = planned("internvl_qwen3", heads=False, neurons=False, window=None, cut=4)
    call = prompt("internvl_qwen3", *BATCH)
    assert_equal(network, stock, plan, call, tokens=3)
    where = call["attention_mask"].bool() & (call["input_ids"] != 60)
    assert (network(**call).logits - stock(**call).logits)[where].abs().max() < 1e-5


def test_building_is_repeatable():
    assert torch.equal(build("llava_llama").lm_head.weight, build("llava_llama").lm_head.weight)
