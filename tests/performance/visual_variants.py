"""What `variant` and `positions` change on micro_llava: the tokens that stay, and answers.

`overlap` is the share of the tokens kept by the paper's variant that the release's keeps as well,
over the images of the embedded prompts, at equal budgets and kept positions. Accuracies are the
mean of six tasks. `NAME:visionzip,...` measures some methods only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from bench import schema
from bench.data import prompts
from bench.data.chat import ModelInputs
from bench.evaluation import BenchmarkConfig, plan
from bench.method import Context
from bench.models.loading import load_model
from bench.models.model import Model
from bench.models.source import resolve_model
from methods.token_pruning.base import TokenPruning
from methods.token_pruning.cdpruner import CDPruner
from methods.token_pruning.dart import DART
from methods.token_pruning.divprune import DivPrune
from methods.token_pruning.fastv import FastV
from methods.token_pruning.prumerge_plus import PruMergePlus
from methods.token_pruning.pyramid_drop import PyramidDrop
from methods.token_pruning.scope import SCOPE
from methods.token_pruning.sparsevlm import SparseVLM
from methods.token_pruning.tower.hiprune import HiPrune
from methods.token_pruning.tower.vispruner import VisPruner
from methods.token_pruning.visionzip import VisionZip
from methods.visual_engine.decoder import visual_engine_of
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import TokenPruningStep
from tests.performance.figure import Figure
from tests.performance.visual_baselines import TASKS, average, micro

# A quarter of 64 tokens, in the decoder from layer 1 or 2 of 6 on.
METHODS: dict[str, TokenPruning] = {
    "visionzip": VisionZip(keep=16),
    "prumerge_plus": PruMergePlus(keep=16),
    "dart": DART(keep=16, after=1),
    "sparsevlm": SparseVLM(layers=(1, 2, 3), keep=(0.5, 0.25, 0.125)),
    "pyramid_drop": PyramidDrop(stages=3),
    "fastv": FastV(keep=16, after=1),
    "divprune": DivPrune(keep=16),
    "cdpruner": CDPruner(keep=16),
    "scope": SCOPE(keep=16),
    "hiprune": HiPrune(keep=16),
    "vispruner": VisPruner(keep=16),
}
QUESTIONS, PROMPTS = 40, 40


def figures(*chosen: str) -> list[Figure]:
    """Measure the chosen methods, or all."""
    torch.set_num_threads(1)
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
    asked = schema.PromptsConfig(name="embedded", source="embedded", count=PROMPTS)
    calls = prompts.resolve_prompts(asked, offline=True).process(model.processor).inputs
    found, how = [], f"{QUESTIONS} questions of each of six tasks"
    for name in chosen or METHODS:
        variants = ("paper", "release") if hasattr(METHODS[name], "variant") else (None,)
        for variant in variants:
            for positions in ("kept", "renumbered"):
                own = applied(model, chosen_variant(name, variant, positions=positions))
                label = f"{name}, {variant or 'one variant'}, {positions}: accuracy, %"
                found.append(Figure(label, 100 * average(own, exam), "reported", True, how))
        if len(variants) == 2:
            ours, theirs = (kept_tokens(model, chosen_variant(name, v), calls) for v in variants)
            shared = 100 * float((ours & theirs).sum() / ours.sum())
            label = f"{name}: overlap of kept tokens, %"
            found.append(Figure(label, shared, "reported", True, f"{PROMPTS} prompts"))
    return found


def chosen_variant(name: str, variant: str | None, **changes: object) -> TokenPruning:
    """Return a method's variant; SparseVLM's release prunes after one more layer."""
    if variant is not None:
        changes["variant"] = variant
    if name == "sparsevlm" and variant == "release":
        changes["layers"] = (2, 3, 4)
    return METHODS[name].model_copy(update=changes)


def applied(model: Model, method: TokenPruning) -> Model:
    """Return a copy of the model with a method."""
    own = model.copy()
    method.apply(own, Context(seed=1))
    return own


def kept_tokens(model: Model, method: TokenPruning, calls: Sequence[ModelInputs]) -> torch.Tensor:
    """Return the marks of what the first pruning step keeps of every image."""
    own = applied(model, method)
    plan_of = visual_engine_of(own.network).plan
    first, marks = plan_of.steps[0], []

    def choose(inputs: SelectionInputs, keep_I: torch.Tensor) -> TokenSelection:
        chosen = first.choose(inputs, keep_I)
        marks.append(chosen.keep_IM)
        return chosen

    recorded: TokenPruningStep = replace(first, choose=choose)
    plan_of.steps = [recorded, *plan_of.steps[1:]]
    with torch.no_grad():
        for call in calls:
            own.network(**call)
    return torch.cat(marks)
