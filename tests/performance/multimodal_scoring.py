"""How much faster six questions an image are answered than by lmms-eval's own LLaVA adapter.

It needs decord (`pip install --target FOLDER decord`, and FOLDER on PYTHONPATH). Without it our
padded backend stands in, and the figure says so: it has real batches and encodes an image once
already, which lmms-eval's adapter has not. `multimodal_scoring:gqa` measures one task.
"""

from __future__ import annotations

import importlib.util
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from bench.evaluation import BenchmarkConfig, PlannedBenchmark, evaluate, plan
from bench.models import loading, source
from bench.models.model import Model
from bench.schema import ModelConfig
from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times

IMAGES, QUESTIONS, ROUNDS, ANSWER = 2, 6, 5, 4
SIDE, PATCH = 336, 14  # LLaVA-1.5's, which make 576 visual tokens
GOAL = 4.0
TASKS = ("pope", "gqa")


def figures(*names: str) -> list[Figure]:
    """Speed-up on POPE's and on GQA's schema."""
    torch.set_num_threads(1)
    model = llava()
    with tempfile.TemporaryDirectory() as folder:
        return [_figure(model, name, Path(folder)) for name in names or TASKS]


def _figure(model: Model, name: str, folder: Path) -> Figure:
    plans = {backend: exam(name, folder, backend) for backend in ("prefix_sharing", "padded")}
    other = "our padded backend, as lmms-eval's adapter cannot be imported"
    theirs = partial(evaluate, model, plans["padded"])
    if importlib.util.find_spec("decord") is not None:
        adapter = reference(model, folder / f"{name}_model")
        other, theirs = "lmms-eval's llava_hf", partial(harness, adapter, plans["padded"])
    took = times([theirs, partial(evaluate, model, plans["prefix_sharing"])], ROUNDS)
    least, median = ratio(*took)
    size = sum(weight.numel() for weight in model.network.parameters()) / 1e6
    how = (
        f"against {other}: {min(took[0]):.2f} s and {min(took[1]):.2f} s, minima of {ROUNDS}, "
        f"medians {median:.2f}; {IMAGES} images, {QUESTIONS} questions each, answers of "
        f"{ANSWER} tokens, {size:.0f} M weights, one thread"
    )
    return Figure(f"{name}: speed-up", least, f">= {GOAL:g}", least >= GOAL, how)


def exam(name: str, folder: Path, backend: str) -> PlannedBenchmark:
    """Plan a task whose images come with six questions each, in the real data set's schema."""
    micro = BenchmarkConfig(name="e", harness="lmms_eval", suite="micro", tasks=(name,))
    (task,) = plan(micro, offline=True).harness.tasks  # type: ignore[attr-defined]
    rows = task.task.dataset[task.split]
    asked = [dict(row) for row in rows.select(range(IMAGES * QUESTIONS))]
    images = [task.task.doc_to_visual(rows[place])[0] for place in range(IMAGES)]
    for place, row in enumerate(asked):
        row["image"] = images[place // QUESTIONS]
    file = folder / f"{name}.parquet"
    features = datasets.Features({**rows.features, "image": datasets.Image()})
    datasets.Dataset.from_list(asked, features=features).to_parquet(file)
    config = BenchmarkConfig(
        name="e",
        harness="lmms_eval",
        tasks=(name,),
        data={name: str(file)},
        backend=backend,  # type: ignore[arg-type]
        batch_size=IMAGES * QUESTIONS,
    )
    planned = plan(config, offline=True)
    for each in planned.harness.tasks:  # type: ignore[attr-defined]
        each.task.config.generation_kwargs["max_new_tokens"] = ANSWER
    return planned


def llava() -> Model:
    """Return an untrained LLaVA of more than 50 million weights, with the embedded processor."""
    config = ModelConfig(
        name="llava",
        source="embedded:micro_llava",
        kind="image_text",
        device="cpu",
        dtype="float32",
    )
    model = loading.load_model(source.resolve_model(config, offline=True))
    small: Any = model.network.config
    torch.manual_seed(0)
    text = small.text_config.to_dict() | {
        "hidden_size": 640,
        "intermediate_size": 1728,
        "num_hidden_layers": 9,
        "num_attention_heads": 10,
        "num_key_value_heads": 10,
        "head_dim": 64,
        "vocab_size": 32_000,
        "max_position_embeddings": 2048,
    }
    vision = small.vision_config.to_dict() | {"image_size": SIDE, "patch_size": PATCH}
    settings = small.to_dict() | {"text_config": text, "vision_config": vision}
    settings["image_seq_length"] = (SIDE // PATCH) ** 2
    model.processor.patch_size = PATCH
    model.processor.image_processor.size = {"shortest_edge": SIDE}
    model.processor.image_processor.crop_size = {"height": SIDE, "width": SIDE}
    model.network = LlavaForConditionalGeneration(LlavaConfig(**settings))
    model.network.eval().requires_grad_(False)
    return model


def harness(adapter: Any, planned: PlannedBenchmark) -> None:
    """Let lmms-eval ask its own adapter."""
    from bench.evaluation.multimodal import lmms_eval

    for each in planned.harness.tasks:  # type: ignore[attr-defined]
        lmms_eval._run_harness(adapter, each)


def reference(model: Model, folder: Path) -> Any:
    """Return lmms-eval's own adapter around the same weights."""
    from lmms_eval.models.simple.llava_hf import LlavaHf

    model.network.save_pretrained(folder)  # type: ignore[operator]
    model.processor.save_pretrained(folder)
    adapter: Any = LlavaHf(str(folder), device="cpu", dtype="float32", device_map="cpu")
    # The harness has an adapter drop its weights after a task; this one is timed several times.
    adapter.clean = lambda: None
    return adapter
