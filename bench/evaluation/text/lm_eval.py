"""Text benchmarks through lm-eval: planning, evaluation, metrics and sample rows."""

from __future__ import annotations

import functools
import io
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import lm_eval.utils
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.model import LM

from bench.errors import UserError
from bench.evaluation.evidence import EvidenceLog, task_evidence, warn_about, warn_about_repeats
from bench.evaluation.harness import SEED, DocumentSource, ScoredBenchmark, tell_results
from bench.evaluation.metrics import (
    SampleRow,
    TaskAnswers,
    aggregate_number,
    common_split,
    refuse_changed_questions,
    settle_metrics,
    task_metric,
)
from bench.evaluation.response_cache import ResponseCache
from bench.evaluation.task_planning import (
    collect,
    evaluated_split,
    go_offline_if_needed,
    quiet_lm_eval,
    reads_hub,
    refuse_missing_data,
    refuse_unknown_tasks,
)
from bench.evaluation.text import perplexity, planned_tasks, task_data
from bench.evaluation.text.adapter import LmEvalAdapter, StoredAnswers
from bench.evaluation.text.chat import ChatRenderer, check_chat, select_template
from bench.evaluation.text.generation import check_generation, context_limit
from bench.evaluation.text.planned_tasks import PlannedTask, TextTask
from bench.evaluation.text.sample_rows import (
    HarnessResult,
    Unanswered,
    sample_rows,
    unanswered_documents,
)
from bench.evaluation.text.task_data import PlannedText
from bench.models.model import Model, max_sequence_length
from bench.records.record import Metric, MissingMeasurement
from bench.schema import BenchmarkConfig, ModelConfig, ModelKind
from bench.ui import SILENT, Progress

if TYPE_CHECKING:
    from torch import nn

    from bench.data.chat import Tokenizer

_BOOTSTRAP_RESAMPLES = 1000
"""Bootstrap resamples for metrics without a closed-form standard error."""


