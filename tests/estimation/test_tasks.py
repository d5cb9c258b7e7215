"""What tasks ask is counted as a run counts it."""

import pytest
import torch

from bench.estimation.tasks import AnswerRecords, RecordedAnswers, TaskDemand, task_demands
from bench.evaluation import plan
from bench.models import loading
from bench.models.model import Model
from bench.models.source import resolve_model
from bench.records import Store
from bench.schema import BenchmarkConfig, ModelConfig
from bench.ui import SILENT
from tests.reporting.html.synthetic_records import record


@pytest.fixture(scope="module")
def source():
    config = ModelConfig(name="micro_moe", source="embedded:micro_moe", dtype="float32")
    return resolve_model(config, offline=True)


@pytest.fixture(scope="module")
def described(source):
    skeleton = loading.skeleton(source).to(torch.float32)
    tokenizer = loading.load_tokenizer(source)
    return Model(source.config, skeleton, tokenizer, "", None, torch.device("cpu"))


@pytest.mark.parametrize("backend", ["prefix_sharing", "padded"])
def test_tokens_are_those_that_a_run_computes(source, described, backend):
    benchmark = BenchmarkConfig(
        name="two", suite="micro", tasks=("openbookqa", "boolq"), limit=6, backend=backend
    )
    planned = plan(benchmark, offline=True)
    demands = list(task_demands(planned.harness, described, 2**34))
    scored = planned.harness.score(loading.load_model(source), SILENT, None)
    report = scored.backend_report
    assert [each.name for each in demands] == ["openbookqa", "boolq"]
    assert report.used == backend
    if backend == "prefix_sharing":
        assert sum(each.given for each in demands) == report.padded_tokens
        assert sum(each.computed for each in demands) == report.computed_tokens
        assert all(each.shared > 0 for each in demands)
    else:
        assert all(each.computed >= each.given / 4 for each in demands)
    assert [each.documents for each in demands] == [6, 6]


def test_a_sample_of_documents_stands_for_all(described, monkeypatch):
    benchmark = BenchmarkConfig(name="one", suite="micro", tasks=("openbookqa",), limit=40)
    harness = plan(benchmark, offline=True).harness
    (whole,) = task_demands(harness, described, 2**34)
    monkeypatch.setattr("bench.estimation.tasks.SAMPLED_DOCUMENTS", 10)
    (part,) = task_demands(harness, described, 2**34)
    assert (whole.sampled, part.sampled) == (False, True)
    assert part.documents == whole.documents == 40
    assert part.given == pytest.approx(whole.given, rel=0.1)


def test_windows_of_a_text_are_whole(described):
    benchmark = BenchmarkConfig(
        name="text", tasks=(), perplexity={"english": {"text": "english", "window": 128}}, limit=3
    )
    (demand,) = task_demands(plan(benchmark, offline=True).harness, described, 2**34)
    assert (demand.computed, demand.pairs, demand.shared) == (3 * 128, 3 * 128**2, 0)


OPEN = TaskDemand("boolq", documents=8, requests=8, calls=4, written=(8, 800), steps=(4, 400))


def test_recorded_answers_bound_how_many_tokens_are_written():
    # Four calls of two answers each; a call takes as many steps as its longer answer: 4 and 3.
    exact = RecordedAnswers((4, 2, 3, 1), exact=True).demand(OPEN)
    assert (exact.written, exact.steps) == ((20, 20), (14, 14))
    other = RecordedAnswers((4, 2, 3, 1), exact=False).demand(OPEN)
    assert (other.written, other.steps) == ((16, 25), pytest.approx((11.2, 17.5)))


def test_recorded_answers_never_leave_what_is_possible():
    short, long = (RecordedAnswers((n,), exact=False).demand(OPEN) for n in (0, 4096))
    assert (short.written, short.steps) == ((8, 8), (4, 4))
    assert (long.written, long.steps) == ((800, 800), (400, 400))


def answered(store, number, lengths, method=None):
    """Write a run whose answers to `boolq` have these lengths; prompts get shorter."""
    rows = [
        {
            "task": "boolq", "filter": f, "doc_id": doc, "choices": [], "loglikelihoods": [],
            "prompt_tokens": [100 - doc], "answer_tokens": [n], "finish_reasons": ["stop"],
        }
        for doc, n in enumerate(lengths)
        for f in ("strict", "flexible")
    ]  # fmt: skip
    store.write(record(number, method=method), rows, "")


def test_the_newest_answers_with_the_same_methods_count(tmp_path):
    store = Store(tmp_path)
    closed = TaskDemand("rte", requests=8, calls=4)
    assert AnswerRecords(store).applied([OPEN, closed], "tiny", "dense") == (OPEN, closed)
    answered(store, 1, [9, 9], "camera_p")
    answered(store, 2, [4, 2, 3, 1])
    answered(store, 3, [7, 7], "camera_p")
    records = AnswerRecords(store)

    def written(model, methods):
        found, untouched = records.applied([OPEN, closed], model, methods)
        assert untouched == closed
        return found.written

    assert written("tiny", "dense") == (20, 20)
    assert written("tiny", "camera_p") == (56, 56)
    assert written("tiny", "rtn") == (56 / 1.25, 56 * 1.25)
    assert written("small", "dense") == OPEN.written
    # A sweep may record the same methods later.
    answered(store, 4, [5, 5], "rtn")
    assert written("tiny", "rtn") == (40, 40)


@pytest.mark.parametrize("damage", ["samples", "columns"])
def test_records_without_readable_answers_are_passed_over(damage, tmp_path):
    store = Store(tmp_path)
    answered(store, 1, [4, 2, 3, 1])
    newest = record(2)
    store.write(newest, [{"task": "boolq", "doc_id": 0}], "")
    if damage == "samples":
        (store.folder(newest.id) / "samples.parquet").write_bytes(b"PAR1")
    (found,) = AnswerRecords(store).applied([OPEN], "tiny", "dense")
    assert found.written == (20, 20)
