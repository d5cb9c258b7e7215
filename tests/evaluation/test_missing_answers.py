"""What has no answer is counted and named, and stands in no number."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from bench.data import calibration
from bench.data.synthetic.world import documents_by_split
from bench.errors import UserError
from bench.evaluation import BenchmarkConfig, PerplexityConfig, evaluate, plan
from bench.evaluation.evidence import check_length
from bench.evaluation.metrics import (
    NO_NUMBER,
    TaskAnswers,
    aggregate_number,
    headline_average,
    settle_metrics,
    task_metric,
)
from bench.evaluation.text.adapter import LmEvalAdapter
from bench.models.model import Model
from bench.ui import SILENT

ODD = "Ω"
"""Its last token, a byte, occurs nowhere else."""
BACKENDS = ("prefix_sharing", "padded")


def with_network(model, change) -> Model:
    network = copy.deepcopy(model.network)
    with torch.no_grad():
        change(network)
    return Model(model.config, network, model.tokenizer, "changed", None, model.device)


@pytest.fixture(scope="module")
def ruined(model):
    """A model whose logits are all NaN."""
    return with_network(model, lambda network: network.lm_head.weight.fill_(math.nan))


@pytest.fixture(scope="module")
def holed(model):
    """A model that cannot read one token: the last one of the odd letter."""
    token = model.tokenizer(ODD)["input_ids"][-1]
    return with_network(
        model, lambda network: network.get_input_embeddings().weight[token].fill_(math.nan)
    )


def questions(path, count=6, odd=()):
    rows = documents_by_split("piqa")["validation"][:count]
    rows = [
        row | {"goal": f"{row['goal']} {ODD}"} if index in odd else row
        for index, row in enumerate(rows)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def local(path, **options):
    options = {
        "tasks": ("piqa",),
        "metrics": {"piqa": "acc"},
        "data": {"piqa": str(path)},
    } | options
    return plan(BenchmarkConfig(name="local", **options), offline=True)


def headline(evaluation, task="piqa"):
    return next(m for m in evaluation.metrics if m.task == task and m.headline)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ruined_model_has_no_accuracy(ruined, tmp_path, backend):
    found = evaluate(ruined, local(questions(tmp_path / "q.jsonl"), backend=backend))
    assert {(m.value, m.stderr, m.n, m.missing) for m in found.metrics} == {(None, None, 0, 6)}
    (gap,) = found.missing
    assert (gap.scope, gap.quantity) == ("piqa", "acc")
    assert gap.reason == (
        "6 of 6 rows have no answer: a log-likelihood is not finite "
        "(rows 0, 1, 2, 3, 4 and 1 more); benchmark.allow_missing=0"
    )
    assert all(row["missing"] and row["acc"] is None for row in found.samples)
    # Not even where every answer may be missing: there is nothing left to count.
    all_allowed = evaluate(ruined, local(tmp_path / "q.jsonl", backend=backend, allow_missing=1))
    assert headline(all_allowed).value is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_prompts_with_the_unreadable_token_are_missing(model, holed, tmp_path, backend):
    path = questions(tmp_path / "q.jsonl", odd=(1, 4))
    whole = evaluate(model, local(path, backend=backend)).samples
    found = evaluate(holed, local(path, backend=backend))
    assert [row["doc_id"] for row in found.samples if row["missing"]] == [1, 4]
    assert headline(found).value is None
    for before, after in zip(whole, found.samples, strict=True):
        if not after["missing"]:
            assert after["loglikelihoods"] == pytest.approx(before["loglikelihoods"], abs=1e-4)


def test_an_allowed_share_gives_the_number_of_the_answered_rows(model, holed, tmp_path):
    path = questions(tmp_path / "q.jsonl", odd=(1, 4))
    scores = [row["acc"] for row in evaluate(model, local(path)).samples]
    kept = [score for index, score in enumerate(scores) if index not in (1, 4)]
    assert headline(evaluate(holed, local(path, allow_missing=0.33))).value is None
    found = evaluate(holed, local(path, allow_missing=0.34))
    number = headline(found)
    assert (number.value, number.n, number.missing) == (sum(kept) / 4, 4, 2)
    assert not found.missing
    # The error of a mean of four, not of six.
    p = number.value
    assert number.stderr == pytest.approx(math.sqrt(p * (1 - p) / 3))


def test_a_padding_token_that_cannot_be_read_spoils_no_row(model, tmp_path):
    broken = with_network(
        model, lambda network: network.get_input_embeddings().weight[0].fill_(math.nan)
    )
    path = questions(tmp_path / "q.jsonl")
    found = evaluate(broken, local(path, backend="padded"))
    assert headline(found).value == headline(evaluate(model, local(path))).value


def test_a_mean_over_tasks_needs_all_of_them(model, holed, tmp_path):
    path = questions(tmp_path / "q.jsonl", odd=(2,))
    options = {"tasks": ("piqa", "boolq"), "suite": "micro", "limit": 6}
    found = evaluate(holed, local(path, **options))
    average = headline(found, "average")
    assert (average.value, average.stderr, average.missing) == (None, None, 1)
    assert [(gap.scope, gap.reason) for gap in found.missing][1:] == [
        ("average", "piqa has no value")
    ]
    assert headline(found, "boolq").value is not None
    assert headline(evaluate(holed, local(path, allow_missing=0.5, **options)), "average").value


def test_windows_without_a_finite_loss_are_in_no_perplexity(model, holed, tmp_path):
    file = tmp_path / "text.txt"
    plain = calibration.train_text()[:4000]
    file.write_text(f"{ODD} {plain}")
    text = PerplexityConfig(text="english", window=64, path=str(file))

    def measured(network, **options):
        config = BenchmarkConfig(name="ppl", perplexity={"text": text}, **options)
        return evaluate(network, plan(config, offline=True))

    found = measured(holed)
    assert headline(found, "text").value is None
    assert "row 0" in found.missing[0].reason
    assert [row["doc_id"] for row in found.samples if row["missing"]] == [0]
    allowed = headline(measured(holed, allow_missing=0.5), "text")
    losses = [-r["loglikelihoods"][0] / r["n_tokens"] for r in measured(model).samples[1:]]
    assert allowed.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (allowed.n, allowed.missing) == (len(losses), 1)


def test_a_perplexity_beyond_floating_point_is_missing_with_the_mean_loss(model, tmp_path):
    extreme = with_network(model, lambda network: network.lm_head.weight.mul_(1e5))
    file = tmp_path / "text.txt"
    file.write_text(calibration.train_text()[:2000])
    text = PerplexityConfig(text="english", window=64, path=str(file))
    config = BenchmarkConfig(name="ppl", perplexity={"text": text})
    found = evaluate(extreme, plan(config, offline=True))
    assert "beyond floating point: the mean loss is" in found.missing[0].reason
    assert found.metrics[0].missing == 0


def grammatical(path, labels):
    rows = [{"sentence": f"this is number {i}", "label": each} for i, each in enumerate(labels)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return local(path, tasks=("cola",), data={"cola": str(path)}, metrics={})


@pytest.mark.broad
def test_a_label_that_is_no_choice_is_found_in_any_task_of_choices(model, tmp_path):
    """The test splits of GLUE on the hub have label -1."""
    path = tmp_path / "cola.jsonl"
    with pytest.raises(UserError) as refused:
        grammatical(path, [0, 1, -1, 1, 2])
    assert "task cola: 2 of 5 rows have no answer: the row has no label (rows 2, 4)" in str(
        refused.value
    )
    options = {"tasks": ("cola",), "data": {"cola": str(path)}, "metrics": {}}
    found = evaluate(model, local(path, allow_missing=0.4, **options))
    assert [row["doc_id"] for row in found.samples if row["missing"]] == [2, 4]
    assert (headline(found, "cola").n, headline(found, "cola").missing) == (3, 2)
    assert local(path, limit=2, **options).harness.tasks[0].unlabelled == {"cola": ()}


def test_a_label_in_a_known_task_may_be_absent_if_that_is_allowed(model, tmp_path):
    path = questions(tmp_path / "q.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    scores = [row["acc"] for row in evaluate(model, local(path)).samples]
    path.write_text(
        "\n".join(json.dumps(row | {"label": -1} if i == 3 else row) for i, row in enumerate(rows))
    )
    with pytest.raises(UserError, match="row 3"):
        local(path)
    found = headline(evaluate(model, local(path, allow_missing=0.2)))
    assert (found.value, found.n, found.missing) == ((sum(scores) - scores[3]) / 5, 5, 1)


GREEDY = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
SAMPLED = GREEDY | {"do_sample": True, "temperature": 1.0}


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_generation_from_logits_that_are_not_finite_is_no_answer(model, holed, options):
    contexts = ["What is", f"What is a {ODD}", "A much longer question, to be padded: why"]

    def answered(network):
        adapter = LmEvalAdapter(network, 8, SILENT)
        requests = [
            Instance("generate_until", {}, (context, options), 0, ("task", index, 1))
            for index, context in enumerate(contexts)
        ]
        texts = adapter.generate_until(requests)
        found = {key: adapter.evidence.unanswered(*key) for key in adapter.evidence.requests}
        return texts, {key: reason for key, reason in found.items() if reason is not None}

    texts, unanswered = answered(holed)
    assert unanswered == {("task", 1): "the logits are not finite"}
    assert texts[1] == ""
    if options is GREEDY:
        expected, none = answered(model)
        assert not none and [texts[0], texts[2]] == [expected[0], expected[2]]


def test_a_row_that_has_stopped_before_is_an_answer(model):
    from bench.evaluation.text.generation import GenerationSettings

    settings = GenerationSettings(model, {"until": ["\n"], "max_gen_toks": 8})
    tokens = model.tokenizer("yes\nno")["input_ids"]
    assert settings._generated(tokens, len(tokens))[:2] == ["yes", "stop"]
    assert settings._generated(tokens, 1) is None
    assert settings._generated(tokens, -1)[0] == "yes"


def metric(value=0.5, n=10):
    config = BenchmarkConfig(name="b", tasks=("t",))
    return task_metric(config, "t", "acc", value, split="test", n=n, stderr=0.1)


@given(st.integers(1, 400), st.integers(0, 400), st.floats(0, 1))
def test_a_number_needs_an_answer_and_at_most_the_allowed_share_missing(total, missing, allowed):
    missing = min(missing, total)
    answers = TaskAnswers(total, {str(row): "why" for row in range(missing)})
    (settled,), gaps = settle_metrics([metric(n=total - missing)], answers, allowed)
    has_number = missing == 0 or (missing < total and missing / total <= allowed)
    assert (settled.value is not None) == has_number == (not gaps)
    assert settled.missing == missing and settled.n == total - missing


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("missing", [0, 1])
def test_what_is_no_finite_number_is_a_gap(value, missing):
    answers = TaskAnswers(10, dict.fromkeys("a"[:missing], "why"))
    minor = metric(value).model_copy(update={"headline": False})
    settled, gaps = settle_metrics([metric(value), minor, metric(0.25)], answers, 0.5)
    assert [(each.value, each.missing) for each in settled] == [
        (None, missing), (None, missing), (0.25, missing)
    ]  # fmt: skip
    assert [gap.reason for gap in gaps] == [NO_NUMBER]


@pytest.mark.parametrize("value", [{"a": 0.5}, "N/A", None, [0.5], math.nan])
def test_an_aggregate_that_is_no_number(value):
    assert math.isnan(aggregate_number(value))
    assert aggregate_number(np.float32(0.5)) == aggregate_number(0.5) == 0.5


@given(st.integers(1, 1000))
def test_a_share_written_as_a_decimal_allows_exactly_that_many(missing):
    answers = TaskAnswers(1001, {str(row): "why" for row in range(missing)})
    assert TaskAnswers(1000, answers.unanswered).suffice(float(f"{missing / 1000:.3f}")) == (
        missing < 1000
    )


def test_reasons_are_counted_apart_and_the_first_rows_named():
    rows = {str(row): "it is empty" for row in range(7)} | {"9": "it is NaN"}
    assert TaskAnswers(10, rows).describe() == (
        "8 of 10 rows have no answer: it is empty (rows 0, 1, 2, 3, 4 and 2 more); "
        "it is NaN (row 9)"
    )


def test_a_sentence_about_missing_answers_is_bounded():
    rows = {str(row): f"no image is named {row}" for row in range(1000)} | {"x": "no", "y": "no"}
    said = TaskAnswers(2000, rows).describe()
    assert said.startswith("1002 of 2000 rows have no answer: no (rows x, y); no image is named 0")
    assert said.endswith("; other reasons (rows 4, 5, 6, 7, 8 and 991 more)")
    # Prompts of all lengths are left out for the same reason.
    left_out = {check_length("skip", "here", tokens, 8, "m") for tokens in range(9, 99)}
    assert left_out == {"the prompt's tokens do not fit: model m has room for 8"}


def test_an_average_is_none_if_a_part_is():
    config = BenchmarkConfig(name="b", tasks=("t", "u"))
    rows = [metric(), metric().model_copy(update={"task": "u", "value": None, "missing": 3})]
    (average,) = headline_average(config, rows)
    assert (average.value, average.missing) == (None, 3)


@pytest.mark.parametrize(
    ("others", "value", "averaged"),
    [("acc", 0.5, True), ("mcc", -0.5, True), ("bleu", 31.0, False), ("acc", None, True)],
)
def test_numbers_that_are_no_shares_have_no_average(others, value, averaged):
    config = BenchmarkConfig(name="b", tasks=("t", "u"))
    rows = [metric(), metric().model_copy(update={"task": "u", "metric": others, "value": value})]
    assert bool(headline_average(config, rows)) is averaged