@dataclass(frozen=True)
class TextHarness:
    """The planned tasks and texts of one benchmark."""

    benchmark: BenchmarkConfig
    tasks: tuple[PlannedTask, ...]
    texts: tuple[PlannedText, ...]

    kinds: ClassVar[tuple[ModelKind, ...]] = ("causal_lm", "image_text")

    @property
    def sources(self) -> dict[str, DocumentSource]:
        """Where the documents of each task and each text came from."""
        of_tasks = {name: source for task in self.tasks for name, source in task.sources.items()}
        return of_tasks | {text.name: text.source for text in self.texts}

    @property
    def definitions(self) -> dict[str, str]:
        """Hash of each task's definition, those of a group's members included."""
        return {name: found for task in self.tasks for name, found in task.definitions.items()}

    @property
    def leaves(self) -> list[TextTask]:
        """All tasks, those of groups included."""
        return [task for planned in self.tasks for task in planned.tasks.values()]

    @property
    def folders(self) -> frozenset[Path]:
        """Folders of the harness's task files and of their code."""
        return frozenset().union(*(task.folders for task in self.tasks))

    def images(self, task: str, document: int) -> tuple[()]:
        """Return nothing: documents are texts."""
        return ()

    def check_network(
        self, model: ModelConfig, network: nn.Module, tokenizer: Tokenizer | None
    ) -> None:
        """Raise UserError unless special tokens and lengths suffice for every task."""
        assert tokenizer is not None  # language models have one
        benchmark, leaves = self.benchmark, self.leaves
        longest = max_sequence_length(model, network)
        generating = [task for task in leaves if task.OUTPUT_TYPE == "generate_until"]
        if benchmark.chat_template is not False:
            check_chat(benchmark, tokenizer, model.name)
        if benchmark.gen_kwargs or benchmark.think_end_token:
            check_generation(benchmark, [task.task_name for task in generating])
        thinks = benchmark.chat_template_args.get("enable_thinking")
        chosen = [task.task_name for task in leaves if task not in generating]
        if thinks and chosen:
            raise UserError(
                f"benchmark.chat_template_args.enable_thinking: task {chosen[0]} scores given "
                "answers, before which no thoughts can be generated; use only generative tasks"
            )
        if leaves and tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of model {model.name} has neither an end-of-text nor a BOS token, "
                "one of which must replace an empty context: set eos_token in its "
                "tokenizer_config.json"
            )
        if generating and tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of model {model.name} has no end-of-text token, at which the "
                f"answers of task {generating[0].task_name} stop: set eos_token in its "
                "tokenizer_config.json"
            )
        for task in generating:
            options = dict(vars(task.config).get("generation_kwargs") or {})
            try:
                context_limit(options, longest, model.name)
            except UserError as error:
                raise UserError(f"task {task.task_name}: {error}") from None
        for text in self.texts:
            perplexity.check_window(text, longest, model.name)

    def score(self, model: Model, progress: Progress, cache: ResponseCache) -> ScoredBenchmark:
        """Score the model on every task and text; cached requests are skipped."""
        benchmark = self.benchmark
        # One adapter for all tasks, because choosing its scorer takes a trial forward and an
        # estimate of the free memory.
        template = select_template(benchmark, model.tokenizer, model.name)
        chat = ChatRenderer(model.tokenizer, template, benchmark.chat_template_args, progress)
        adapter = LmEvalAdapter(
            model,
            benchmark.batch_size,
            progress,
            benchmark.backend,
            cache,
            benchmark.overlong,
            chat=chat,
            think_end=benchmark.think_end_token,
        )
        scored = self._score_tasks(adapter, adapter.evidence, model.name, progress)
        warn_about(scored.evidence, model.max_length, progress)
        warn_about_repeats(scored.rows, progress)
        for text in self.texts:
            with progress.phase(f"{model.name} on {text.name}"):
                measured = perplexity.measure_perplexity(model, text, benchmark, progress, cache)
            tell_results(measured.metrics, progress)
            scored = scored.extended(measured)
        return scored._replace(backend_report=adapter.backend_report)

    def rescore(self, rows: Sequence[SampleRow]) -> ScoredBenchmark:
        """Apply the harness's filters and metrics to the answers in sample rows.

        Raises:
            UserError: the rows lack answers that the metrics need, or have different questions.
        """
        stored = StoredAnswers(rows)
        scored = self._score_tasks(stored, stored.evidence, "stored answers", SILENT)
        refuse_changed_questions(rows, scored.rows)
        for text in self.texts:
            windows = [row for row in rows if row["task"] == text.name]
            scored = scored.extended(perplexity.rescore_windows(self.benchmark, text, windows))
        return scored

    def _score_tasks(
        self, lm: LmEvalAdapter | StoredAnswers, log: EvidenceLog, name: str, progress: Progress
    ) -> ScoredBenchmark:
        """Let the harness send its requests to `lm`; `log` is the evidence of these requests."""
        scored = ScoredBenchmark([], [])
        for task in self.tasks:
            with progress.phase(f"{name} on {task.name}"), cached_templates():
                ended = self._score_task(task, lm, log, progress)
            tell_results(ended.metrics, progress)
            scored = scored.extended(ended)
        return scored

    def _score_task(
        self,
        task: PlannedTask,
        lm: LmEvalAdapter | StoredAnswers,
        log: EvidenceLog,
        progress: Progress,
    ) -> ScoredBenchmark:
        result = _run_harness(lm, task, self.benchmark)
        unanswered = unanswered_documents(task, result, log)
        rows = sample_rows(task, result, log, unanswered, lm.conversations)
        if any(unanswered.values()):
            result = answered_only(task, result, unanswered)
            progress.warn(
                f"{task.name}: {_answers(task, task.name, result, unanswered).describe()}"
            )
        metrics, missing = settled_metrics(self.benchmark, task, result, unanswered)
        of_leaves = {leaf: [row for row in rows if row["task"] == leaf] for leaf in task.tasks}
        evidence = {
            leaf: task_evidence(leaf, found, log.settings.get(leaf))
            for leaf, found in of_leaves.items()
        }

        def truncated(name: str) -> int:
            return sum(evidence[leaf].truncated for leaf in _leaf_tasks(task, name))

        counted = [m.model_copy(update={"truncated": truncated(m.task)}) for m in metrics]
        return ScoredBenchmark(counted, rows, missing=missing, evidence=list(evidence.values()))


