"""Scoring the six real tasks as a whole process, start-up included, against the `lm_eval` command.

Needs SLIMBENCH_REAL_TASKS=FOLDER and the checkpoint of `make test-real`. A word is the number of
documents of each task (`real_scoring:200`); lm-eval runs at the fastest of its batch sizes, which
are tried first on an eighth of the documents.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.models.source import resolve_model
from bench.schema import ModelConfig
from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times
from tests.performance.start_up import write_definition
from tests.real import checkpoint

DOCUMENTS, ROUNDS, BATCH_SIZES = 40, 2, (1, 4, 16, 64)
DEFINITIONS = {
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "piqa": ("piqa/piqa.yaml", "validation"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "test"),
    "boolq": ("super_glue/boolq/default.yaml", "validation"),
    "rte": ("glue/rte/default.yaml", "validation"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
}
"""Per task its file in lm-eval, and the split that is evaluated."""


def figures(*words: str) -> list[Figure]:
    """Seconds of `bench run` over those of `lm_eval`, whole processes in turn."""
    data = os.environ.get("SLIMBENCH_REAL_TASKS")
    if not data:
        raise SystemExit("real_scoring: SLIMBENCH_REAL_TASKS names no folder of real tasks")
    documents = int(words[0]) if words else DOCUMENTS
    config = ModelConfig(
        name="smol", source="local", path=str(checkpoint.fetch()), dtype="float32", device="cpu"
    )
    model = resolve_model(config, offline=True).folder
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task, (file, split) in DEFINITIONS.items():
            local = Path(data).absolute() / f"{task}.parquet"
            write_definition(folder, file, f"timed_{task}", split, local)

        def theirs(batch: int, limit: int) -> None:
            _run(_lm_eval(folder, model, batch, limit))

        def ours() -> None:
            _run(_bench(folder, model, documents))

        tried = {
            batch: _seconds(lambda b=batch: theirs(b, documents // 8)) for batch in BATCH_SIZES
        }
        best = min(tried, key=tried.__getitem__)
        took = times([lambda: theirs(best, documents), ours], ROUNDS, warm_up=False)
    value, middle = ratio(took[1], took[0])
    how = (
        f"{documents} documents of each task, bench {min(took[1]):.0f} s, lm_eval "
        f"{min(took[0]):.0f} s at its best batch size of {BATCH_SIZES}, {best}; minima of "
        f"{ROUNDS}, ratio of the medians {middle:.2f}"
    )
    return [Figure("six real tasks, bench / lm_eval", value, "<= 0.35", value <= 0.35, how)]


def _lm_eval(folder: Path, model: Path, batch: int, limit: int) -> list[str]:
    tasks = ",".join(f"timed_{task}" for task in DEFINITIONS)
    return [
        "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32",
        "--device", "cpu", "--tasks", tasks, "--include_path", str(folder),
        "--batch_size", str(batch), "--limit", str(limit),
    ]  # fmt: skip


def _bench(folder: Path, model: Path, limit: int) -> list[str]:
    return [
        "bench", "run", "model=local", f"model.path={model}", "model.dtype=float32",
        "model.device=cpu", "benchmark=real_six", "~benchmark.perplexity",
        f"benchmark.limit={limit}", "costs.measure=[]", "tracker=none", "offline=true",
        "force=true", f"results_dir={folder}/results",
    ]  # fmt: skip


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _run(command: Sequence[str]) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", *command],
        capture_output=True, text=True, check=False, env=os.environ | offline,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr[-2000:]}")
