"""Untrained networks of a hundred million weights and a tokenizer made from given texts.

What is timed does not depend on the values of weights, but on the size of the vocabulary, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2MoeConfig

from bench.models.model import Model
from bench.schema import ModelConfig

VOCABULARY = 50_304
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}
CONFIGS = {
    "dense": lambda: LlamaConfig(**COMMON, intermediate_size=1408, num_hidden_layers=16),
    "moe": lambda: Qwen2MoeConfig(
        **COMMON,
        num_hidden_layers=5,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=352,
        shared_expert_intermediate_size=704,
    ),
}


def tokenizer(texts: Iterable[str]) -> Any:
    """Return a byte-level BPE with as many merges as the texts give, at most 32000 words."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, 32_000, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|end|>")


def build(kind: str, words: Any) -> Model:
    """Return the `dense` or the `moe` network, in float32 on the CPU."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval().requires_grad_(False)
    config = ModelConfig(name=kind, source="embedded:random")
    return Model(config, network, words, "random", None, torch.device("cpu"))
