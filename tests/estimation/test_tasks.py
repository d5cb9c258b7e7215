"""What tasks ask is counted as a run counts it."""

import pytest
import torch

from bench.estimation.tasks import task_demands
from bench.evaluation import plan
from bench.models import loading
from bench.models.model import Model
from bench.models.source import resolve_model
from bench.schema import BenchmarkConfig, ModelConfig
from bench.ui import SILENT


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
