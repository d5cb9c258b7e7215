"""Prefix sharing gives the scores of each request in a forward of its own."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bench.errors import UserError
from bench.evaluation.batching import TokenBudget
from bench.evaluation.harness import BackendReport
from bench.evaluation.text.prefix import forward
from bench.evaluation.text.prefix.forward import Forward
from bench.evaluation.text.prefix.packing import PackingLimits
from bench.evaluation.text.prefix.scorer import PrefixSharingScorer
from bench.evaluation.text.requests import LoglikelihoodRequest
from bench.ui import SILENT, Progress
from tests.evaluation.text.prefix.trees import (
    CPU,
    VOCABULARY,
    assert_same,
    one_by_one,
    score,
    tree,
)

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS = {
    "llama": {},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": MOE,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "mistral": {"sliding_window": 16},
    "granite": {"logits_scaling": 4.0},
    "phi3": {"pad_token_id": 0},
    "gpt2": {},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "olmo2": {},
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


def network_of(kind, attention="sdpa"):
    if kind == "gemma2":
        attention = "eager"  # its soft cap has no SDPA
    config = CONFIG_MAPPING[kind](**SMALL, **KINDS[kind])
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def llama():
    return network_of("llama")


def drawn(seed, *shape):
    return tree(torch.Generator().manual_seed(seed), *shape)


SHORT_PREFIXES = drawn(1, 30, 3, 12, 4, 6)
WITH_LONG_PREFIX = drawn(2, 60, 90, 12, 3, 4)
LONG = drawn(3, 2, 1, 300, 3, 40)


@pytest.mark.sample(3)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_architecture_answers_the_same(kind, attention):
    window = KINDS[kind].get("sliding_window")
    network = network_of(kind, attention)
    questions = [*SHORT_PREFIXES, *WITH_LONG_PREFIX[:100], *LONG]
    found, report = score(network, questions, window=window)
    assert_same(found, one_by_one(network, questions), 1e-4)
    assert report.computed_tokens < report.padded_tokens


def test_a_long_prefix_is_computed_once(llama):
    found, report = score(llama, WITH_LONG_PREFIX)
    assert_same(found, one_by_one(llama, WITH_LONG_PREFIX), 1e-4)
    own = sum(len(set_) for set_ in _distinct(WITH_LONG_PREFIX))
    assert own <= report.computed_tokens < 1.15 * own + 90


def _distinct(questions):
    prefixes = {tuple(q.inputs[:end]) for q in questions for end in range(1, len(q.inputs) + 1)}
    return [[prefix] for prefix in prefixes]


TOKENS = st.lists(st.integers(0, 3), min_size=2, max_size=14)
ASKED = st.lists(st.tuples(TOKENS, st.integers(1, 13)), min_size=1, max_size=30)


@settings(max_examples=40)
@given(
    ASKED,
    st.sampled_from([3, 30, 2048]),
    st.sampled_from([PackingLimits(8, 20, 3), PackingLimits()]),
)
def test_any_trie_in_any_batches(llama, asked, tokens, limits):
    questions = [
        LoglikelihoodRequest(inputs[:-1], inputs[max(1, len(inputs) - count) :])
        for inputs, count in asked
    ]
    found, _ = score(llama, questions, tokens, limits=limits)
    assert_same(found, one_by_one(llama, questions))


@pytest.mark.parametrize("tokens", [1, 64, 700])
def test_answers_do_not_depend_on_the_batch(llama, tokens):
    found, _ = score(llama, SHORT_PREFIXES + WITH_LONG_PREFIX, tokens)
    whole, _ = score(llama, SHORT_PREFIXES + WITH_LONG_PREFIX, 4096)
    assert_same(found, whole, 1e-5)


def test_bfloat16_stays_within_a_hundredth_of_a_log_likelihood():
    half = network_of("llama").to(torch.bfloat16)
    found, _ = score(half, SHORT_PREFIXES)
    for ours, theirs in zip(found, one_by_one(half, SHORT_PREFIXES), strict=True):
        assert ours.value == pytest.approx(theirs.value, rel=0.01, abs=0.1)


def test_no_requests_give_no_results():
    assert score(network_of("llama"), [])[0] == []


def test_only_scored_positions_meet_the_head(llama):
    seen = []
    hook = llama.lm_head.register_forward_hook(lambda *call: seen.append(call[2].shape[1]))
    score(llama, SHORT_PREFIXES)
    hook.remove()
    asked = {
        tuple(q.inputs[: len(q.inputs) - back])
        for q in SHORT_PREFIXES
        for back in range(len(q.targets))
    }
    assert len(asked) <= sum(seen) < 1.1 * len(asked)


class Full(Forward):
    """A forward for which memory has room for so many tokens."""

    room = 0

    def __call__(self, batch, read_R, cache):
        if batch.tokens_BT.size > self.room:
            raise torch.OutOfMemoryError("CUDA")
        return super().__call__(batch, read_R, cache)


@pytest.mark.sample(2)
@pytest.mark.parametrize("room", [150, 45, 60, 300])
def test_out_of_memory_halves_the_budget_says_so_and_changes_nothing(llama, room):
    said, report = io.StringIO(), BackendReport("prefix_sharing")
    forward = Full(llama, CPU)
    forward.room = room
    budget = TokenBudget(2048, CPU, Progress(said))
    scorer = PrefixSharingScorer(forward, budget, report)
    found = dict(answer for batch in scorer.score(SHORT_PREFIXES) for answer in batch)
    whole, _ = score(llama, SHORT_PREFIXES)
    assert_same([found[number] for number in range(len(SHORT_PREFIXES))], whole)
    assert report.halved >= 1
    assert budget.tokens < 2048
    assert "out of memory with a batch size of" in said.getvalue()


def test_one_path_that_does_not_fit_is_refused(llama):
    scorer = PrefixSharingScorer(
        Full(llama, CPU), TokenBudget(64, CPU, SILENT), BackendReport("prefix_sharing")
    )
    with pytest.raises(UserError, match="a single prompt of 2 tokens does not fit"):
        list(scorer.score([LoglikelihoodRequest([1, 2], [3])]))


def test_answers_come_batch_by_batch(llama):
    scorer = PrefixSharingScorer(
        Forward(llama, CPU), TokenBudget(90, CPU, SILENT), BackendReport("prefix_sharing")
    )
    batches = list(scorer.score(SHORT_PREFIXES + WITH_LONG_PREFIX))
    assert len(batches) > 2
    assert all(batches)


def test_the_block_mask_of_flex_attention_is_the_additive_one():
    from torch.nn.attention.flex_attention import create_mask

    subtree_end_BT = torch.tensor([[6, 3, 3, 6, 5, 6], [1, 2, 3, 4, 5, 6]])
    blocks = forward.flex_block_mask(subtree_end_BT, 2)
    dense = create_mask(blocks.mask_mod, 2, None, 6, 8, device="cpu")
    additive = forward.additive_tree_mask(subtree_end_BT, 2, torch.float32)
    assert (dense == (additive == 0)).all()
    assert dense.any() and not dense.all()
