"""One model on one planned benchmark: metrics, sample rows, and that they are of this model."""

import importlib
import json
import math
import os
from dataclasses import replace

import pytest
import torch
from lm_eval.api.instance import Instance

from bench.errors import UserError
from bench.evaluation import BenchmarkConfig, PerplexityConfig, PlanCache, evaluate, plan
from bench.evaluation.metrics import SAMPLE_COLUMNS, SAMPLE_METRICS
from bench.evaluation.text.adapter import LmEvalAdapter
from bench.evaluation.text.planned_tasks import PlannedTask
from bench.ui import Progress

TWO = ("arc_easy", "boolq")


def micro(**options):
    options = {"name": "micro", "suite": "micro", "tasks": TWO, "limit": 10} | options
    return plan(BenchmarkConfig(**options), offline=True)


def test_metrics_are_labelled_and_averaged(model):
    texts = {"english": PerplexityConfig(text="english", window=64)}
    planned = micro(metrics={"arc_easy": "acc_norm", "piqa": "acc"}, perplexity=texts)
    metrics = evaluate(model, planned).metrics
    assert [(m.task, m.metric, m.headline, m.split, m.n) for m in metrics] == [
        ("arc_easy", "acc", False, "test", 10),
        ("arc_easy", "acc_norm", True, "test", 10),
        ("boolq", "acc", True, "validation", 10),
        ("english", "perplexity", True, "test", 10),
        ("average", "mean", True, "mixed", 2),
    ]
    _, easy, boolq, _, average = metrics
    assert average.value == pytest.approx((easy.value + boolq.value) / 2)
    assert average.stderr == pytest.approx(math.hypot(easy.stderr, boolq.stderr) / 2)
    assert {m.benchmark for m in metrics} == {"micro"}
    assert (easy.filter, easy.shots, easy.task_version) == ("none", 0, "1.0")


def test_one_task_has_no_average(model):
    metrics = evaluate(model, micro(tasks=("boolq",))).metrics
    assert [m.task for m in metrics] == ["boolq"]


def test_samples_have_the_same_columns_for_all(model):
    texts = {"english": PerplexityConfig(text="english", window=64)}
    planned = micro(tasks=("boolq", "winogrande", "hellaswag"), limit=3, perplexity=texts)
    rows = evaluate(model, planned).samples
    assert len(rows) == 12
    assert {tuple(row) for row in rows} == {(*SAMPLE_COLUMNS, *SAMPLE_METRICS)}
    for row in rows[:9]:
        assert len(row["choices"]) == len(row["loglikelihoods"]) == len(row["greedy"]) > 1
        assert row["acc"] in (0.0, 1.0)
        assert row["prompt"]
    assert rows[-1]["choices"] == [] and rows[-1]["n_tokens"] == 63


def test_a_group_is_aggregated_by_the_harness(model):
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    planned = micro()
    group = Group("pair", aggregate_metric_list=[AggMetricConfig("acc")])
    for task in planned.harness.tasks:
        group.add(task.tasks[task.name])
    tasks = {task.name: task.tasks[task.name] for task in planned.harness.tasks}
    headlines = {"pair": ("acc", None)}
    whole = PlannedTask("pair", tasks, {"pair": group}, {}, headlines, {}, frozenset(), {})
    metrics = evaluate(
        model, replace(planned, harness=replace(planned.harness, tasks=(whole,)))
    ).metrics
    found = {(m.task, m.metric): m for m in metrics}
    pair = found["pair", "acc"]
    assert pair.value == pytest.approx(
        (found["arc_easy", "acc"].value + found["boolq", "acc"].value) / 2
    )
    assert (pair.n, pair.split, pair.task_version) == (20, "mixed", None)
    assert [m.task for m in metrics if m.headline] == ["pair"]


@pytest.mark.broad
def test_a_bootstrapped_error_is_given_without_a_word(model, tmp_path, capfd):
    file = tmp_path / "cola.jsonl"
    rows = [{"sentence": f"this is number {i}", "label": i % 2} for i in range(12)]
    file.write_text("\n".join(map(json.dumps, rows)))
    planned = plan(
        BenchmarkConfig(name="glue", tasks=("cola",), data={"cola": str(file)}), offline=True
    )
    # The metric imports it, and its first import sets variables of OpenMP.
    importlib.import_module("sklearn")
    environment = dict(os.environ)
    (metric,) = evaluate(model, planned).metrics
    assert (metric.task, metric.metric, metric.n) == ("cola", "mcc", 12)
    assert metric.stderr is not None
    assert capfd.readouterr().out == ""
    assert environment == dict(os.environ)  # the harness is told to fork nothing, for this call


def test_an_unknown_metric_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"benchmark\.metrics\.boolq 'accc': did you mean 'acc'"):
        micro(metrics={"boolq": "accc"})


def test_a_plan_can_be_used_again_and_never_answers_for_another_model(model, other_model):
    planned = micro(num_fewshot=1)
    first, other, again = (evaluate(m, planned) for m in (model, other_model, model))
    assert first == again
    for ours, theirs in zip(first.samples, other.samples, strict=True):
        assert ours["prompt_hash"] == theirs["prompt_hash"]
        assert ours["loglikelihoods"] != theirs["loglikelihoods"]


def test_a_changed_network_gives_changed_answers(model):
    changed = model.copy()
    planned = micro(tasks=("boolq",))
    before = evaluate(changed, planned)
    with torch.no_grad():
        changed.network.lm_head.weight.mul_(0.5)
    assert evaluate(changed, planned).samples != before.samples


def test_a_network_without_a_head_that_can_be_cut_gives_the_same(model):
    class Whole(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network
            self.config = network.config

        def forward(self, input_ids, use_cache=False):
            return self.network(input_ids, use_cache=use_cache)

    planned = micro()
    whole = evaluate(replace(model, network=Whole(model.network)), planned)
    for ours, theirs in zip(whole.samples, evaluate(model, planned).samples, strict=True):
        assert ours["loglikelihoods"] == pytest.approx(theirs["loglikelihoods"], abs=1e-4)


def test_an_answer_longer_than_the_context_is_no_answer(short_model):
    adapter = LmEvalAdapter(short_model, 4, Progress(quiet=True))
    asked = Instance("loglikelihood", {}, ("x", " y" * 30), 0, ("task", 5, 1))
    ((value, greedy),) = adapter.loglikelihood([asked])
    assert math.isnan(value) and not greedy
    assert "longer than the 24 tokens" in adapter.evidence.unanswered("task", 5)


def test_nothing_is_printed(model, capfd):
    evaluate(model, micro(limit=2))
    assert capfd.readouterr() == ("", "")


def test_progress_has_a_phase_per_task(model):
    progress = Progress(quiet=True)
    evaluate(model, micro(limit=2), progress)
    assert set(progress.seconds) == {"tiny0 on arc_easy", "tiny0 on boolq"}


def test_a_plan_is_reused_until_a_local_file_changes(tmp_path):
    rows = [
        {"id": str(i), "question": f"q{i}", "choices": {"text": ["a", "b"], "label": ["A", "B"]},
         "answerKey": "A"}
        for i in range(3)
    ]  # fmt: skip
    plans = PlanCache()
    file = tmp_path / "test.jsonl"
    for path in (file, tmp_path):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
        config = BenchmarkConfig(name="b", tasks=("arc_easy",), data={"arc_easy": str(path)})
        first = plans.plan(config, offline=True)
        assert plans.plan(config, offline=True) is first
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        second = plans.plan(config, offline=True)
        assert second.fingerprints != first.fingerprints
