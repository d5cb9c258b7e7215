"""Batches that shrink when memory runs out, and the estimate of what fits."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config, LlamaConfig, MixtralConfig, Qwen2MoeConfig

from bench.errors import UserError
from bench.evaluation.batching import AdaptiveBatches, bytes_per_token
from bench.ui import Progress


def flat(batches):
    return [answer for answers in batches for answer in answers]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_a_batch_that_does_not_fit_is_halved_and_this_is_said(error):
    said = io.StringIO()
    batches = AdaptiveBatches(8, torch.device("cpu"), Progress(said))
    tried = []

    def work(batch):
        tried.append(len(batch))
        if len(batch) > 2:
            raise error
        return [item * 10 for item in batch]

    assert flat(batches.map(range(5), work)) == [0, 10, 20, 30, 40]
    assert tried == [5, 2, 2, 1]
    assert "out of memory with a batch size of 5: continuing with 2" in said.getvalue()


@settings(max_examples=25, deadline=None)  # every halving collects garbage
@given(st.lists(st.integers(), max_size=40), st.integers(1, 50), st.integers(1, 50))
def test_whatever_fits_every_item_is_answered_once_and_in_order(items, size, room):
    def work(batch):
        if len(batch) > room:
            raise torch.OutOfMemoryError("CUDA")
        return [-item for item in batch]

    batches = AdaptiveBatches(size, torch.device("cpu"), Progress(quiet=True))
    assert flat(batches.map(items, work)) == [-item for item in items]


def test_a_single_sample_that_does_not_fit_is_refused():
    def work(_):
        raise torch.OutOfMemoryError("CUDA")

    with pytest.raises(UserError, match="a single sample does not fit"):
        flat(AdaptiveBatches(1, torch.device("cpu"), Progress(quiet=True)).map([1], work))


def test_other_errors_are_not_swallowed():
    def work(_):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        flat(AdaptiveBatches(4, torch.device("cpu"), Progress(quiet=True)).map([1], work))


WIDTH, VOCABULARY, EXPERT = 64, 100, 16
MIXTURES = {
    "dense": (LlamaConfig(intermediate_size=96), 96),
    "experts of one width": (MixtralConfig(intermediate_size=96, num_experts_per_tok=2), 2 * 96),
    "experts beside dense layers": (
        Qwen2MoeConfig(
            intermediate_size=40,
            moe_intermediate_size=EXPERT,
            shared_expert_intermediate_size=24,
            num_experts_per_tok=4,
        ),
        4 * EXPERT + 24,
    ),
    "wide dense layers": (
        Qwen2MoeConfig(
            intermediate_size=400,
            moe_intermediate_size=EXPERT,
            shared_expert_intermediate_size=24,
            num_experts_per_tok=4,
        ),
        400,
    ),
    "shared experts": (
        DeepseekV3Config(
            intermediate_size=40,
            moe_intermediate_size=EXPERT,
            n_shared_experts=2,
            num_experts_per_tok=4,
        ),
        6 * EXPERT,
    ),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_token_counts_the_neurons_it_passes_in_the_widest_feed_forward(kind):
    config, neurons = MIXTURES[kind]
    config.hidden_size, config.vocab_size = WIDTH, VOCABULARY
    expected = 2 * (16 * WIDTH + 3 * neurons) + 12 * VOCABULARY
    assert bytes_per_token(config, torch.bfloat16) == expected
