"""Image-question benchmarks through lmms-eval: planning, evaluation, metrics and sample rows."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, ClassVar, TypeAlias, TypedDict

from bench.errors import UserError, library_failures_as_errors
from bench.evaluation.distributed import hidden_from_harness
from bench.evaluation.evidence import task_evidence, warn_about, warn_about_repeats
from bench.evaluation.harness import DocumentSource, ScoredBenchmark, tell_results
from bench.evaluation.metrics import (
    EMPTY_ANSWER,
    LoggedSample,
    SampleRow,
    TaskAnswers,
    aggregate_number,
    refuse_changed_questions,
    sample_score,
    settle_metrics,
    task_metric,
)
from bench.evaluation.multimodal.adapter import LmmsEvalAdapter, StoredAnswers
from bench.evaluation.multimodal.derived_metrics import (
    DerivedMetric,
    HarnessScores,
    derive_metrics,
)
from bench.evaluation.multimodal.planned_tasks import (
    PlannedTask,
    quiet_lmms_eval,
    scoring_unit,
)
from bench.evaluation.response_cache import ResponseCache
from bench.evaluation.task_planning import (
    collect,
    go_offline_if_needed,
    reads_hub,
    refuse_missing_data,
    refuse_unknown_tasks,
)
from bench.models.model import Model
from bench.models.network import text_config
from bench.records.record import Metric
from bench.schema import BenchmarkConfig, ModelConfig, ModelKind
from bench.ui import SILENT, Progress

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

    from bench.data.chat import Tokenizer

MEAN_METRICS = frozenset({"pope_accuracy"})
"""Metrics that are the mean of a score per sample, although their samples are not numbers."""


Metadata: TypeAlias = Mapping[str, object]
"""Labels of a task file, such as its version."""


class HarnessResult(TypedDict):
    """Results of lmms-eval: aggregated scores and the scored documents, by task."""

    results: dict[str, HarnessScores]
    samples: dict[str, list[LoggedSample]]


@dataclass(frozen=True)
class MultimodalHarness:
    """The planned tasks of one benchmark."""

    benchmark: BenchmarkConfig
    tasks: tuple[PlannedTask, ...]

    kinds: ClassVar[tuple[ModelKind, ...]] = ("image_text",)

    @property
    def sources(self) -> dict[str, DocumentSource]:
        """Origin of the documents of each task."""
        return {task.name: task.source for task in self.tasks}

    @property
    def definitions(self) -> dict[str, str]:
        """Hash of each task's definition."""
        return {task.name: task.definition for task in self.tasks}

    @property
    def folders(self) -> frozenset[Path]:
        """Folders of the harness's task files and of their code."""
        return frozenset().union(*(task.folders for task in self.tasks))

    def images(self, task: str, document: int) -> list[Image]:
        """Return the images of a document, given its index in the whole data set.

        Raises:
            UserError: the benchmark has no such document.
        """
        planned = next((each for each in self.tasks if each.name == task), None)
        if planned is None or document not in planned.indices:
            raise UserError(
                f"benchmark={self.benchmark.name} has no document {document} of task {task}"
            )
        return planned.images(planned.indices.index(document))

    def check_network(
        self, model: ModelConfig, network: nn.Module, tokenizer: Tokenizer | None
    ) -> None:
        """Raise UserError unless answers can end."""
        assert tokenizer is not None  # language models have one
        if tokenizer.eos_token_id is None and text_config(network).eos_token_id is None:
            raise UserError(
                f"neither the tokenizer nor the config of model {model.name} names an end-of-text "
                "token, at which answers stop: set eos_token in its tokenizer_config.json"
            )

    def score(self, model: Model, progress: Progress, cache: ResponseCache) -> ScoredBenchmark:
        """Score the model on every task; images are encoded once for all of them."""
        adapter = LmmsEvalAdapter(model, self.benchmark, progress, cache)
        scored = self._score_tasks(adapter, model.name, progress)
        warn_about(scored.evidence, model.max_length, progress)
        warn_about_repeats(scored.rows, progress)
        return scored._replace(backend_report=adapter.backend_report)

    def rescore(self, rows: Sequence[SampleRow]) -> ScoredBenchmark:
        """Apply the harness's filters and metrics to the answers in sample rows.

        Raises:
                UserError: the rows lack answers that the metrics need, or have different questions.
        """
        scored = self._score_tasks(StoredAnswers(self.tasks, rows), "stored answers", SILENT)
        refuse_changed_questions(rows, scored.rows)
        return scored

    def _score_tasks(
        self, lm: LmmsEvalAdapter | StoredAnswers, name: str, progress: Progress
    ) -> ScoredBenchmark:
        scored = ScoredBenchmark([], [])
        for task in self.tasks:
            with progress.phase(f"{name} on {task.name}"):
                result = _run_harness(lm, task)
            answers = unanswered_rows(task, lm, result)
            if answers.unanswered:
                progress.warn(f"{task.name}: {answers.describe()}")
            rows = sample_rows(task, lm, result, answers)
            with quiet_lmms_eval():
                found = task_metrics(self.benchmark, task, answered_only(task, result, answers))
            metrics, missing = settle_metrics(found, answers, self.benchmark.allow_missing)
            evidence = [task_evidence(task.name, rows, lm.evidence.settings.get(task.name))]
            tell_results(metrics, progress)
            scored = scored.extended(
                ScoredBenchmark(metrics, rows, missing=missing, evidence=evidence)
            )
        return scored


