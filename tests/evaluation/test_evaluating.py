"""One model on one plan: what comes back, and that it is this model's."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from bench.errors import UserError
from bench.evaluation import BenchmarkConfig, PerplexityConfig, PlanCache, evaluate, plan
from bench.evaluation.batching import AdaptiveBatches
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
    for task in planned.scoring.tasks:
        group.add(task.tasks[task.name])
    tasks = {task.name: task.tasks[task.name] for task in planned.scoring.tasks}
    whole = PlannedTask("pair", tasks, {"pair": group}, {}, ("acc", None))
    metrics = evaluate(
        model, replace(planned, scoring=replace(planned.scoring, tasks=(whole,)))
    ).metrics
    found = {(m.task, m.metric): m for m in metrics}
    pair = found["pair", "acc"]
    assert pair.value == pytest.approx(
        (found["arc_easy", "acc"].value + found["boolq", "acc"].value) / 2
    )
    assert (pair.n, pair.split, pair.task_version) == (20, "mixed", None)
    assert [m.task for m in metrics if m.headline] == ["pair"]


def test_a_bootstrapped_error_is_given_without_a_word(model, tmp_path, capfd):
    file = tmp_path / "cola.jsonl"
    rows = [{"sentence": f"this is number {i}", "label": i % 2} for i in range(12)]
    file.write_text("\n".join(map(json.dumps, rows)))
    planned = plan(
        BenchmarkConfig(name="glue", tasks=("cola",), data={"cola": str(file)}), offline=True
    )
    (metric,) = evaluate(model, planned).metrics
    assert (metric.task, metric.metric, metric.n) == ("cola", "mcc", 12)
    assert metric.stderr is not None
    assert capfd.readouterr().out == ""


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


def test_an_answer_longer_than_the_context_is_refused(short_model):
    adapter = LmEvalAdapter(short_model, 4, Progress(quiet=True))
    with pytest.raises(
        UserError, match="a continuation of 30 tokens cannot be scored: model tiny0"
    ):
        adapter._loglikelihood_tokens([(None, [1], [2] * 30)])


def flat(batches):
    return [answer for answers in batches for answer in answers]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_a_batch_that_does_not_fit_is_halved_and_this_is_said(error):
    said = io.StringIO()
    batches = AdaptiveBatches(8, torch.device("cpu"), Progress(Console(file=said)))
    tried = []

    def work(batch):
        tried.append(len(batch))
        if len(batch) > 2:
            raise error
        return [item * 10 for item in batch]

    assert flat(batches.each(range(5), work)) == [0, 10, 20, 30, 40]
    assert tried == [5, 2, 2, 1]
    assert "out of memory with a batch of 5: continuing with 2" in said.getvalue()


@settings(max_examples=25, deadline=None)  # every halving collects garbage
@given(st.lists(st.integers(), max_size=40), st.integers(1, 50), st.integers(1, 50))
def test_whatever_fits_every_item_is_answered_once_and_in_order(items, size, room):
    def work(batch):
        if len(batch) > room:
            raise torch.OutOfMemoryError("CUDA")
        return [-item for item in batch]

    batches = AdaptiveBatches(size, torch.device("cpu"), Progress(Console(file=io.StringIO())))
    assert flat(batches.each(items, work)) == [-item for item in items]


def test_a_single_sample_that_does_not_fit_is_refused():
    def work(_):
        raise torch.OutOfMemoryError("CUDA")

    with pytest.raises(UserError, match="a single sample does not fit"):
        flat(AdaptiveBatches(1, torch.device("cpu"), Progress(quiet=True)).each([1], work))


def test_other_errors_are_not_swallowed():
    def work(_):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        flat(AdaptiveBatches(4, torch.device("cpu"), Progress(quiet=True)).each([1], work))


def test_nothing_is_printed(model, capfd):
    evaluate(model, micro(limit=2))
    assert capfd.readouterr() == ("", "")


def test_progress_has_a_phase_per_task(model):
    progress = Progress(quiet=True)
    evaluate(model, micro(limit=2), progress)
    assert set(progress.seconds) == {"tiny0 on arc_easy", "tiny0 on boolq"}


def test_a_plan_is_kept_until_a_local_file_changes(tmp_path):
    rows = [
        {"id": str(i), "question": f"q{i}", "choices": {"text": ["a", "b"], "label": ["A", "B"]},
         "answerKey": "A"}
        for i in range(3)
    ]  # fmt: skip
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    asked = BenchmarkConfig(name="b", tasks=("arc_easy",), data={"arc_easy": str(file)})
    plans = PlanCache()
    first = plans.plan(asked, offline=True)
    assert plans.plan(asked, offline=True) is first
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    second = plans.plan(asked, offline=True)
    assert second.fingerprints != first.fingerprints
