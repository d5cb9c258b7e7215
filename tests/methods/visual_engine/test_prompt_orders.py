"""The last position of a prompt is computed, whatever it is, in every order of text and images."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from bench.errors import UserError
from bench.models.vlm.visual_tokens import VisualTokens
from methods.visual_engine.decoder import visual_engine_of
from methods.visual_engine.settings import Window
from tests.methods.token_pruning.recorded_steps import METHODS, applied, record_steps, removals
from tests.methods.visual_engine.masked_reference import MaskedReference, Removal, masked_reference
from tests.methods.visual_engine.test_visual_equality import planned, text_of
from tests.methods.visual_engine.tiny_mllms import ARCHITECTURES, build, prompt

TOLERANCE = 1e-5

# Text first, last, between, none at all; one image and two, adjacent and apart, of two sizes; in a
# batch some samples end with text and some with an image.
ORDERS = {
    "image last": ([5, (3, 4)],),
    "image alone": ([(3, 4)],),
    "image first": ([(3, 4), 5],),
    "adjacent, last": ([3, (3, 4), (2, 2)],),
    "text between, last": ([2, (3, 4), 3, (2, 2)],),
    "no image": ([6],),
    "batch of orders": ([5, (3, 4)], [2, (3, 4), 3], [(2, 2), 4, (3, 2)], [7]),
    "two that end alike": ([5, (3, 4)], [5, (3, 4)]),
}
WORDS_NEEDED = {"sparsevlm", "cdpruner"}


def prompt_of(name, order):
    """Return a prompt of an order; Qwen's images always have tokens of text around them."""
    rows = ORDERS[order]
    if order.startswith("adjacent") and ARCHITECTURES[name][0].startswith("Qwen"):
        rows = ([3, (3, 4), 1, (2, 2)],)
    return prompt(name, *rows)


def text_rows_and_last(call):
    """Mark the positions whose logits may be read: text, and the last one of every sample."""
    read = text_of(call)
    read[:, -1] = True  # samples are padded on the left
    return read


def last_as_text(found: VisualTokens) -> VisualTokens:
    """Return the visual tokens of a call without those that end a sample."""
    frame_BS = found.frame_BS.clone()
    frame_BS[:, -1] = -1
    return VisualTokens(frame_BS, found.row_BS, found.column_BS, attention=found.attention)


def expected_logits(stock, plan, call, removed=()):
    """Return logits by masks; the row of an image that ends its prompt is computed as text.

    Two passes. The first one treats the last visual token as visual, which is what other rows
    attend to (a window reaches forwards as well). The second one treats it as text and gives it the
    keys and values of the first pass for all other positions.
    """
    keep, keys = MaskedReference.attention, {}

    def recording(self, module, q, k, v, *args, **kwargs):
        keys[module.layer_idx] = k, v
        return keep(self, module, q, k, v, *args, **kwargs)

    def replaying(self, module, q, k, v, *args, **kwargs):
        k, v = (
            torch.cat([old[:, :, :-1], new[:, :, -1:]], dim=2)
            for old, new in zip(keys[module.layer_idx], (k, v), strict=True)
        )
        return keep(self, module, q, k, v, *args, **kwargs)

    note = MaskedReference.note

    def note_text_last(self, module, args, kwargs):
        note(self, module, args, kwargs)
        self.tokens = last_as_text(self.tokens)

    gone = []
    for each in removed:
        hidden, states = each.gone_BS.clone(), each.states_BSD.clone()
        hidden[:, -1], states[:, -1] = False, torch.nan
        gone.append(Removal(each.after, hidden, states))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(MaskedReference, "attention", recording)
        with masked_reference(stock, plan, removed):
            logits = stock(**call).logits
        patch.setattr(MaskedReference, "attention", replaying)
        patch.setattr(MaskedReference, "note", note_text_last)
        with masked_reference(stock, plan, gone):
            logits[:, -1] = stock(**call).logits[:, -1]
    return logits


def assert_skipped_is_masked(network, stock, plan, call):
    """Assert equal logits of every row that may be read."""
    with torch.no_grad():
        ours = network(**call).logits
    wanted = expected_logits(stock, plan, call)
    assert (ours - wanted)[text_rows_and_last(call)].abs().max() < TOLERANCE


def next_positions(stock, mask_BK):
    """Return M-RoPE positions of one more token: transformers' own have the mask's length."""
    deltas_B1 = getattr(stock.model, "rope_deltas", None)
    if deltas_B1 is None:
        return {}
    place_B1 = mask_BK.sum(dim=1, keepdim=True) - 1 + deltas_B1
    return {"position_ids": place_B1[None].expand(3, -1, -1)}


def assert_continued_alike(network, stock, plan, call, removed=()):
    """Assert equal logits of tokens that follow the prompt, fed one by one to both."""
    ours, theirs = DynamicCache(), DynamicCache()
    mask = call["attention_mask"]
    with torch.no_grad(), masked_reference(stock, plan, removed):
        network(**call, past_key_values=ours)
        stock(**call, past_key_values=theirs)
        for token in (7, 11, 13):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            ids = torch.full_like(mask[:, :1], token)
            then = {"input_ids": ids, "attention_mask": mask}
            then |= next_positions(stock, mask)
            got = network(**then, past_key_values=ours).logits
            wanted = stock(**then, past_key_values=theirs).logits
            assert (got - wanted).abs().max() < TOLERANCE


