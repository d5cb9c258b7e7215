"""Prefill of visual token strategies against dense: the same network, back end and cache.

A random LLaVA with 576 visual and 64 text tokens, image features given, so that the vision tower
does not run. Theory is the ratio of counted FLOPs of everything that runs. One precision alone is
`visual_prefill:float32` or `visual_prefill:bfloat16`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.measurement.flops.analytic import CallTokens, decoder_macs, head_macs, text_config
from bench.method import Context
from bench.models.model import Model
from bench.models.structure.model_structure import inspect_model
from bench.schema import ModelConfig
from methods.visual_engine.cost.flops import VisualFlops
from methods.visual_engine.decoder import VisualEngine, visual_engine_of
from methods.visual_engine.strategy import VisualStrategy
from methods.visual_tokens.head_pruning import HeadPruning
from methods.visual_tokens.strategies import LayerDrop, NeighborAttention, SparseFFN
from methods.visual_tokens.yopo import PaperRow, Yopo
from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times

IMAGE, SIDE, BEFORE, AFTER = 999, 24, 35, 29
THREADS = 1
PRESET_ROUNDS, ALONE_ROUNDS = 5, 3
GOALS = {torch.float32: 0.9, torch.bfloat16: 0.8}
PRESET = PaperRow(label="12%", heads=0.5, layers=0.5, neurons=0.25, window=5)
ALONE: tuple[VisualStrategy, ...] = (
    NeighborAttention(window=5),
    HeadPruning(keep=0.5, choose="random"),
    SparseFFN(keep=0.25, choose="random"),
    LayerDrop(share=0.5),
)


def figures(*precisions: str) -> Iterator[Figure]:
    """Realised share of the theoretical gain of the 12 % preset, then every strategy alone."""
    torch.set_num_threads(THREADS)
    known = {_short(dtype): dtype for dtype in GOALS}
    for name in precisions or known:
        yield _preset(known[name], GOALS[known[name]])
        yield from (_alone(strategy, known[name]) for strategy in ALONE)


def network(dtype: torch.dtype, layers: int = 16, seed: int = 0, tower_layers: int = 1) -> Any:
    """Build a random LLaVA of hidden size 1024 with a very small vision tower."""
    import transformers

    torch.manual_seed(seed)
    text = {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 4096,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": tower_layers,
        "num_attention_heads": 2,
        "image_size": 14 * SIDE,
        "patch_size": 14,
    }
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE
    )
    made = transformers.LlavaForConditionalGeneration(config)
    return made.to(dtype).eval().requires_grad_(False)


def call(dtype: torch.dtype, images: int = 1) -> dict[str, Any]:
    """Return a prompt: text, images one after the other, text; features stand for pixels."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    rng = torch.Generator().manual_seed(0)
    ids_1S = torch.randint(3, 900, (1, BEFORE + images * SIDE**2 + AFTER), generator=rng)
    ids_1S[0, BEFORE : BEFORE + images * SIDE**2] = IMAGE
    features = [torch.randn(SIDE**2, 1024, generator=rng).to(dtype) for _ in range(images)]
    return {
        "input_ids": ids_1S,
        "attention_mask": torch.ones_like(ids_1S),
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)},
        "use_cache": True,
        "logits_to_keep": 1,
    }


def prefill(net: Any, inputs: dict[str, Any]) -> Callable[[], Tensor]:
    """Return one prefill with a new cache, to be timed."""

    @torch.no_grad()
    def run() -> Tensor:
        logits: Tensor = net(**inputs).logits
        return logits

    return run


def applied(strategy: VisualStrategy, net: Any) -> VisualEngine:
    """Apply a strategy to a network and return its engine."""
    config = ModelConfig(name="random_llava", source="embedded:random_llava")
    model = Model(config, net, None, "", None, torch.device("cpu"))
    strategy.apply(model, Context(seed=1))
    return visual_engine_of(net)


@torch.no_grad()
def theory(engine: VisualEngine, images: int = 1) -> float:
    """Return the FLOPs of the network as transformers runs it over those of the engine."""
    net, inputs = engine.network, call(torch.float32, images)
    marked_BS = inputs["input_ids"] == IMAGE
    dense = decoder_macs(inspect_model(net).layers, text_config(net), CallTokens.prompt(marked_BS))
    stock = (*dense, head_macs(net, 1))
    planned = (*(VisualFlops(engine).prefill(inputs) or ()), head_macs(net, 1))
    return sum(p.macs for p in stock) / sum(p.macs for p in planned)


def _preset(dtype: torch.dtype, goal: float) -> Figure:
    """Time the 12 % preset."""
    dense = network(dtype)
    ours = copy.deepcopy(dense)
    engine = applied(Yopo(shares=PRESET, heads="random", neurons="random"), ours)
    inputs, expected = call(dtype), theory(engine)
    slow, fast = times([prefill(dense, inputs), prefill(ours, inputs)], rounds=PRESET_ROUNDS)
    gain, middle = ratio(slow, fast)
    value = gain / expected
    how = (
        f"{gain:.2f}x faster by minima of {PRESET_ROUNDS}, {middle:.2f}x by medians, "
        f"of {expected:.2f}x fewer FLOPs; dense {min(slow):.2f} s, {THREADS} thread"
    )
    name = f"yopo_12 share of theory, {_short(dtype)}"
    return Figure(name, value, f">= {goal}", value >= goal, how)


def _alone(strategy: VisualStrategy, dtype: torch.dtype) -> Figure:
    """Time one strategy; where its theory promises a gain, it must not be slower than dense."""
    dense = network(dtype)
    ours = copy.deepcopy(dense)
    expected, inputs = theory(applied(strategy, ours)), call(dtype)
    slow, fast = times([prefill(dense, inputs), prefill(ours, inputs)], rounds=ALONE_ROUNDS)
    gain, middle = ratio(slow, fast)
    how = f"minima of {ALONE_ROUNDS}; medians {middle:.2f}; theory {expected:.2f}, {THREADS} thread"
    name = f"{type(strategy).__name__} over dense, {_short(dtype)}"
    return Figure(name, gain, ">= 1", gain >= 1 or expected <= 1, how)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
