"""Positions of what is left: kept, or renumbered as if the removed tokens had never been."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from bench.errors import UserError
from methods.token_pruning.divprune import DivPrune
from methods.token_pruning.fastv import FastV
from methods.token_pruning.pyramid_drop import PyramidDrop
from methods.visual_engine.decoder import visual_engine_of
from methods.visual_engine.forward_state import reordered_rows
from methods.visual_tokens.strategies import LayerDrop
from tests.methods.token_pruning.recorded_steps import (
    METHODS,
    applied,
    loaded,
    record_steps,
    removals,
)
from tests.methods.visual_engine.tiny_mllms import IMAGE, build, prompt

TOLERANCE = 1e-5
ORDERS = {
    "one image": [4, (5, 5), 6],
    "two images": [2, (5, 5), 3, (5, 5), 4],
    "image first": [(5, 5), 7],
}


def shortened_run(name, call, found, following=()):
    """Logits of the last rows where each layer truly has fewer rows, numbered from 0.

    `found` are the removals; `following` are ids of text after the prompt. Every layer of the stock
    network runs on what is left of the sequence, with the positions 0, 1, 2, ...
    """
    network = build(name)
    decoder = network.model.language_model
    states = []
    decoder.layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    ids = torch.cat([call["input_ids"], torch.tensor([list(following)]).long()], dim=1)
    network(input_ids=ids, pixel_values=call["pixel_values"])
    x = states[0]
    left = torch.arange(x.shape[1])
    for index, layer in enumerate(decoder.layers):
        for removal in (each for each in found if each.after == index):
            known = torch.zeros(ids.shape[1], dtype=torch.bool)
            known[: removal.gone_BS.shape[1]] = removal.gone_BS[0]
            new = removal.states_BSD[0]
            for row, place in enumerate(left.tolist()):
                if place < len(new) and not new[place].isnan().any():
                    x[0, row] = new[place]
            keep = ~known[left]
            x, left = x[:, keep], left[keep]
        places = torch.arange(len(left))[None]
        mask = create_causal_mask(
            config=decoder.config, inputs_embeds=x, attention_mask=None, past_key_values=None
        )
        x = layer(x, attention_mask=mask, position_embeddings=decoder.rotary_emb(x, places))
    return network.lm_head(decoder.norm(x))[0, -1 - len(following) :]


@pytest.mark.sample(10)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", ["divprune", "fastv", "pyramid_drop", "sparsevlm", "visionzip"])
@pytest.mark.parametrize("name", ["llava_llama", "internvl_qwen3"])
def test_renumbered_is_a_sequence_that_never_had_the_removed_tokens(name, method, order):
    renumbered = METHODS[method].model_copy(update={"positions": "renumbered"})
    network, engine = applied(name, renumbered)
    seen, call, cache = record_steps(engine), prompt(name, ORDERS[order]), DynamicCache()
    following = (7, 11, 13)
    with torch.no_grad():
        got = [network(**call, past_key_values=cache).logits[0, -1]]
        gone = removals(seen, call["input_ids"].shape)
        got += [
            network(torch.tensor([[t]]), past_key_values=cache).logits[0, -1] for t in following
        ]
        wanted = shortened_run(name, call, gone, following)
    assert (torch.stack(got) - wanted).abs().max() < TOLERANCE


def test_it_differs_from_kept_positions():
    call = prompt("llava_llama", [4, (5, 5), 6])
    logits = [
        applied("llava_llama", DivPrune(keep=5, positions=kind))[0](**call).logits[0, -1]
        for kind in ("kept", "renumbered")
    ]
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_samples_of_a_batch_close_their_own_gaps():
    method = FastV(after=1, keep=4, average=None, positions="renumbered")
    network, _ = applied("llava_llama", method)
    rows = ([3, (5, 5), 4], [2, (5, 5), 2, (5, 5), 3], [6])
    settings = {"max_new_tokens": 4, "do_sample": False}
    batch = network.generate(**prompt("llava_llama", *rows), **settings)[:, -4:]
    whole = prompt("llava_llama", *rows)
    pixels = iter(whole["pixel_values"])
    for row, parts in enumerate(rows):
        real = whole["attention_mask"][row].bool()
        images = [next(pixels) for part in parts if isinstance(part, tuple)]
        alone = {
            "input_ids": whole["input_ids"][row : row + 1, real],
            "attention_mask": torch.ones(1, int(real.sum())).long(),
        }
        alone |= {"pixel_values": torch.stack(images)} if images else {}
        assert torch.equal(network.generate(**alone, **settings)[0, -4:], batch[row])


def test_beams_and_a_cropped_cache_keep_the_gaps_closed():
    network, _ = applied("llava_llama", DivPrune(keep=4, positions="renumbered"))
    call = prompt("llava_llama", [3, (5, 5), 4])
    cache = DynamicCache()
    with torch.no_grad():
        network(**call, past_key_values=cache)
        expected = network(torch.tensor([[9]]), past_key_values=cache).logits
        cache.crop(-1)
        again = network(torch.tensor([[9]]), past_key_values=cache).logits
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(-1)
        twice = network(torch.tensor([[9], [9]]), past_key_values=cache).logits
    assert (again - expected).abs().max() < TOLERANCE
    assert (twice - expected).abs().max() < TOLERANCE
    cache.reset()
    assert all(int(closed.abs().sum()) == 0 for closed in cache.layers[0].cached_tokens.closed_B)


def test_a_second_turn_counts_on_without_gaps():
    """The reference is one prompt of both turns, in which the same tokens are removed."""
    method = FastV(after=1, keep=4, average=None, positions="renumbered")
    network, engine = applied("llava_llama", method)
    seen, cache = record_steps(engine), DynamicCache()
    first = prompt("llava_llama", [4, (5, 5), 3])
    with torch.no_grad():
        network(**first, past_key_values=cache)
        gone = removals(seen, first["input_ids"].shape)
        then = network(torch.tensor([[5, 6, 7]]), past_key_values=cache).logits[0, -1]
        wanted = shortened_run("llava_llama", first, gone, (5, 6, 7))[-1]
    assert (then - wanted).abs().max() < TOLERANCE


def test_it_composes_with_layers_that_visual_tokens_do_not_reach():
    network, _ = applied(
        "llava_llama", DivPrune(keep=4, positions="renumbered"), LayerDrop(layers=2)
    )
    logits = network(**prompt("llava_llama", [4, (5, 5), 6])).logits
    assert logits[0, -1].isfinite().all()
    assert visual_engine_of(network).plan.cut == 2


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_positions_in_rows_and_columns_are_not_renumbered(name):
    with pytest.raises(UserError, match=r"positions=renumbered: the positions of Qwen.* are rows"):
        PyramidDrop(positions="renumbered").check(loaded(name).structure)


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=12))
def test_kept_rows_are_sorted_among_themselves(rows):
    keep = torch.tensor([[kept for kept, _ in rows]])
    order = torch.tensor([[number for _, number in rows]])
    moved = reordered_rows(keep, order)[0].tolist()
    places = [place for place, (kept, _) in enumerate(rows) if kept]
    wanted = sorted(places, key=lambda place: rows[place][1])
    assert [moved[place] for place in places] == wanted
    assert all(moved[p] == p for p, (kept, _) in enumerate(rows) if not kept)


def test_text_alone_is_untouched():
    network, _ = applied("llava_llama", DivPrune(keep=5, positions="renumbered"))
    call = prompt("llava_llama", [9])
    assert IMAGE not in call["input_ids"]
    assert torch.equal(network(**call).logits, build("llava_llama")(**call).logits)