def plan_multimodal(benchmark: BenchmarkConfig, *, offline: bool) -> MultimodalHarness:
    """Find and load all tasks of a benchmark.

    Raises:
        MissingData: data are neither cached nor reachable on the hub.
            UserError: the config names a task, metric or file that does not exist or does not fit.
    """
    refuse_unknown_tasks(benchmark, benchmark.tasks)
    if benchmark.perplexity:
        raise UserError(
            "benchmark.perplexity needs benchmark.harness=lm_eval: it is measured on text"
        )
    if benchmark.num_fewshot:
        raise UserError(f"benchmark.num_fewshot={benchmark.num_fewshot}: lmms_eval supports only 0")
    go_offline_if_needed(offline=offline, needs_hub=reads_hub(benchmark))
    # Imported here, because lmms-eval takes seconds to import and reads the hub's offline switches
    # on import, which must be set before.
    from bench.evaluation.multimodal import planned_tasks

    missing: list[str] = []
    names = dict.fromkeys(benchmark.tasks)
    tasks = collect(names, lambda name: planned_tasks.build_task(name, benchmark), missing)
    refuse_missing_data(benchmark, missing, "benchmark.data.TASK=PATH")
    return MultimodalHarness(benchmark, tuple(tasks))


def _run_harness(lm: LmmsEvalAdapter | StoredAnswers, planned: PlannedTask) -> HarnessResult:
    """Let lmms-eval build requests, collect responses and aggregate."""
    from lmms_eval.evaluator import evaluate

    # The adapter looks up the images of a request here.
    lm.task_dict[planned.name] = planned.task.dataset
    if planned.doc_to_parts is not None:
        lm.doc_to_parts[planned.name] = planned.doc_to_parts
    with (
        library_failures_as_errors(f"task {planned.name!r} of lmms-eval"),
        quiet_lmms_eval(),
        hidden_from_harness(),
        tempfile.TemporaryDirectory() as folder,
    ):
        # The harness always writes files next to its results, so they go to a temporary folder.
        # `torchrun` is the executor backend without setup in a single process.
        settings = SimpleNamespace(output_path=folder, process_with_media=False)
        result: HarnessResult = evaluate(
            lm,
            {planned.name: planned.task},
            bootstrap_iters=0,
            log_samples=True,
            cli_args=settings,
            distributed_executor_backend="torchrun",
            process_docs_parallel=1,
        )
    return result


UNIT_UNANSWERED = "a question that is scored together with it has no answer"


def unanswered_rows(
    planned: PlannedTask, lm: LmmsEvalAdapter | StoredAnswers, result: HarnessResult
) -> TaskAnswers:
    """Count the documents of a task, and list those without an answer by index in the data set.

    Documents that are scored together count as unanswered if one of them is.
    """
    reasons: dict[int, str] = {}
    units: dict[str, list[int]] = defaultdict(list)
    samples = result["samples"][planned.name]
    for sample in samples:
        position = sample["doc_id"]
        answer = lm.answers_by_document[planned.name, position]
        reason = answer.missing or (None if (answer.text or "").strip() else EMPTY_ANSWER)
        if reason is not None:
            reasons[position] = reason
        unit = scoring_unit(planned.name, sample["doc"])
        if unit is not None:
            units[unit].append(position)
    for positions in units.values():
        if reasons.keys() & set(positions):
            reasons |= {p: UNIT_UNANSWERED for p in positions if p not in reasons}
    return TaskAnswers(
        len({sample["doc_id"] for sample in samples}),
        {str(planned.indices[position]): reasons[position] for position in sorted(reasons)},
    )


def answered_only(
    planned: PlannedTask, result: HarnessResult, answers: TaskAnswers
) -> HarnessResult:
    """Let lmms-eval aggregate again, over the documents with an answer.

    A task without answers keeps its numbers, because lmms-eval cannot aggregate an empty list; they
    are dropped later.
    """
    samples = result["samples"][planned.name]
    kept = [s for s in samples if str(planned.indices[s["doc_id"]]) not in answers.unanswered]
    if not kept or len(kept) == len(samples):
        return result
    from lmms_eval.evaluator_utils import TaskOutput

    again = TaskOutput.from_taskdict(planned.name, planned.task)
    filters = {key.partition(",")[2] for key in result["results"][planned.name] if "," in key}
    for metric in planned.task.aggregation():
        values = [sample[metric] for sample in kept if metric in sample]
        for through in filters if values else ():
            again.sample_metrics[metric, through] = values
    again.calculate_aggregate_metric(bootstrap_iters=0)
    again.calculate_clt_aggregate_metric()
    return {"results": {planned.name: again.agg_metrics}, "samples": {planned.name: kept}}


