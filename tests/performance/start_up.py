"""How soon the command line answers, tasks are known, and the first forward begins."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times

HELP = [sys.executable, "-P", "-m", "bench", "--help"]
STARTS = 5
UNTIL_FORWARD = """
import os, runpy, sys, torch
call = torch.nn.Module.__call__
def spy(module, *args, **kwargs):
    if type(module).__name__.endswith("ForCausalLM") and not next(module.parameters()).is_meta:
        os._exit(42)
    return call(module, *args, **kwargs)
torch.nn.Module.__call__ = spy
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
"""Runs a module as a command and leaves when a language model with weights is about to compute."""


def figures() -> list[Figure]:
    """`bench --help` in seconds; the restricted task index against lm-eval's full one."""
    took = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run(HELP, check=True, capture_output=True)
        took.append(time.perf_counter() - began)
    return [
        Figure("bench --help", min(took), "<= 0.4 s", min(took) <= 0.4, "fastest of 5 processes"),
        _index(),
        _first_forward(),
    ]


def _first_forward() -> Figure:
    """Compare `bench run` with the `lm_eval` command on the same model and documents."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours, theirs = _commands(folder)
        took = times([lambda: _until_forward(theirs), lambda: _until_forward(ours)], STARTS)
    value = ratio(took[1], took[0])[0]
    how = f"bench {min(took[1]):.1f} s, lm_eval {min(took[0]):.1f} s, minima of {STARTS} processes"
    return Figure("first forward, bench / lm_eval", value, "<= 0.5", value <= 0.5, how)


def _commands(folder: Path) -> tuple[list[str], list[str]]:
    """Write the embedded ARC documents as a file that both can read; return both commands."""
    from bench.evaluation.text import task_data
    from bench.models.embedded.micro_moe import FOLDER

    file = folder / "arc.parquet"
    task_data.embedded_splits(world="arc_easy", only="test")["test"].select(range(8)).to_parquet(
        file
    )
    write_definition(folder, "arc/arc_easy.yaml", "timed", "test", file)
    ours = ["bench", "run", "model=micro_moe", "benchmark=nine_tasks", "tracker=none"]
    ours += ["benchmark.tasks=[arc_easy]", f"benchmark.data.arc_easy={file}", "offline=true"]
    ours += [f"results_dir={folder}/results", "model.device=cpu"]
    theirs = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={FOLDER}", "--device", "cpu"]
    return ours, [*theirs, "--tasks", "timed", "--include_path", str(folder)]


def write_definition(folder: Path, file: str, task: str, split: str, data: Path) -> None:
    """Write lm-eval's own definition of a task, named `task` and read from a local file's split."""
    from bench.evaluation.text.task_index import FILES

    splits = "".join(
        f"{kind}_split: {split if kind == split else 'null'}\n"
        for kind in ("training", "validation", "test", "fewshot")
    )
    (folder / f"{task}.yaml").write_text(
        f"include: {FILES.harness_folder}/{file}\ntask: {task}\n"
        "dataset_path: parquet\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{{split}: {data}}}}}\n{splits}"
    )


def _until_forward(command: Sequence[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNTIL_FORWARD, *command], capture_output=True, text=True, check=False
    )
    if done.returncode != 42:
        raise RuntimeError(f"{command[0]} did not reach a forward: {done.stderr[-2000:]}")


def _index() -> Figure:
    from lm_eval.tasks import TaskManager

    from bench.evaluation import plan
    from bench.schema import BenchmarkConfig

    nine = BenchmarkConfig(name="b", suite="micro", tasks=("arc_easy", "boolq", "piqa"))
    full, ours = times([TaskManager, lambda: plan(nine, offline=True)], rounds=5)
    value = ratio(ours, full)[0]
    how = f"plan of three tasks {min(ours):.3f} s, TaskManager() {min(full):.2f} s, minima of 5"
    return Figure("task index / TaskManager()", value, "<= 0.1", value <= 0.1, how)
