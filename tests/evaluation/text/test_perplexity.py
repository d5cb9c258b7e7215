"""Perplexity against a loop that does the same the long way."""

import math
import random

import pytest
import torch

from bench.data import calibration
from bench.errors import UserError
from bench.evaluation import BenchmarkConfig, PerplexityConfig, evaluate, plan
from bench.evaluation.text.perplexity import consecutive_windows, perplexity, random_windows


def measured(model, config, **options):
    benchmark = BenchmarkConfig(name="p", perplexity={"text": config}, **options)
    return evaluate(model, plan(benchmark, offline=True))


@torch.no_grad()
def brute_force(model, windows):
    means = []
    for window in windows:
        logits = model.network(torch.tensor([window])).logits[0]
        losses = [
            -torch.log_softmax(logits[place], -1)[window[place + 1]].item()
            for place in range(len(window) - 1)
        ]
        means.append(sum(losses) / len(losses))
    return means


def test_english_against_a_direct_loop(model):
    found = measured(model, PerplexityConfig(text="english", window=128), limit=6)
    tokens = model.tokenizer(calibration.test_text())["input_ids"]
    means = brute_force(model, [tokens[i * 128 : (i + 1) * 128] for i in range(6)])
    (metric,) = found.metrics
    mean = sum(means) / 6
    assert metric.value == pytest.approx(math.exp(mean), rel=1e-5)
    spread = math.sqrt(sum((loss - mean) ** 2 for loss in means) / 5)
    assert metric.stderr == pytest.approx(math.exp(mean) * spread / math.sqrt(6), rel=1e-4)
    assert (metric.n, metric.split, metric.higher_is_better) == (6, "test", False)
    for row, loss in zip(found.samples, means, strict=True):
        assert row["loglikelihoods"] == [pytest.approx(-loss * 127, rel=1e-5)]
        assert (row["task"], row["n_tokens"], row["acc"]) == ("text", 127, None)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_batch_changes_nothing(model, batch_size):
    config = PerplexityConfig(text="english", window=64)
    (metric,) = measured(model, config, limit=5, batch_size=batch_size).metrics
    (alone,) = measured(model, config, limit=5, batch_size=1).metrics
    assert metric.value == pytest.approx(alone.value, rel=1e-5)


def test_windows_follow_each_other_and_the_remainder_is_dropped():
    assert consecutive_windows(["abc", "d"], lambda text: list(text.encode()), 2) == [
        list(b"ab"),
        list(b"c\n"),
        list(b"\nd"),
    ]
    assert len(consecutive_windows(["abcde"], lambda text: list(text.encode()), 2)) == 2


def test_c4_windows_are_drawn_as_the_gptq_scripts_draw_them():
    documents = ["x" * length for length in (3, 50, 9, 10, 11, 80)]
    numbered = [list(range(len(document))) for document in documents]
    draw = random.Random(0)
    expected = []
    for _ in range(256):
        while True:
            number = draw.randint(0, len(documents) - 1)
            if len(numbered[number]) > 10:
                break
        start = draw.randint(0, len(numbered[number]) - 10 - 1)
        expected.append(numbered[number][start : start + 10])
    assert random_windows(documents, lambda text: list(range(len(text))), 10) == expected


def test_too_little_text_is_refused():
    with pytest.raises(UserError, match="3 tokens, less than one window of 4"):
        consecutive_windows(["abc"], lambda text: list(text.encode()), 4)
    with pytest.raises(UserError, match="no document"):
        random_windows(["abc", "abcd"], lambda text: list(text.encode()), 4)


def test_a_text_file_is_measured_and_its_faults_are_named(model, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text(calibration.train_text()[:2000])
    found = measured(model, PerplexityConfig(text="english", window=32, path=str(file)))
    (metric,) = found.metrics
    tokens = model.tokenizer(file.read_text())["input_ids"]
    assert metric.n == len(tokens) // 32
    file.write_text("short")
    with pytest.raises(UserError, match=r"benchmark.perplexity.text: .* less than one window"):
        measured(model, PerplexityConfig(text="english", window=32, path=str(file)))
    with pytest.raises(UserError, match=r"benchmark.perplexity.text.path=.*: no such file"):
        measured(model, PerplexityConfig(text="english", path=str(tmp_path / "none.txt")))


def test_a_table_of_documents_stands_in_for_c4(model, tmp_path):
    file = tmp_path / "shard.jsonl"
    file.write_text('{"text": "%s"}\n{"text": "short"}\n' % ("a long document " * 20))
    config = PerplexityConfig(text="c4", protocol="gptq_c4", window=16, path=str(file))
    found = measured(model, config, limit=3)
    assert [row["n_tokens"] for row in found.samples] == [15, 15, 15]
    assert found.metrics[0].task_version == "gptq_c4/16"


def test_a_window_longer_than_the_model_takes_is_refused(model):
    with pytest.raises(UserError, match="window=1024: model tiny0 takes at most 512"):
        measured(model, PerplexityConfig(text="english", window=1024))


def test_a_loss_that_is_no_number_is_reported_as_that():
    value, stderr = perplexity([1.0, math.nan])
    assert math.isnan(value)
    assert stderr is None
    assert perplexity([math.inf, 1.0]) == (math.inf, None)
    assert perplexity([800.0, 800.0]) == (math.inf, None)
    assert perplexity([2.0]) == (math.exp(2.0), None)