def task_metrics(
    benchmark: BenchmarkConfig, planned: PlannedTask, result: HarnessResult
) -> list[Metric]:
    """Return every metric of a task, those of the harness first."""
    samples, scores = result["samples"][planned.name], result["results"][planned.name]
    found = [
        *_harness_metrics(planned, scores, samples),
        *(("none", derived) for derived in derive_metrics(samples, scores)),
    ]
    better = planned.task.higher_is_better()
    return [
        task_metric(
            benchmark,
            planned.name,
            each.metric,
            each.value,
            split=planned.split,
            n=each.n,
            stderr=each.stderr,
            through=through,
            higher_is_better=better.get(each.metric, True),
            headline=each.metric == planned.headline,
            task_version=_version(planned.task.config.metadata),
        )
        for through, each in found
    ]


def _harness_metrics(
    planned: PlannedTask, scores: HarnessScores, samples: list[LoggedSample]
) -> Iterator[tuple[str, DerivedMetric]]:
    """Yield the metrics that the harness reports, each with its filter."""
    for metric in planned.task.aggregation():
        for key, value in scores.items():
            name, _, through = key.partition(",")
            if name != metric:
                continue
            scored = [sample[metric] for sample in samples if metric in sample]
            # The harness's CLT standard error is valid for a mean of scores per sample; for any
            # other aggregate it would be the error of another number, so it is dropped.
            is_mean = metric in MEAN_METRICS or all(isinstance(s, int | float) for s in scored)
            error = scores.get(f"{metric}_stderr_clt,{through}") if is_mean else None
            stderr = None if isinstance(error, str | None) else float(error)
            yield through, DerivedMetric(metric, aggregate_number(value), stderr, len(scored))


def _version(metadata: Metadata | list[Metadata] | None) -> str | None:
    """Return a task's version, from the mapping or list of mappings in its file."""
    parts = metadata if isinstance(metadata, list) else [metadata or {}]
    versions = [str(part["version"]) for part in parts if "version" in part]
    return versions[0] if versions else None


def sample_rows(
    planned: PlannedTask,
    lm: LmmsEvalAdapter | StoredAnswers,
    result: HarnessResult,
    answers: TaskAnswers,
) -> list[SampleRow]:
    """Return one row per scored document; `doc_id` is its index in the whole data set.

    A row without an answer has no scores.
    """
    return [
        _sample_row(
            planned,
            lm,
            sample,
            answers.unanswered.get(str(planned.indices[sample["doc_id"]])),
        )
        for sample in result["samples"][planned.name]
    ]


def _sample_row(
    planned: PlannedTask,
    lm: LmmsEvalAdapter | StoredAnswers,
    sample: LoggedSample,
    missing: str | None,
) -> SampleRow:
    answer = lm.answers_by_document[planned.name, sample["doc_id"]]
    metrics = {
        name: None if missing else sample_score(sample[name])
        for name in planned.task.aggregation()
        if name in sample
    }
    return {
        "task": planned.name,
        "filter": "none",
        # The harness numbers the documents that it gets. With a limit these need not be the first
        # ones of the data set, but records with different limits must be paired by document.
        "doc_id": planned.indices[sample["doc_id"]],
        "doc_hash": _sha256(json.dumps(sample["doc"], sort_keys=True, default=str)),
        "prompt_hash": _sha256(answer.prompt),
        # The task's own text, because no prompt can be rendered without the model's processor.
        "question_hash": _sha256(str(sample["arguments"][0])),
        "target": _target(sample),
        "prompt": answer.prompt,
        "response": str(sample["filtered_resps"][0]),
        "generations": [] if answer.text is None else [answer.text],
        "image_hash": answer.image_hash,
        "category": sample["doc"].get("category"),
        "unit": scoring_unit(planned.name, sample["doc"]),
        **lm.evidence.columns(planned.name, sample["doc_id"]),
        **metrics,
        "missing": missing,
    }


def _target(sample: LoggedSample) -> str:
    """Return the reference answer; of ten annotators' answers the most frequent one.

    In that case lmms-eval logs the word `answer`, the name of a column that these data sets lack.
    """
    answers = sample["doc"].get("answers")
    if not answers:
        return str(sample["target"])
    texts = [answer["answer"] if isinstance(answer, dict) else answer for answer in answers]
    return str(Counter(texts).most_common(1)[0][0])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
