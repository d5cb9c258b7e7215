"""FlexAttention with our block mask answers as SDPA with the additive one does.

Its kernels are for a GPU; what torch compiles for a processor is made from the same block mask.
"""

import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.evaluation.text.prefix.trees import VOCABULARY, assert_same, score, tree

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++"),
]


def network(attention):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("stem", [3, 90])
def test_it_answers_as_sdpa_does(stem):
    questions = tree(torch.Generator().manual_seed(1), 12, stem, 12, 3, 4)
    found, report = score(network("flex_attention"), questions)
    wanted, _ = score(network("sdpa"), questions)
    assert report.computed_tokens < report.padded_tokens
    assert_same(found, wanted, 1e-4)
