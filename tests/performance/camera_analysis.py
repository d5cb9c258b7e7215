"""What measuring energies costs beside the calibration forward that is needed anyway.

Shapes: B rows, L tokens a row, T tokens, E experts, D d_model, F width.

A MoE of more than 100M parameters, 64 experts, top-6, 8,192 tokens, float32, one thread. The
published algorithm's arithmetic runs every expert on every token and multiplies by a gate that is
mostly zero; it is transcribed here and timed on the same tokens: as a whole, and apart from the
forward that both need anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from bench.models.expert_hooks import observe_experts
from bench.models.layer_stream import LayerStream
from bench.models.model import Model
from bench.models.structure.model_structure import inspect_model
from bench.models.structure.moe_block import MoEBlock
from bench.schema import ModelConfig
from bench.ui import SILENT
from methods.camera.analysis import BlockEnergies
from methods.moe.calibration import NullObserver, WalkOptions, walk_blocks
from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times

LENGTH, ROWS = 256, 32
EXPERT_WIDTH = 288
HOW = WalkOptions(batch=16, chunk=4096, sequential=False)


def figures() -> list[Figure]:
    """The walk with analysis over the walk without; the published arithmetic over ours."""
    torch.set_num_threads(1)
    model = small_model()
    rows_BL = torch.randint(64, (ROWS, LENGTH), generator=torch.manual_seed(0))
    return [
        overhead(model, rows_BL),
        against_published(model, rows_BL),
        analysis_alone(model, rows_BL),
    ]


def overhead(model: Model, rows_BL: Tensor) -> Figure:
    """Time one calibration forward with and without analysis."""
    took = times([lambda: analyse(model, rows_BL), lambda: forward(model, rows_BL)], rounds=5)
    value, median = ratio(*took)
    size = f"{model.structure.parameters / 1e6:.0f}M parameters, {rows_BL.numel()} tokens"
    how = f"{size}; {min(took[0]):.2f} / {min(took[1]):.2f} s, minima of 5, by medians {median:.2f}"
    name = "forward with analysis / without"
    return Figure(name, value, "<= 1.15", value <= 1.15, how)


def against_published(model: Model, rows_BL: Tensor) -> Figure:
    """Time the published arithmetic against ours on the same tokens."""
    contestants = [lambda: published(model, rows_BL), lambda: analyse(model, rows_BL)]
    took = times(contestants, rounds=5)
    value = ratio(*took)[0]
    how = f"{rows_BL.numel()} tokens, {min(took[0]):.2f} / {min(took[1]):.2f} s, minima of 5"
    return Figure("published arithmetic / ours", value, ">= 6", value >= 6, how)


def analysis_alone(model: Model, rows_BL: Tensor) -> Figure:
    """Time both analyses without the forward, on what it computed before."""
    recorded = {block: Recorder() for block in model.structure.moe}
    with _inputs(model) as seen:
        forward(model, rows_BL)
    with observe_experts(recorded, HOW.chunk):
        forward(model, rows_BL)
    contestants = [
        lambda: published_scores(seen),
        lambda: [found.replay(block) for block, found in recorded.items()],
    ]
    took = times(contestants, rounds=5)
    value = ratio(*took)[0]
    how = f"{rows_BL.numel()} tokens, {min(took[0]):.2f} / {min(took[1]):.3f} s, minima of 5"
    return Figure("published arithmetic / ours, analysis alone", value, ">= 8", value >= 8, how)


class Recorder(NullObserver):
    """Keeps what the energies of a block are computed from."""

    def __init__(self) -> None:
        self.routed_calls: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self.outputs: list[Tensor] = []

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Keep the tokens of one expert; energies need no more of x than its length."""
        self.routed_calls.append((expert, x_SD[:, :0], hidden_SF, weight_S))

    def output(self, y_TD: Tensor) -> None:
        """Keep the block's output."""
        self.outputs.append(y_TD)

    def replay(self, block: MoEBlock) -> Tensor:
        """Compute the energies of a block."""
        found = BlockEnergies(block)
        for call in self.routed_calls:
            found.routed(*call)
        for y_TD in self.outputs:
            found.output(y_TD)
        return found.energies(0.95, normalised=False)


def small_model() -> Model:
    """A random model whose experts hold nearly all of its weights."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=6,
        moe_intermediate_size=EXPERT_WIDTH,
        max_position_embeddings=LENGTH,
    )
    torch.manual_seed(0)
    network = Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    about = ModelConfig(name="random", source="tests")
    return Model(about, network, None, "", None, torch.device("cpu"))


def analyse(model: Model, rows_BL: Tensor) -> list[Tensor]:
    """Send the rows through all layers and measure every energy on the way."""
    observed = walk_blocks(model, rows_BL, BlockEnergies, HOW, SILENT)
    return [found.energies(0.95, normalised=False) for _, found in observed]


def forward(model: Model, rows_BL: Tensor) -> None:
    """Send the rows through all layers, as calibration does without analysis."""
    layers = model.structure.layers
    with LayerStream(model.network, layers, rows_BL, HOW.batch) as stream:
        for index in range(len(layers)):
            stream.run(index, advance=True)


def published(model: Model, rows_BL: Tensor) -> list[Tensor]:
    """Do the official code's arithmetic: a forward, then every expert on every token of a block."""
    with _inputs(model) as seen:
        forward(model, rows_BL)
    return published_scores(seen)


def published_scores(seen: dict[MoEBlock, list[tuple[Tensor, ...]]]) -> list[Tensor]:
    """Score every expert of every block on every token."""
    energies = []
    for block, calls in seen.items():
        x_TD, index_TK, weight_TK = (torch.cat(parts) for parts in zip(*calls, strict=True))
        gate_TE = torch.zeros(len(x_TD), block.num_experts).scatter_(1, index_TK, weight_TK)
        for expert in range(block.num_experts):
            view = block.expert(expert)
            phi_TF = view.hidden(x_TD) * gate_TE[:, expert, None]
            peak_F, square_F = phi_TF.abs().amax(0), phi_TF.square().sum(0)
            energies.append((0.05 * square_F + 0.95 * peak_F.square()) * view.down.square().sum(0))
    return energies


@contextmanager
def _inputs(model: Model) -> Iterator[dict[MoEBlock, list[tuple[Tensor, ...]]]]:
    """Keep what the experts of every block are called with, a call for each batch of rows."""
    seen: dict[MoEBlock, list[tuple[Tensor, ...]]] = {
        b: [] for b in inspect_model(model.network).moe
    }
    handles = [
        block.experts.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args))
        for block, calls in seen.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
