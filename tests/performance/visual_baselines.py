"""FastV and VisionZip beside the presets: prefill on 576 visual tokens, answers at equal FLOPs.

Time: a random LLaVA whose vision tower runs for all contestants, 64 and 128 tokens kept, the two
presets as the paper has them; each figure is the dense prefill's time over the contestant's.
Answers: micro_llava keeps the same shares of its 64 tokens, and beside each of these runs stands a
preset that was searched for a budget of just its visual FLOPs. The value is the difference in
average accuracy; which is better is not a goal but a finding, so every figure is `reported`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from bench import schema
from bench.data import prompts
from bench.evaluation import BenchmarkConfig, evaluate, plan
from bench.evaluation.benchmark import PlannedBenchmark
from bench.method import Context
from bench.models.loading import load_model
from bench.models.model import Model
from bench.models.source import resolve_model
from bench.schema import ModelConfig
from methods.token_pruning.base import TokenPruning
from methods.token_pruning.fastv import FastV
from methods.token_pruning.visionzip import VisionZip
from methods.visual_engine.cost.closed_form import PromptLengths, mean_neighbours, visual_share
from methods.visual_engine.cost.flops import decoder_shape, layer_costs
from methods.visual_engine.decoder import visual_engine_of
from methods.visual_engine.strategy import VisualStrategy
from methods.visual_tokens.yopo import PaperRow, Yopo
from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times
from tests.performance.visual_kv import PRESETS
from tests.performance.visual_prefill import (
    AFTER,
    BEFORE,
    IMAGE,
    SIDE,
    THREADS,
    applied,
    network,
    prefill,
    theory,
)

KEPT = (64, 128)
ROUNDS, QUESTIONS = 5, 60
TASKS = ("gqa", "vqav2_val", "scienceqa_img", "textvqa_val", "pope", "mmbench_en_dev_static")
WINDOWED = PaperRow(label="budget", heads=1.0, layers=1.0, neurons=1.0, window=5)


def figures() -> list[Figure]:
    """Prefill of all contestants in turn, then accuracy at equal visual FLOPs."""
    torch.set_num_threads(THREADS)
    return [*timed(), *scored()]


def pruning(kept: int, of: int = SIDE**2) -> dict[str, TokenPruning]:
    """Return both baselines; where there are fewer tokens the same share is kept."""
    amount = max(1, round(kept * of / SIDE**2))
    return {
        "fastv": FastV(after=2, keep=amount, average=None),
        "visionzip": VisionZip(keep=amount),
    }


def timed() -> list[Figure]:
    """Time every contestant in turn with the dense network."""
    dense = network(torch.float32, tower_layers=3)
    contestants: dict[str, VisualStrategy] = {
        f"{name} {kept}": method for kept in KEPT for name, method in pruning(kept).items()
    }
    for name, row in PRESETS.items():
        contestants[name] = Yopo(shares=row, heads="random", neurons="random")
    inputs, nets, expected = with_pixels(), [dense], []
    for method in contestants.values():
        own = copy.deepcopy(dense)
        expected.append(theory(applied(method, own)))
        nets.append(own)
    slow, *fast = times([prefill(net, inputs) for net in nets], rounds=ROUNDS)
    found = []
    for name, took, fewer in zip(contestants, fast, expected, strict=True):
        gain, middle = ratio(slow, took)
        how = f"medians {middle:.2f}; {fewer:.2f}x fewer FLOPs in the decoder, {THREADS} thread"
        found.append(Figure(f"dense / {name}, 576 visual tokens", gain, "reported", True, how))
    return found


def with_pixels() -> dict[str, Any]:
    """Return a prompt whose image the vision tower has to look at."""
    rng = torch.Generator().manual_seed(0)
    ids_1S = torch.randint(3, 900, (1, BEFORE + SIDE**2 + AFTER), generator=rng)
    ids_1S[0, BEFORE : BEFORE + SIDE**2] = IMAGE
    return {
        "input_ids": ids_1S,
        "attention_mask": torch.ones_like(ids_1S),
        "pixel_values": torch.randn(1, 3, 14 * SIDE, 14 * SIDE, generator=rng),
        "use_cache": True,
        "logits_to_keep": 1,
    }


def scored() -> list[Figure]:
    """Score each baseline, and a preset of the same visual FLOPs."""
    model = load_model(resolve_model(micro(), offline=True))
    exam = plan(
        BenchmarkConfig(
            name="exam",
            harness="lmms_eval",
            suite="micro",
            tasks=TASKS,
            metrics={"pope": "pope_accuracy_mean", "mmbench_en_dev_static": "mmbench_accuracy"},
            limit=QUESTIONS,
            batch_size=32,
        ),
        offline=True,
    )
    asked = schema.PromptsConfig(name="embedded", source="embedded", count=40)
    lent = prompts.resolve_prompts(asked, offline=True).process(model.processor)
    context = Context(seed=1, prompts=lent)
    dense = average(model, exam)
    found = []
    for kept in KEPT:
        for name, method in pruning(kept, of=64).items():
            share, theirs = taken(model, method, context, exam)
            preset = Yopo(shares=WINDOWED, budget=share)
            mine, ours = taken(model, preset, context, exam)
            how = (
                f"preset {ours:.1%} at {mine:.3f} of visual FLOPs, {name} {theirs:.1%} at "
                f"{share:.3f}, dense {dense:.1%}; {QUESTIONS} questions a task"
            )
            value = 100 * (ours - theirs)
            label = f"preset - {name} at {kept}/576 of the tokens, points"
            found.append(Figure(label, value, "reported", True, how))
    return found


def micro() -> ModelConfig:
    """Return the config of the small model that ships."""
    return ModelConfig(name="micro_llava", source="embedded:micro_llava", kind="image_text")


def taken(
    model: Model, method: VisualStrategy, context: Context, exam: PlannedBenchmark
) -> tuple[float, float]:
    """Apply a method to a copy; return its share of visual FLOPs and its average accuracy."""
    own = model.copy()
    method.apply(own, context)
    engine = visual_engine_of(own.network)
    window = engine.plan.window
    seen = 64.0 if window is None else mean_neighbours(8, 8, window.radius)
    lengths = PromptLengths(64, 4, 30, seen)
    return visual_share(decoder_shape(engine), layer_costs(engine), lengths), average(own, exam)


def average(model: Model, exam: PlannedBenchmark) -> float:
    """Return the mean of the tasks' headline metrics."""
    metrics = evaluate(model, exam).metrics
    (mean,) = (metric.value for metric in metrics if metric.task == "average")
    return mean