@pytest.mark.sample(8)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_skipping_equals_masking_in_every_order(name, order):
    network, stock, plan = planned(name)
    call = prompt_of(name, order)
    assert_skipped_is_masked(network, stock, plan, call)
    assert_continued_alike(network, stock, plan, call)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "changes",
    [
        {"window": None},
        {"window": Window(1, causal=True)},
        {"dropped_heads": "text_only", "window": None},
        {"heads": False, "neurons": False, "window": None, "cut": 2},
        {"heads": False, "neurons": False, "window": None, "cut": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llava_mistral", "qwen3_vl"])
def test_every_setting_computes_the_last_row(name, changes):
    network, stock, plan = planned(name, **changes)
    for order in ORDERS:
        call = prompt_of(name, order)
        assert_skipped_is_masked(network, stock, plan, call)


def are_images(*parts):
    return all(isinstance(part, tuple) for part in parts)


@pytest.mark.broad
@settings(max_examples=25)
@given(
    rows=st.lists(
        st.lists(
            st.one_of(st.integers(1, 4), st.tuples(st.integers(1, 4), st.integers(1, 4))),
            min_size=1,
            max_size=5,
        ).filter(lambda row: not any(map(are_images, row, row[1:]))),
        min_size=1,
        max_size=3,
    )
)
def test_prompts_drawn_at_random(rows):
    network, stock, plan = planned("qwen2_vl")
    call = prompt("qwen2_vl", *rows)
    assert_skipped_is_masked(network, stock, plan, call)


@pytest.mark.sample(2)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llava_llama", "qwen2_vl", "qwen3_vl"])
def test_every_pruning_method_computes_the_last_row(name, method):
    network, engine = applied(name, METHODS[method])
    seen, stock = record_steps(engine), build(name)
    for order in ORDERS:
        call = prompt_of(name, order)
        seen.clear()
        if method in WORDS_NEEDED and (order.endswith(("last", "orders", "alike", "alone"))):
            with pytest.raises(UserError, match="put the question after the image"):
                network(**call)
            continue
        with torch.no_grad():
            ours = network(**call).logits
        gone = removals(seen, call["input_ids"].shape)
        wanted = expected_logits(stock, engine.plan, call, gone)
        assert (ours - wanted)[text_rows_and_last(call)].abs().max() < TOLERANCE
        assert_continued_alike(network, stock, engine.plan, call, gone)


@pytest.mark.parametrize("name", ["llava_llama", "qwen3_vl"])
def test_masked_execution_computes_the_last_row(name):
    """Without heads, whose masks differ, and with windows that reach backwards only.

    In masked execution the last row is one row: it is computed in full as a key, too.
    """
    network, stock, plan = planned(name, heads=False, cut=4, window=Window(1, causal=True))
    plan.execution = "masked"
    for order in ORDERS:
        call = prompt_of(name, order)
        assert_skipped_is_masked(network, stock, plan, call)


def test_rows_that_are_not_computed_are_not_numbers():
    network, _, _ = planned("llava_llama")
    call = prompt("llava_llama", [3, (5, 5), 2])
    with torch.no_grad():
        logits = network(**call).logits[0]
    computed = text_of(call)[0]
    assert logits[computed].isfinite().all()
    assert logits[~computed].isnan().all()


def test_fastv_of_an_image_that_ends_its_prompt_ranks_as_the_dense_attention_does():
    """With nothing skipped before, the readout row's attention is that of the last position."""
    network, engine = applied("qwen2_vl", METHODS["fastv"])
    seen, stock = record_steps(engine), build("qwen2_vl")
    call = prompt("qwen2_vl", [4, (3, 4)])
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        network(**call)
        attention = stock(**call, output_attentions=True).attentions[0][0, :, -1, 4:].mean(dim=0)
    best = attention.topk(5).indices.sort().values
    assert torch.equal(seen[0].choice.keep_IM[0].nonzero()[:, 0], best)


def test_cropping_stops_at_the_image_that_ended_a_prompt():
    network, _, _ = planned("llava_llama")
    cache = DynamicCache()
    call = prompt("llava_llama", [4, (5, 5)])
    with torch.no_grad():
        network(**call, past_key_values=cache)
        then = torch.tensor([[7, 8]])
        mask = torch.ones(1, 31, dtype=torch.int64)
        network(input_ids=then, attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 31
    with pytest.raises(UserError, match="contains an image"):
        cache.crop(-3)
    cache.crop(-2)
    assert cache.get_seq_length() == 29


def test_training_keeps_finite_gradients():
    network, _, _ = planned("llava_llama")
    call = prompt("llava_llama", [3, (5, 5), 4])
    labels = call["input_ids"].masked_fill(~text_of(call), -100)
    network.requires_grad_(True)
    logits = network(**call).logits
    loss = torch.nn.functional.cross_entropy(logits[0], labels[0], ignore_index=-100)
    loss.backward()
    assert all(w.grad.isfinite().all() for w in network.parameters() if w.grad is not None)
    assert visual_engine_of(network).plan.execution == "skip"
