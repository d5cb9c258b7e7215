"""Every shipped benchmark composes, and the ones that need no network run a step."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import conf
from bench.data.synthetic.world import TASKS
from bench.evaluation import BenchmarkConfig, evaluate, plan

NAMES = sorted(p.stem for p in (Path(conf.__file__).parent / "benchmark").glob("*.yaml"))
MICRO = [name for name in NAMES if name.endswith("micro")]
HARNESSES = {"lm_eval": ("mmlu", "gsm8k"), "lmms_eval": ("mmstar", "chartqa")}


def composed(*overrides):
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        plain = OmegaConf.to_container(compose(overrides=list(overrides)), resolve=True)
    return BenchmarkConfig(**plain["benchmark"])


@pytest.mark.parametrize("name", sorted({*NAMES} - HARNESSES.keys()))
def test_it_composes_under_its_own_name(name):
    benchmark = composed(f"+benchmark={name}")
    assert benchmark.name == name
    assert set(benchmark.metrics) == set(benchmark.tasks)
    assert benchmark.tasks or benchmark.perplexity or benchmark.harness == "images"


@pytest.mark.parametrize("name", HARNESSES)
def test_a_harness_takes_any_of_its_tasks_and_is_named_by_them(name):
    tasks = HARNESSES[name]
    benchmark = composed(f"+benchmark={name}", f"benchmark.tasks=[{','.join(tasks)}]")
    assert (benchmark.name, benchmark.tasks) == (f"{name}:{'+'.join(tasks)}", tasks)
    open_keys = [f"benchmark.data={{{tasks[0]}:x}}", "benchmark.gen_kwargs={until:[x]}"]
    changed = composed(f"+benchmark={name}", f"benchmark.tasks=[{','.join(tasks)}]", *open_keys)
    assert changed.data == {tasks[0]: "x"} and changed.gen_kwargs == {"until": ["x"]}


@pytest.mark.parametrize("name", ["nine_tasks", "nine_tasks_micro", "camera", "camera_micro"])
def test_the_nine_tasks_are_nine(name):
    assert set(composed(f"+benchmark={name}").tasks) == set(TASKS)


@pytest.mark.parametrize(
    "name", [name for name in MICRO if name.startswith(("nine", "perp", "cam"))]
)
def test_what_ships_runs_a_step_without_a_network(name, model):
    benchmark = composed(f"+benchmark={name}", "benchmark.limit=1")
    metrics = evaluate(model, plan(benchmark, offline=True)).metrics
    shown = {metric.task for metric in metrics if metric.headline}
    averaged = {"average"} if benchmark.tasks else set()
    assert shown == {*benchmark.tasks, *benchmark.perplexity} | averaged


def test_a_local_file_is_a_plain_override():
    benchmark = composed("+benchmark=nine_tasks", "benchmark.data.arc_easy=x.parquet")
    assert benchmark.data == {"arc_easy": "x.parquet"}
