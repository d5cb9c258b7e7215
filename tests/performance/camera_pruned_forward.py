"""What removed micro-experts save in time, in one MoE block of DeepSeek-MoE-16B's widths.

Shapes: T tokens, K experts a token, E experts, D d_model.

The dense block is transformers' own with its default experts implementation; the pruned ones are
copies whose experts have lost very different shares. Random weights in bfloat16, no gradients,
the contestants in turn. The theoretical gain is the share of multiply-adds that is gone, for the
experts that the tokens really go to.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from bench.models.structure.model_structure import inspect_model
from bench.models.structure.moe_block import MoEBlock
from methods.moe.micro_experts import delete_micro_experts
from methods.moe.ranking import lowest
from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times

EXPERTS, TOP_K, WIDTH, D_MODEL = 64, 6, 1408, 2048
TOKENS, ROUNDS = 4096, 5
DECODED, STEPS, DECODE_ROUNDS = (1, 2, 4, 8), 4, 7


def figures() -> list[Figure]:
    """Realised share at 50 %, no loss at 20 %, and decoding of 1 to 8 tokens."""
    torch.set_num_threads(1)
    with torch.no_grad():
        dense = network()
        half, fifth = pruned(dense, 0.5), pruned(dense, 0.2)
        return [*prefill(dense, half, fifth), *(decode(dense, small) for small in (half, fifth))]


def prefill(dense: nn.Module, half: nn.Module, fifth: nn.Module) -> list[Figure]:
    """Time the blocks on many tokens at once."""
    x_TD = torch.randn(1, TOKENS, D_MODEL, dtype=torch.bfloat16)
    blocks = [_block(part) for part in (dense, half, fifth)]
    took = times([partial(block.block, x_TD) for block in blocks], ROUNDS)
    speeds = [ratio(took[0], own)[0] for own in took[1:]]
    kept = kept_work(blocks[1], x_TD)
    share = (1 - 1 / speeds[0]) / (1 - kept)
    seconds = ", ".join(f"{min(own):.3f} s" for own in took)
    how = f"{TOKENS} tokens, dense, 50 %, 20 %: {seconds}; one thread, minima of {ROUNDS}"
    return [
        Figure("realised share of the gain at 50 %", share, ">= 0.85", share >= 0.85, how),
        Figure("dense / pruned at 20 %", speeds[1], ">= 1", speeds[1] >= 1, how),
    ]


def decode(dense: nn.Module, small: nn.Module) -> Figure:
    """Time a few tokens a step; the figure is the worst case."""
    speeds = {}
    for count in DECODED:
        steps = torch.randn(STEPS, 1, count, D_MODEL, dtype=torch.bfloat16)
        contestants = [partial(_run, _block(part).block, steps) for part in (dense, small)]
        speeds[count] = ratio(*times(contestants, DECODE_ROUNDS))[0]
    worst = min(speeds.values())
    left = sum(_block(small).widths) / EXPERTS / WIDTH
    said = ", ".join(f"{count}: {speed:.2f}" for count, speed in speeds.items())
    name = f"decode, dense / pruned at {1 - left:.0%}"
    return Figure(name, worst, ">= 1", worst >= 1, f"worst of tokens a step, {said}")


def network() -> nn.Module:
    """Return a network of one layer with such a block, as a loaded one would be."""
    config = Qwen3MoeConfig(
        vocab_size=8,
        hidden_size=D_MODEL,
        num_hidden_layers=1,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=WIDTH,
        experts_implementation="grouped_mm",
    )
    with torch.device("meta"):
        built = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    torch.manual_seed(0)
    # One random pattern over and over: drawing half a billion numbers would take longest.
    pattern = torch.empty(2**20 + 1, dtype=torch.bfloat16).uniform_(-0.05, 0.05)
    for weight in built.to_empty(device="cpu").parameters():
        for piece in weight.flatten().split(len(pattern)):
            piece.copy_(pattern[: len(piece)])
    return built.eval().requires_grad_(False)


def pruned(dense: nn.Module, share: float) -> nn.Module:
    """Return a copy without a share of its micro-experts, some experts losing all, some none."""
    small = copy.deepcopy(dense, {id(weight): weight for weight in dense.parameters()})
    block = _block(small)
    generator = torch.Generator().manual_seed(1)
    liking_E1 = torch.randn(EXPERTS, 1, generator=generator).exp()
    score_EF = liking_E1 * torch.rand(EXPERTS, WIDTH, generator=generator)
    delete_micro_experts(
        block, lowest(score_EF.flatten(), round(share * score_EF.numel())), align=8
    )
    return small


def kept_work(block: MoEBlock, x_TD: Tensor) -> float:
    """Return the share of routed multiply-adds that the block still does for these tokens."""
    index_TK = block.router(x_TD.flatten(0, -2))[2]
    width_E = torch.tensor(block.widths, dtype=torch.float64)
    return float(width_E[index_TK].mean()) / WIDTH


def _block(whole: nn.Module) -> MoEBlock:
    return inspect_model(whole).moe[0]


def _run(block: nn.Module, steps: Tensor) -> None:
    for x_TD in steps:
        block(x_TD)
