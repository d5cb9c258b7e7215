"""A tokenizer that does not fit its network is refused by one sentence, before any weight."""

import copy

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from bench.errors import UserError
from bench.evaluation import BenchmarkConfig, plan
from bench.models.loading import check_tokenizer
from bench.models.network import learned_positions
from bench.schema import ModelConfig

SIZE = 20
SMALL = {"num_attention_heads": 2, "hidden_size": 8, "num_hidden_layers": 1}


def tokenizer(**named):
    words = {f"w{number}": number for number in range(SIZE)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")),
        **{"bos_token": "w1", "eos_token": "w2", **named},
    )


def network(kind="llama", rows=SIZE, positions=64):
    settings = {"vocab_size": rows, "max_position_embeddings": positions}
    with torch.device("meta"):
        if kind == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(n_embd=8, n_head=2, n_layer=1, n_positions=positions, vocab_size=rows)
            )
        if kind == "opt":
            return OPTForCausalLM(OPTConfig(**SMALL, **settings, ffn_dim=8, word_embed_proj_dim=8))
        return LlamaForCausalLM(LlamaConfig(**SMALL, **settings, intermediate_size=8))


def config(**settings):
    return ModelConfig(name="m", source="local", path="m", **settings)


def test_a_tokenizer_that_fits_is_accepted():
    for kind in ("llama", "gpt2", "opt"):
        check_tokenizer(config(), tokenizer(), network(kind))
        check_tokenizer(config(), tokenizer(), network(kind, rows=SIZE + 12))


@pytest.mark.parametrize("add", ["word", "end", "many"])
def test_ids_beyond_the_embedding_are_refused(add):
    made = tokenizer(**({"eos_token": "<end>"} if add == "end" else {}))
    if add == "word":
        made.add_tokens(["extra"])
    if add == "many":
        made.add_tokens([f"extra{number}" for number in range(9)])
    last = SIZE + 8 if add == "many" else SIZE
    with pytest.raises(UserError, match=rf"model m has ids up to {last}, .*embeddings for {SIZE}"):
        check_tokenizer(config(), made, network())


def test_a_padding_token_without_an_embedding_is_common_and_accepted():
    check_tokenizer(config(), tokenizer(pad_token="<pad>"), network())


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_learned_positions_bound_the_length(kind):
    assert learned_positions(network(kind)) == 64
    check_tokenizer(config(max_length=64), tokenizer(), network(kind))
    with pytest.raises(UserError, match=r"model\.max_length=65: model m has learned positions"):
        check_tokenizer(config(max_length=65), tokenizer(), network(kind))


def test_computed_positions_bound_nothing():
    assert learned_positions(network()) is None
    check_tokenizer(config(max_length=4096), tokenizer(), network())


def harness(**settings):
    return plan(BenchmarkConfig(name="b", suite="micro", **settings), offline=True).harness


@pytest.fixture(scope="module")
def questions():
    return harness(tasks=("arc_easy",), limit=2)


@pytest.fixture(scope="module")
def generating(questions):
    made = copy.copy(questions.tasks[0].tasks["arc_easy"])
    made.OUTPUT_TYPE = "generate_until"
    made._config = copy.copy(made.config)
    made._config.generation_kwargs = {"max_gen_toks": 40, "until": ["\n"]}
    changed = copy.copy(questions)
    object.__setattr__(changed, "tasks", (copy.copy(questions.tasks[0]),))
    object.__setattr__(changed.tasks[0], "tasks", {"arc_easy": made})
    return changed


def test_neither_bos_nor_eos_leaves_nothing_for_an_empty_context(questions):
    with pytest.raises(UserError, match="neither an end-of-text nor a BOS token"):
        questions.check_network(config(), network(), tokenizer(bos_token=None, eos_token=None))
    questions.check_network(config(), network(), tokenizer(bos_token=None))
    questions.check_network(config(), network(), tokenizer(eos_token=None))


def test_generation_needs_an_end_and_room(generating):
    generating.check_network(config(), network(), tokenizer())
    with pytest.raises(UserError, match="no end-of-text token, at which the answers of task"):
        generating.check_network(config(), network(), tokenizer(eos_token=None))
    with pytest.raises(UserError, match=r"task arc_easy: .*generates 40 tokens.*takes 40"):
        generating.check_network(config(max_length=40), network(), tokenizer())


def test_windows_longer_than_the_model_are_refused():
    texts = harness(perplexity={"e": {"text": "english", "window": 65}})
    with pytest.raises(UserError, match=r"benchmark\.perplexity\.e\.window=65"):
        texts.check_network(config(), network(), tokenizer(bos_token=None, eos_token=None))
    texts.check_network(config(max_length=65), network(), tokenizer())
