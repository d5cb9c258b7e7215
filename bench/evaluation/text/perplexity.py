"""Perplexity by the GPTQ protocol: exp of the mean, over windows, of the mean token loss.

Suffixes: B windows in a batch, T tokens in a window, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch.nn import functional

from bench.data.tokenization import encode_texts
from bench.errors import UserError
from bench.evaluation import batching
from bench.evaluation.batching import AdaptiveBatches
from bench.evaluation.harness import ScoredBenchmark, number_within
from bench.evaluation.metrics import SampleRow, TaskAnswers, settle_metrics, task_metric
from bench.evaluation.networks import LanguageModel, language_model
from bench.evaluation.response_cache import ResponseCache, request_key
from bench.evaluation.text.task_data import PlannedText
from bench.models.model import Model
from bench.records.record import Metric, MissingMeasurement
from bench.schema import BenchmarkConfig
from bench.ui import SILENT, Progress

Encode: TypeAlias = Callable[[str], list[int]]
NON_FINITE_LOSS = "the loss of the window is not finite"
C4_WINDOWS = 256
"""Number of windows that the GPTQ scripts draw from C4."""
_TOKENS_PER_BATCH = 8192
"""Logits are computed at every position, so they and not activations limit the batch."""
_TOKENS_PER_CPU_BATCH = batching.MAX_TOKENS_BY_DEVICE["cpu"]
"""On a CPU, larger batches exceed the caches and are no faster."""


def measure_perplexity(
    model: Model,
    text: PlannedText,
    benchmark: BenchmarkConfig,
    progress: Progress,
    cache: ResponseCache,
) -> ScoredBenchmark:
    """Return the perplexity of a text, and one sample row per window."""
    windows = cut_windows(model, text, text.config.windows or benchmark.limit)
    size = windows_per_batch(text, benchmark, model.device)
    model.network.eval()
    network = language_model(model)
    losses = cache.get_or_compute_batched(
        [request_key("perplexity", text.name, window) for window in windows],
        windows,
        [text.config.window] * len(windows),
        AdaptiveBatches(size, model.device, progress),
        lambda batch: window_losses(network, torch.tensor(batch, device=model.device)),
        progress,
    )
    metrics, missing = _settled(benchmark, text, losses, progress)
    return ScoredBenchmark(metrics, _sample_rows(text, windows, losses), missing=missing)


def windows_per_batch(text: PlannedText, benchmark: BenchmarkConfig, device: torch.device) -> int:
    """Return the number of windows per forward, which is halved if memory runs out."""
    tokens = _TOKENS_PER_CPU_BATCH if device.type == "cpu" else _TOKENS_PER_BATCH
    fitting = max(1, tokens // text.config.window)
    return fitting if benchmark.batch_size == "auto" else min(benchmark.batch_size, fitting)


def cut_windows(model: Model, text: PlannedText, limit: float | None) -> list[list[int]]:
    """Cut the text into the windows of its protocol; keep the first `limit`.

    Raises:
        UserError: the window exceeds the model's length, or no document is long enough.
    """
    window = text.config.window
    check_window(text, model.max_length, model.name)

    def encode(string: str) -> list[int]:
        (ids,) = encode_texts(model.tokenizer, [string], add_special_tokens=model.config.add_bos)
        return ids

    try:
        if text.config.protocol == "gptq_c4":
            return random_windows(text.documents, encode, window, number_within(limit, C4_WINDOWS))
        windows = consecutive_windows(text.documents, encode, window)
        return windows[: number_within(limit, len(windows))]
    except UserError as error:
        raise UserError(f"benchmark.perplexity.{text.name}: {error}") from error


def check_window(text: PlannedText, longest: int, model: str) -> None:
    """Raise UserError if the windows of a text do not fit into a model of `longest` tokens."""
    window = text.config.window
    if window > longest:
        raise UserError(
            f"benchmark.perplexity.{text.name}.window={window}: "
            f"model {model} takes at most {longest} tokens"
        )


def rescore_windows(
    benchmark: BenchmarkConfig, text: PlannedText, rows: Sequence[SampleRow]
) -> ScoredBenchmark:
    """Return the perplexity of a text from its sample rows."""
    if not rows:
        raise UserError(f"the run stored no windows of {text.name}")
    losses = [-row["loglikelihoods"][0] / row["n_tokens"] for row in rows]
    metrics, missing = _settled(benchmark, text, losses, SILENT)
    return ScoredBenchmark(metrics, list(rows), missing=missing)


@torch.no_grad()
def window_losses(network: LanguageModel, ids_BT: torch.Tensor) -> list[float]:
    """Return each window's mean cross-entropy over its T - 1 predictions, in float32."""
    logits_BTV = network(ids_BT, use_cache=False).logits
    # Window by window, because float32 logits of the whole batch would dominate the peak memory.
    losses = [
        functional.cross_entropy(logits_TV[:-1].float(), ids_T[1:])
        for logits_TV, ids_T in zip(logits_BTV, ids_BT, strict=True)
    ]
    return [float(loss) for loss in losses]