def plan_text(benchmark: BenchmarkConfig, *, offline: bool) -> TextHarness:
    """Find and load all tasks and texts of a benchmark.

    Raises:
        MissingData: data are neither cached nor reachable on the hub.
        UserError: the config names a task, metric, file or text that does not exist or does not
            fit.
    """
    use_sandboxed_templates()
    outlines = planned_tasks.outline_tasks(benchmark)
    known = {
        name for each in outlines for leaf in each.leaves for name in each.chain(leaf.task_name)
    }
    refuse_unknown_tasks(benchmark, known)
    texts = benchmark.perplexity
    hub_texts = any(text.text != "english" and not text.path for text in texts.values())
    go_offline_if_needed(offline=offline, needs_hub=reads_hub(benchmark) or hub_texts)

    def load_text(name: str) -> PlannedText:
        with quiet_lm_eval():
            return task_data.load_perplexity_text(name, texts[name])

    missing: list[str] = []
    named = {outline.name: outline for outline in outlines}
    tasks = collect(named, lambda name: planned_tasks.build_task(named[name], benchmark), missing)
    loaded = collect(texts, load_text, missing)
    refuse_missing_data(
        benchmark, missing, "benchmark.data.TASK=PATH, benchmark.perplexity.NAME.path=PATH"
    )
    return TextHarness(benchmark, tuple(tasks), tuple(loaded))


def _run_harness(lm: LM, planned: PlannedTask, benchmark: BenchmarkConfig) -> HarnessResult:
    """Let lm-eval build requests, collect responses and aggregate."""
    from lm_eval.evaluator import evaluate

    for task in planned.tasks.values():
        task.set_fewshot_seed(SEED)
    # The bootstrap prints, but standard output is reserved for the command (`--json`).
    with quiet_lm_eval(), redirect_stdout(io.StringIO()), bootstrap_in_this_process():
        result: HarnessResult = evaluate(
            lm,
            {"tasks": planned.tasks, "groups": planned.groups},
            limit=benchmark.limit,
            bootstrap_iters=_BOOTSTRAP_RESAMPLES,
            log_samples=True,
            system_instruction=benchmark.system_prompt or None,
            apply_chat_template=benchmark.chat_template,
            fewshot_as_multiturn=benchmark.fewshot_as_multiturn,
        )
    return result


