"""Estimates of runs: their phases, what fits, what is missing, and how good they were."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
from bench.errors import UserError
from bench.estimation import boards
from bench.estimation.accuracy import accuracy_rows, compared_phases
from bench.estimation.boards import load_hardware
from bench.estimation.estimator import Estimator
from bench.estimation.layer_timing import StepFigures
from bench.estimation.words import duration, sweep_line, time_range
from bench.models.source import describe_model
from bench.records import Cost, DenseModel, EstimatedPhase, Record
from bench.runner import execute, launch
from bench.runner.estimate import read_budget, refuse_above
from bench.runner.session import Session
from bench.schema import ModelConfig

OFFLINE = {"offline": True, "tracker": "none"}


@pytest.fixture(scope="module")
def large():
    """Qwen2-57B on a board of 40 GB, in memory and streamed; only its shapes are here."""
    arguments = {"model": "qwen2_57b_a14b", "method": "camera_p", "benchmark": "perplexity_micro"}
    maps = {"model.device_map": ["null", "offload_cpu"]}
    return bench.estimate(**arguments, **OFFLINE, over=maps, hardware="a100_40gb")


@pytest.mark.broad
def test_a_model_above_the_memory_does_not_fit_and_the_cure_is_named(large):
    whole, streamed = large.runs
    assert not whole.fits
    assert streamed.fits
    assert whole.memory > 57e9 * 2
    assert any("model.device_map=offload_cpu" in cure for cure in whole.cures)
    assert streamed.cures == ()
    assert any("published shapes" in gap for gap in whole.missing)


@pytest.mark.broad
def test_streaming_takes_link_time_and_the_flops_of_the_analysis_bound_it_below(large):
    whole, streamed = (
        next(p for p in run.phases if p.name == "applying camera_p") for run in large.runs
    )
    tokens, active, passes = 64 * 256, 13e9, 2
    peak = load_hardware("a100_40gb").rate("bfloat16")
    assert whole.low > 2 * active * tokens * passes / peak
    assert streamed.high > whole.high
    assert streamed.parts["apply"].bound_by == "host link"


@pytest.fixture(scope="module")
def small():
    return bench.estimate(
        model="micro_moe", method="gptq", benchmark="camera_micro", hardware="h200", **OFFLINE
    )


@pytest.mark.broad
def test_the_phases_are_those_of_a_run(small):
    (run,) = small.runs
    names = [phase.name for phase in run.phases]
    assert names[:2] == ["loading the model", "applying gptq"]
    assert names[2] == "micro_moe on boolq"
    assert names[-2:] == ["micro_moe on english", "counting costs"]
    assert all(0 <= phase.low <= phase.high for phase in run.phases)
    assert run.joules == (run.low * 700, run.high * 700)
    shared = {phase.name: phase.shared for phase in run.phases}
    assert shared["micro_moe on openbookqa"] > shared["micro_moe on english"] == 0
    json.dumps(small.as_json())


def test_steps_that_were_timed_take_the_place_of_those_that_are_counted(small, monkeypatch):
    timed = []

    def figures(step):
        timed.append(step)
        return StepFigures(seconds=1.0, peak_bytes=0)

    monkeypatch.setattr(Estimator, "_step_figures", lambda *_: figures)
    (found,) = bench.estimate(
        model="micro_moe", method="gptq", benchmark="camera_micro", hardware="h200", **OFFLINE
    ).runs
    rounded = sum(step.times for step in {s.key: s for s in timed if "round" in s.key}.values())
    before, after = ({p.name: p for p in run.phases} for run in (small.runs[0], found))
    applying = after["applying gptq"].parts["apply"]
    assert 0.8 * rounded <= applying.low < applying.high
    assert before["applying gptq"].parts["apply"].high < 0.8 * rounded
    # Every later call dequantizes; the dense part of it is as it was.
    assert all(after[name].low > before[name].low for name in before if " on " in name)
    assert after["counting costs"] == before["counting costs"]


def test_only_what_is_measured_is_estimated():
    """Where memory alone is measured, no round is timed."""
    found = bench.estimate(
        model="micro_moe", benchmark="perplexity_micro", hardware="h200", **OFFLINE,
        over={"costs.measure": [["memory"], ["memory", "latency"]]},
    )  # fmt: skip
    memory, timed = (
        next(p for p in run.phases if p.name == "measuring costs") for run in found.runs
    )
    assert 0 < memory.low < memory.high < timed.low
    assert timed.high < 40 * timed.low


def test_a_sweep_counts_a_run_once_and_loads_its_model_once():
    found = bench.estimate(
        model="micro_moe", benchmark="perplexity_micro", hardware="h200",
        method="camera_p", over={"ratio": [0.1, 0.2, 0.3, 0.3]}, **OFFLINE,
    )  # fmt: skip
    assert [run.state for run in found.runs] == ["new", "new", "new", "planned before"]
    assert "3 runs on h200" in sweep_line(found)
    first = replace(found, runs=found.runs[:1], whole=False)
    assert sweep_line(first).startswith("estimate: the first run on h200, ")
    assert found.high < sum(run.high for run in found.runs)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("1.5h", 5400), ("30min", 1800), ("2d", 172_800)]
)
def test_a_budget_has_a_unit(text, seconds):
    assert read_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "6", "-6h", "0s", "h", "6 parsecs", "nan h"])
def test_an_unreadable_budget_is_one_sentence(text):
    with pytest.raises(UserError, match=r"--budget .*: .* such as"):
        read_budget(text)


def test_a_sweep_above_its_budget_is_refused(small):
    with pytest.raises(UserError, match=r"--budget 1 s is too low: 1 runs take"):
        refuse_above(1.0, small)
    refuse_above(1e9, small)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.25, "0.25 s"), (90, "90 s"), (600, "10 min"), (7.2e4, "20.0 h")]
)
def test_durations_are_in_the_unit_that_a_person_takes(seconds, words):
    assert duration(seconds) == words


def test_a_range_in_one_unit_names_it_once():
    assert (time_range(3, 9), time_range(30, 600)) == ("3 to 9 s", "30 s to 10 min")


def recorded(estimate, seconds):
    costs = tuple(
        Cost(scope=f"phase {name}", quantity="wall", unit="s", value=value, how="measured")
        for name, value in seconds.items()
    )
    model = DenseModel(
        name="m", source="x", revision=None, fingerprint="0", architecture="a", parameters=1,
        bytes=4,
    )  # fmt: skip
    return Record(
        id="0" * 12, started="", finished="", sweep=None, command="", environment={}, model=model,
        config={"benchmark": {"name": "exam"}}, methods=(), metrics=(), costs=costs, provenance={},
        estimate=estimate,
    )  # fmt: skip


def test_estimates_are_held_against_measured_phases():
    phases = [("loading the model", 1.0, 4.0), ("m on a", 1.0, 2.0), ("m on b", 4.0, 8.0)]
    estimate = tuple(
        EstimatedPhase(phase=name, low=low, high=high, bound_by="Python", peak_bytes=0)
        for name, low, high in phases
    )
    record = recorded(estimate, {"loading the model": 2.0, "m on a": 4.0, "m on b": 4.0})
    assert [each.inside for each in compared_phases([record])] == [True, False, True]
    loading, scoring, everything = accuracy_rows([record])
    assert (loading["measured / middle"], loading["high / low"]) == (1.0, 4.0)
    assert (scoring["phase"], scoring["phases"], scoring["inside"]) == ("evaluating", 2, "50 %")
    assert everything["phases"] == 3
    assert scoring["measured / middle"] == pytest.approx(1.414, abs=1e-3)


@pytest.mark.parametrize(
    ("low", "high", "took", "flaw"),
    [
        (4.0, 1.0, 2.0, None),
        (0.0, 0.0, 2.0, None),
        (float("nan"), 4.0, 2.0, None),
        (1.0, float("nan"), 2.0, None),
        # Far too high, and measured as noise.
        (50.0, 90.0, 0.1, None),
        (None, None, 2.0, "not estimated"),
        (1.0, 4.0, None, "not measured"),
    ],
)
def test_a_wrong_or_absent_bound_counts_as_outside(low, high, took, flaw):
    good = EstimatedPhase(phase="m on a", low=1, high=4, bound_by="Python", peak_bytes=0)
    estimate = [good]
    if low is not None:
        estimate.append(good.model_copy(update={"phase": "applying x", "low": low, "high": high}))
    seconds = {"m on a": 2.0, "observing experts": 9.0, "training on digits": 9.0}
    record = recorded(tuple(estimate), seconds | ({} if took is None else {"applying x": took}))
    rows = {row["phase"]: row for row in accuracy_rows([record])}
    assert set(rows) == {"evaluating", "applying x", "all"}
    assert (rows["applying x"]["inside"], rows["all"]["inside"]) == ("0 %", "50 %")
    assert rows["applying x"]["high / low"] is None or low in (1.0, 50.0)
    for column in ("not estimated", "not measured"):
        assert rows["applying x"][column] == (column == flaw)


@pytest.mark.parametrize(
    ("processes", "held", "kept"),
    [(1, False, ["loading the model", "m on a"]), (1, True, ["m on a"]), (2, False, [])],
)
def test_a_record_keeps_what_its_times_can_be_held_against(processes, held, kept):
    phases = tuple(
        EstimatedPhase(phase=name, low=1, high=2, bound_by="Python", peak_bytes=0)
        for name in ("loading the model", "m on a")
    )
    found = SimpleNamespace(recorded_phases=lambda: phases)
    session = SimpleNamespace(
        estimator=SimpleNamespace(estimate=lambda *_: found),
        process_group=SimpleNamespace(world_size=processes),
        base_model=SimpleNamespace(peek=lambda _: object() if held else None),
    )
    inputs = SimpleNamespace(source=None, benchmark=None)
    assert [each.phase for each in execute._estimate(None, inputs, session)] == kept


def test_the_rates_are_those_of_the_threads_in_use(monkeypatch):
    board = load_hardware("h200").model_copy(update={"name": "here"})
    threads = torch.get_num_threads()
    monkeypatch.setitem(boards._known, boards._file("rates"), board)
    session = Session()
    try:
        assert session.estimator.hardware == board
        torch.set_num_threads(threads + 1)
        assert session.estimator is None
    finally:
        torch.set_num_threads(threads)
    assert session.estimator.hardware == board


@pytest.mark.parametrize(("whole", "said"), [(True, 1), (False, 0)])
def test_an_estimate_that_stopped_before_the_first_new_run_is_not_shown(monkeypatch, whole, said):
    shown = []
    recorded = SimpleNamespace(state="recorded")
    found = SimpleNamespace(whole=whole, runs=(recorded,), to_do=())
    monkeypatch.setattr("bench.runner.estimate.estimate_configs", lambda *_, **__: found)
    monkeypatch.setattr("bench.config.sweep_checks.every_config", lambda *_: iter(()))
    monkeypatch.setattr("bench.estimation.words.sweep_line", lambda _: "estimate: 0 runs")
    monkeypatch.setattr(launch, "note", shown.append)
    monkeypatch.setattr(launch, "says_notes", lambda: True)
    session = SimpleNamespace(estimator=object())
    launch._announce(None, SimpleNamespace(is_sweep=True), session, None)
    assert len(shown) == said


def test_a_run_without_an_estimate_says_nothing():
    assert accuracy_rows([recorded((), {"m on a": 9.0, "counting costs": 9.0})]) == []


def test_a_config_without_weights_describes_a_model(tmp_path):
    shapes = Path(bench.__path__[0]) / "models" / "shapes" / "deepseek-ai--deepseek-moe-16b-base"
    config = ModelConfig(name="local", source="local", path=str(shapes))
    source, download, note = describe_model(config, offline=True)
    assert (source.fingerprint, download, note) == ("", 0.0, "no weights are there")
    with pytest.raises(UserError):
        describe_model(config.model_copy(update={"path": str(tmp_path)}), offline=True)
    with pytest.raises(UserError, match="unknown"):
        describe_model(ModelConfig(name="x", source="embedded:none"), offline=True)


@pytest.mark.broad
def test_a_training_in_bfloat16_is_estimated_at_the_rate_of_its_products():
    words = {"model": "resnet18", "model.images": "digits", "method": "train"}
    estimate = bench.estimate(
        **words,
        **OFFLINE,
        benchmark="images",
        over={"recipe.dtype": ["float32", "bfloat16"]},
        hardware="h200",
    )
    full, rounded = (
        next(p for p in run.phases if p.name == "applying train") for run in estimate.runs
    )
    assert rounded.high < full.high
