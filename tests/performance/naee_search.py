"""NAEE's exhaustive search: all subsets of experts together, against two slower ways.

A block of the embedded model's size: 16 experts, 4 per token, of which 7 go, 11,440 subsets, 2,048
tokens, one thread. One after the other is a call of the router and a product per subset; the
release runs the block for each, of which a few forwards stand for all.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from bench.models.structure.model_structure import inspect_model
from bench.models.structure.moe_block import MoEBlock
from methods.baselines.naee.block_error import BlockErrorModel
from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times

EXPERTS, DROPPED, WIDTH, D_MODEL, ROWS, LENGTH = 16, 7, 64, 128, 16, 128
FORWARDS = 9


def figures() -> list[Figure]:
    """The time of all subsets in either of the slower ways over their time together."""
    torch.set_num_threads(1)
    block, x_BLD, model = error_model()
    subsets = list(combinations(range(EXPERTS), DROPPED))
    took = times(
        [lambda: [model.error(subset) for subset in subsets], lambda: model.errors(subsets)],
        rounds=1,
        warm_up=False,
    )
    value = ratio(*took)[0]
    how = f"{len(subsets)} subsets, {took[0][0]:.1f} / {took[1][0]:.1f} s, once"
    found = [Figure("subsets one by one / together", value, ">= 5", value >= 5, how)]
    with torch.no_grad():
        (forwards,) = times([lambda: block.block(x_BLD)], rounds=FORWARDS)
    value = len(subsets) * min(forwards) / took[1][0]
    how = f"{1000 * min(forwards):.1f} ms a forward, least of {FORWARDS}, for each subset"
    found.append(Figure("forwards of the block / together", value, ">= 10", value >= 10, how))
    return found


def error_model() -> tuple[MoEBlock, Tensor, BlockErrorModel]:
    """Return a random block, its input and its error model."""
    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=D_MODEL,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=WIDTH,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    network = Qwen2MoeForCausalLM(config).eval().requires_grad_(False)
    (block,) = inspect_model(network).moe
    x_BLD = torch.randn(ROWS, LENGTH, D_MODEL)
    y_BLD = block.block(x_BLD)
    return block, x_BLD, BlockErrorModel(block, x_BLD, y_BLD, y_BLD, "dropped")