@contextmanager
def bootstrap_in_this_process() -> Iterator[None]:
    """Prevent lm-eval from forking this process, which uses a device and threads."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def answered_only(
    planned: PlannedTask, result: HarnessResult, unanswered: Unanswered
) -> HarnessResult:
    """Let lm-eval aggregate again over the documents with an answer.

    The numbers of a task without any answer are kept, because lm-eval cannot aggregate an empty
    set; `settled_metrics` drops them.
    """
    from lm_eval.evaluator_utils import _process_results

    accumulated = {}
    for name, samples in result["samples"].items():
        kept = [sample for sample in samples if sample["doc_id"] not in unanswered[name]]
        raw: dict[tuple[str, str], list[object]] = defaultdict(list)
        for sample in kept or samples:
            for metric in sample["metrics"]:
                raw[metric, sample["filter"]].append(sample[metric])
        accumulated[name] = {
            "task": planned.tasks[name], "raw_metrics": raw, "logged_samples": samples
        }  # fmt: skip
    with quiet_lm_eval(), redirect_stdout(io.StringIO()), bootstrap_in_this_process():
        collected = _process_results(accumulated, planned.groups, _BOOTSTRAP_RESAMPLES)
        again: HarnessResult = collected._to_eval_results(samples=collected.samples)
    return again


def settled_metrics(
    benchmark: BenchmarkConfig,
    planned: PlannedTask,
    result: HarnessResult,
    unanswered: Unanswered,
) -> tuple[list[Metric], list[MissingMeasurement]]:
    """Return every metric of a task or group, without a value where too few rows are answered."""
    metrics: list[Metric] = []
    missing: list[MissingMeasurement] = []
    by_name: dict[str, list[Metric]] = defaultdict(list)
    for metric in task_metrics(benchmark, planned, result):
        by_name[metric.task].append(metric)
    for name, found in by_name.items():
        parts = [_answers(planned, leaf, result, unanswered) for leaf in _leaf_tasks(planned, name)]
        # If a task of a group has no answer at all, the group's number would be without that task.
        whole = all(part.suffice(1.0) for part in parts)
        settled, gaps = settle_metrics(
            found,
            _answers(planned, name, result, unanswered),
            benchmark.allow_missing if whole else 0.0,
        )
        metrics += settled
        missing += gaps
    return metrics, missing


def _answers(
    planned: PlannedTask, name: str, result: HarnessResult, unanswered: Unanswered
) -> TaskAnswers:
    """Count the rows of a task, or of all tasks of a group, and list those without an answer."""
    leaves = _leaf_tasks(planned, name)
    scored = [{sample["doc_id"] for sample in result["samples"][leaf]} for leaf in leaves]
    return TaskAnswers(
        sum(map(len, scored)),
        {
            str(document) if leaf == planned.name else f"{leaf} {document}": reason
            for leaf in leaves
            for document, reason in unanswered[leaf].items()
        },
    )


def task_metrics(
    benchmark: BenchmarkConfig, planned: PlannedTask, result: HarnessResult
) -> list[Metric]:
    """Return every metric that the harness reports for a task, or for a group and its tasks."""
    metrics: list[Metric] = []
    for name, scores in result["results"].items():
        # Keys are `METRIC,FILTER` for values, `METRIC_stderr,FILTER` for standard errors, and
        # without a comma for labels and counts.
        keys = [key for key in scores if "," in key and "_stderr," not in key]
        headline = _headline_key(planned, name, keys)
        metrics += [
            _metric(benchmark, planned, result, name, key, headline=key == headline) for key in keys
        ]
    return metrics


def _headline_key(planned: PlannedTask, name: str, keys: Sequence[str]) -> str | None:
    if name not in planned.headlines:
        return None
    metric, through = planned.headlines[name]
    candidates = [key for key in keys if key.partition(",")[0] == metric]
    return next((key for key in candidates if through in (None, key.partition(",")[2])), None)


def _metric(
    benchmark: BenchmarkConfig,
    planned: PlannedTask,
    result: HarnessResult,
    name: str,
    key: str,
    *,
    headline: bool,
) -> Metric:
    metric, _, through = key.partition(",")
    scores = result["results"][name]
    # "N/A" if the harness has computed no value.
    error = scores.get(f"{metric}_stderr,{through}")
    better = result["higher_is_better"].get(name, {}).get(metric)
    version = result["versions"].get(name)
    leaves = _leaf_tasks(planned, name)
    return task_metric(
        benchmark,
        name,
        metric,
        aggregate_number(scores[key]),
        through=through,
        shots=int(result["n-shot"].get(name) or 0),
        split=common_split({evaluated_split(vars(planned.tasks[leaf].config)) for leaf in leaves}),
        stderr=float(error) if isinstance(error, float) else None,
        n=sum(result["n-samples"][leaf]["effective"] for leaf in leaves),
        # None counts as True, which holds for nearly all metrics of lm-eval.
        higher_is_better=better is not False,
        headline=headline,
        task_version=None if version in (None, "N/A") else str(version),
    )


def _leaf_tasks(planned: PlannedTask, name: str) -> list[str]:
    """Return the tasks of a row: the task itself, or the tasks of a group."""
    if name in planned.tasks:
        return [name]
    return [task.task_name for task in planned.groups[name].get_all_tasks()]


def use_sandboxed_templates() -> None:
    """Sandbox lm-eval's templates, because those of a task folder may be untrusted."""
    plain = lm_eval.utils.env
    if isinstance(plain, SandboxedEnvironment):
        return
    sandboxed = SandboxedEnvironment(
        loader=plain.loader,
        undefined=plain.undefined,
        keep_trailing_newline=plain.keep_trailing_newline,
    )
    sandboxed.filters.update(plain.filters)
    lm_eval.utils.env = sandboxed


@contextmanager
def cached_templates() -> Iterator[None]:
    """Cache compiled templates inside the `with` block, which does not change prompts."""
    environment = lm_eval.utils.env
    # Safe, because a compiled template has no state and the environment is a module global.
    environment.from_string = functools.cache(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # The instance attribute, which hides the class's method.