def mean_loss(losses: Sequence[float]) -> float:
    """Return the mean over windows, exactly rounded."""
    return math.fsum(losses) / len(losses)


def perplexity(losses: Sequence[float]) -> tuple[float, float | None]:
    """Return exp of the mean loss and its standard error by the delta method: ppl * se(mean)."""
    try:
        value = math.exp(mean_loss(losses))
    except OverflowError:
        # A network destroyed by compression can have losses above 709, for which exp overflows.
        value = math.inf
    if len(losses) < 2 or not math.isfinite(value):
        return value, None
    return value, value * statistics.stdev(losses) / math.sqrt(len(losses))


def _settled(
    benchmark: BenchmarkConfig, text: PlannedText, losses: Sequence[float], progress: Progress
) -> tuple[list[Metric], list[MissingMeasurement]]:
    """Return the perplexity over the windows with a finite loss, or the reason if it is missing."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    lost = {
        str(index): NON_FINITE_LOSS for index, loss in enumerate(losses) if not math.isfinite(loss)
    }
    answers = TaskAnswers(len(losses), lost)
    # Without any finite loss, the value is computed over all windows, and dropped below.
    metric = _metric(benchmark, text, finite or losses)
    metrics, missing = settle_metrics([metric], answers, benchmark.allow_missing)
    if lost:
        progress.warn(f"{text.name}: {answers.describe()}")
    elif metric.value is None or not math.isfinite(metric.value):
        # Losses above 709 are valid, but their exponential is not a finite double.
        reason = (
            f"the perplexity is beyond floating point: the mean loss is {mean_loss(losses):.4g}"
        )
        progress.warn(f"{text.name}: {reason}")
        missing = [MissingMeasurement(scope=text.name, quantity=metric.metric, reason=reason)]
    return metrics, missing


def _metric(benchmark: BenchmarkConfig, text: PlannedText, losses: Sequence[float]) -> Metric:
    value, stderr = perplexity(losses)
    return task_metric(
        benchmark,
        text.name,
        "perplexity",
        value,
        split=text.split,
        n=len(losses),
        stderr=stderr,
        higher_is_better=False,
        task_version=f"{text.config.protocol}/{text.config.window}",
    )


def _sample_rows(
    text: PlannedText, windows: Sequence[list[int]], losses: Sequence[float]
) -> list[SampleRow]:
    return [
        {
            "task": text.name,
            "filter": "none",
            "doc_id": index,
            "doc_hash": hashlib.sha256(repr(tokens).encode()).hexdigest(),
            "loglikelihoods": [-loss * (len(tokens) - 1)],
            "n_tokens": len(tokens) - 1,
            "missing": None if math.isfinite(loss) else NON_FINITE_LOSS,
        }
        for index, (tokens, loss) in enumerate(zip(windows, losses, strict=True))
    ]


def consecutive_windows(documents: Sequence[str], encode: Encode, window: int) -> list[list[int]]:
    """Join documents by blank lines, tokenize once and cut; the remainder is dropped."""
    # Tokenized as one string: there is one BOS, and tokens may span documents. Published
    # perplexities of WikiText-2 depend on both.
    tokens = encode("\n\n".join(documents))
    count = len(tokens) // window
    if count == 0:
        raise UserError(f"the text has {len(tokens)} tokens, less than one window of {window}")
    return [tokens[i * window : (i + 1) * window] for i in range(count)]


def random_windows(
    documents: Sequence[str], encode: Encode, window: int, count: int = C4_WINDOWS
) -> list[list[int]]:
    """Draw windows at random from documents longer than a window, with seed 0."""
    # The same draws as `get_c4` in GPTQ's datautils.py (documents until one is long enough, then an
    # offset), because other windows have other perplexities. The bound of the offset is also that
    # of the script, although it excludes the last window.
    draw = random.Random(0)
    too_short: set[int] = set()
    windows: list[list[int]] = []
    while len(windows) < count:
        number = draw.randint(0, len(documents) - 1)
        # A short document is not tokenized again but still uses up a draw, as in the script.
        tokens = [] if number in too_short else encode(documents[number])
        if len(tokens) <= window:
            too_short.add(number)
            if len(too_short) == len(documents):
                raise UserError(f"no document of the text is longer than a window of {window}")
            continue
        start = draw.randint(0, len(tokens) - window - 1)
        windows.append(tokens[start : start + window])
    return windows
