"""Demand of each task of a planned benchmark: tokens, pairs and calls. No weight is read.

The harness sends its requests to an adapter whose scorer computes nothing, so that tokenization,
truncation and packing are those of a run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import lm_eval.evaluator_utils
from lm_eval.api.instance import Instance

from bench.evaluation import batching
from bench.evaluation.batching import AdaptiveBatches
from bench.evaluation.harness import SEED
from bench.evaluation.images import MAX_AUTO_CLASSIFIED, ImageHarness
from bench.evaluation.task_planning import quiet_lm_eval
from bench.evaluation.text import perplexity
from bench.evaluation.text.adapter import LmEvalAdapter
from bench.evaluation.text.chat import ChatRenderer, select_template
from bench.evaluation.text.generation import GenerationSettings
from bench.evaluation.text.lm_eval import TextHarness, cached_templates
from bench.evaluation.text.prefix.packing import PrefixGroup, batch_length, group_by_prefix
from bench.evaluation.text.prefix.support import static_reason
from bench.evaluation.text.prefix.trie import Trie
from bench.evaluation.text.requests import Loglikelihood, LoglikelihoodRequest, Loglikelihoods
from bench.models.network import sliding_window, text_config
from bench.records.index import index_table, samples_table
from bench.records.store import SAMPLES, Store
from bench.ui import SILENT

if TYPE_CHECKING:
    from bench.evaluation.multimodal.lmms_eval import MultimodalHarness
    from bench.evaluation.text.planned_tasks import PlannedTask
    from bench.models.model import Model
    from bench.schema import BenchmarkConfig

SAMPLED_DOCUMENTS = 96
"""Number of documents per task whose requests are built, as a sample of all."""
_SEARCHED_RECORDS = 20
"""Records whose samples are read, newest first, to find how long the answers of tasks are."""
_OTHER_METHODS = 1.25
"""Factor by which answers may be shorter or longer than those of the model with other methods."""


@dataclass(frozen=True)
class TaskDemand:
    """What a task requires of a network.

    `given` is the number of tokens of all requests, `computed` the number that the network
    processes; `shared` is their difference, saved by prefix sharing. `pairs` are of queries and
    keys, `rows` are of logits, `calls` are forwards. `written` is the minimum and maximum number of
    generated tokens, in `steps` forwards with one token per row. `images` is the number of encoded
    images. `seconds` is the time of Python to build the requests. `sampled` is true if only some
    documents were used.
    """

    name: str
    documents: int = 0
    requests: int = 0
    given: float = 0.0
    computed: float = 0.0
    pairs: float = 0.0
    rows: float = 0.0
    calls: float = 0.0
    written: tuple[float, float] = (0.0, 0.0)
    steps: tuple[float, float] = (0.0, 0.0)
    images: int = 0
    seconds: float = 0.0
    sampled: bool = False
    widest: float = 0.0

    @property
    def shared(self) -> float:
        """Number of tokens that are not computed because they are a prefix of another request."""
        return max(0.0, self.given - self.computed)

    def scaled(self, share: float) -> TaskDemand:
        """Return the demand of all documents, of which this is the given share."""
        if share == 1:
            return self
        times = 1 / share
        return replace(
            self,
            **{
                name: getattr(self, name) * times
                for name in ("given", "computed", "pairs", "rows", "calls", "seconds")
            },
            requests=round(self.requests * times),
            written=(self.written[0] * times, self.written[1] * times),
            steps=(self.steps[0] * times, self.steps[1] * times),
            sampled=True,
        )


@dataclass(frozen=True)
class RecordedAnswers:
    """Tokens of a task's generated answers in an earlier run, longest prompt first.

    `exact` says that the run had the same methods, so that its answers are repeated.
    """

    lengths: tuple[int, ...]
    exact: bool

    def demand(self, demand: TaskDemand) -> TaskDemand:
        """Return the demand with answers of these lengths instead of all that are possible."""
        size = max(1, round(demand.requests / max(1.0, demand.calls)))
        # A batch takes as many forwards as its longest answer has tokens.
        longest = [max(self.lengths[at : at + size]) for at in range(0, len(self.lengths), size)]
        written = demand.requests * sum(self.lengths) / len(self.lengths)
        steps = demand.calls * sum(longest) / len(longest)
        return replace(
            demand,
            written=self._bounds(written, demand.written),
            steps=self._bounds(steps, demand.steps),
        )

    def _bounds(self, value: float, possible: tuple[float, float]) -> tuple[float, float]:
        least, most = possible
        spread = 1.0 if self.exact else _OTHER_METHODS
        return min(most, max(least, value / spread)), min(most, max(least, value * spread))


class AnswerRecords:
    """Answers in a folder of records; those found once are not searched again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._found: dict[tuple[str, str, str], RecordedAnswers] = {}

    def applied(
        self, tasks: Sequence[TaskDemand], model: str, methods: str
    ) -> tuple[TaskDemand, ...]:
        """Replace the possible lengths of answers by those that the model gave, where it has.

        `methods` is their name in the index of records (`methods_name`). The newest record with the
        same methods counts, else the newest with others.
        """
        # Answers with the same methods remain; a sweep may record better ones than others.
        unknown = {
            task.name
            for task in tasks
            if task.written[0] < task.written[1]
            and not ((known := self._found.get((model, methods, task.name))) and known.exact)
        }
        if unknown:
            self._search(model, methods, unknown)
        found = [self._found.get((model, methods, task.name)) for task in tasks]
        return tuple(
            task if answers is None else answers.demand(task)
            for task, answers in zip(tasks, found, strict=True)
        )

    def _search(self, model: str, methods: str, tasks: set[str]) -> None:
        runs: dict[str, str] = {}
        table = index_table(self._store).select(["run", "model", "methods", "task"])
        for row in reversed(table.to_pylist()):
            if row["model"] == model and row["task"] in tasks:
                runs.setdefault(row["run"], row["methods"])
        # Stable, so that the newest of each kind remain first.
        ordered = sorted(runs, key=lambda run: runs[run] != methods)[:_SEARCHED_RECORDS]
        for run in ordered:
            if not tasks:
                break
            for task, lengths in _answer_lengths(self._store, run).items():
                if task in tasks:
                    tasks.remove(task)
                    answers = RecordedAnswers(lengths, runs[run] == methods)
                    self._found[model, methods, task] = answers


def _answer_lengths(store: Store, run: str) -> dict[str, tuple[int, ...]]:
    """Return the tokens of a run's generated answers by task, longest prompt first."""
    try:
        samples = samples_table(store.folder(run) / SAMPLES)
        columns = ["task", "doc_id", "prompt_tokens", "answer_tokens", "finish_reasons"]
        rows = samples.select(columns).to_pylist()
    # Removed or damaged since, or without these columns because nothing was generated.
    except (OSError, ValueError, KeyError):
        return {}
    answers: dict[str, list[tuple[int, int]]] = {}
    seen: set[tuple[str, int]] = set()
    for row in rows:
        # A task with several filters has as many rows of the same answers.
        key = (row["task"], row["doc_id"])
        if row["finish_reasons"] and key not in seen:
            seen.add(key)
            pairs = zip(row["prompt_tokens"] or (), row["answer_tokens"] or (), strict=False)
            answers.setdefault(row["task"], []).extend(pairs)
    return {
        task: tuple(answer for _, answer in sorted(pairs, reverse=True))
        for task, pairs in answers.items()
        if pairs
    }


@dataclass
class _RequestLog:
    """A scorer that computes nothing and stores the requests."""

    requests: list[LoglikelihoodRequest] = field(default_factory=list)

    def score(self, requests: Sequence[LoglikelihoodRequest]) -> Iterator[Loglikelihoods]:
        self.requests += requests
        yield [(index, Loglikelihood(0.0, greedy=False)) for index in range(len(requests))]


class _Listener(LmEvalAdapter):
    """The adapter of a run with empty answers; `contexts` are prompts for generation."""

    def __init__(self, model: Model, benchmark: BenchmarkConfig) -> None:
        self.log = _RequestLog()
        template = select_template(benchmark, model.tokenizer, model.name)
        chat = ChatRenderer(model.tokenizer, template, benchmark.chat_template_args, SILENT)
        super().__init__(
            model,
            batching.MAX_AUTO_ROWS if benchmark.batch_size == "auto" else benchmark.batch_size,
            SILENT,
            benchmark.backend,
            # Prompt lengths are not checked here, because the run itself reports them.
            overlong="truncate",
            chat=chat,
            scorer=self.log,
        )
        self.contexts: list[tuple[int, int]] = []

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        for request in requests:
            prompt = self._fit_prompt(request)
            limit = GenerationSettings(self._model, request.args[1], None).new_tokens
            self.contexts.append((len(prompt.tokens), limit))
        return ["" for _ in requests]


def task_demands(harness: object, model: Model, memory: float) -> Iterator[TaskDemand]:
    """Yield the demand of each task; `model` is on the meta device, `memory` is free bytes.

    Raises:
        UserError: a request does not fit the model.
    """
    if isinstance(harness, ImageHarness):
        yield _images(harness)
    elif isinstance(harness, TextHarness):
        yield from _texts(harness, model, memory)
    else:
        yield from _questions(cast("MultimodalHarness", harness))


def _images(harness: ImageHarness) -> TaskDemand:
    count, size = len(harness.scored), harness.benchmark.batch_size
    batch = MAX_AUTO_CLASSIFIED if size == "auto" else size
    name = harness.splits.name
    calls = -(-count // batch)
    return TaskDemand(name, count, count, count, count, calls=calls, widest=min(count, batch))


def _texts(harness: TextHarness, model: Model, memory: float) -> Iterator[TaskDemand]:
    budget = _token_budget(model, memory)
    for task in harness.tasks:
        listener = _Listener(model, harness.benchmark)
        began = time.perf_counter()
        documents, share = _build_requests(task, harness.benchmark, listener)
        seconds = time.perf_counter() - began
        demand = _packed(task.name, listener, model, harness.benchmark, budget)
        yield replace(demand, documents=round(documents / share), seconds=seconds).scaled(share)
    for text in harness.texts:
        windows = perplexity.cut_windows(
            model, text, text.config.windows or harness.benchmark.limit
        )
        width, count = text.config.window, len(windows)
        size = perplexity.windows_per_batch(text, harness.benchmark, model.device)
        tokens, calls = float(width * count), -(-count // size)
        yield TaskDemand(
            text.name, count, count, tokens, tokens, float(width**2 * count), tokens, calls,
            widest=float(width * min(size, count)),
        )  # fmt: skip


def _build_requests(
    planned: PlannedTask, benchmark: BenchmarkConfig, listener: _Listener
) -> tuple[int, float]:
    """Send a task's requests to a listener; return the number of documents and their share."""
    documents = whole = 0
    with quiet_lm_eval(), cached_templates():
        instances_by_type: dict[str, list[Instance]] = {}
        for task in planned.tasks.values():
            task.set_fewshot_seed(SEED)
            inner = cast(Any, task)
            limit = lm_eval.evaluator_utils.get_sample_size(inner, benchmark.limit)
            # Read once, because a task may process all of its documents on every access.
            every = len(inner.eval_docs)
            count = min(every, limit or every)
            # Evenly spaced, because similar documents are often adjacent.
            stride = max(1, count // SAMPLED_DOCUMENTS)
            chosen = list(range(0, count, stride))
            inner.build_all_requests(
                samples=chosen,
                rank=0,
                world_size=1,
                system_instruction=benchmark.system_prompt or None,
                apply_chat_template=bool(benchmark.chat_template),
                fewshot_as_multiturn=benchmark.fewshot_as_multiturn,
                chat_template=listener.apply_chat_template if benchmark.chat_template else None,
            )
            documents, whole = documents + len(chosen), whole + count
            for instance in inner.instances:
                instances_by_type.setdefault(instance.request_type, []).append(instance)
        for kind, instances in instances_by_type.items():
            getattr(listener, kind)(instances)
    return documents, documents / whole


def _token_budget(model: Model, memory: float) -> int:
    """Return the tokens per batch, chosen as in a run with this much free memory."""
    dtype = next(model.network.parameters()).dtype
    return batching.fitting_tokens(text_config(model.network), dtype, model.device.type, memory)


def _packed(
    name: str, listener: _Listener, model: Model, benchmark: BenchmarkConfig, budget: int
) -> TaskDemand:
    """Return the demand of a listener's requests, packed as the backend packs them."""
    requests = listener.log.requests
    size, device = benchmark.batch_size, model.device
    if size == "auto":
        batches = AdaptiveBatches(batching.MAX_AUTO_ROWS, device, SILENT, budget)
    else:
        batches = AdaptiveBatches(size, device, SILENT)
    given = float(sum(len(inputs) for inputs, _ in requests))
    rows = float(sum(len(targets) for _, targets in requests))
    demand = TaskDemand(
        name, requests=len(requests) + len(listener.contexts), given=given, rows=rows
    )
    if requests:
        shares = benchmark.backend == "prefix_sharing" and static_reason(model) is None
        if shares:
            trie = Trie(requests)
            groups = group_by_prefix(trie, window=sliding_window(model.network))
            work = _group_work(groups, budget)
            # Choices scored at the same position share a row of logits.
            rows = min(rows, float(trie.tokens))
        else:
            lengths = sorted({tuple(inputs) for inputs, _ in requests}, key=len, reverse=True)
            work = _rows_work([len(each) for each in lengths], batches)
        computed, pairs, calls, widest = work
        demand = replace(
            demand, computed=computed, pairs=pairs, calls=calls, rows=rows, widest=widest
        )
    return _with_generation(demand, listener.contexts, batches)


def _group_work(groups: Sequence[PrefixGroup], budget: int) -> tuple[float, float, float, float]:
    """Return tokens, pairs and calls of prefix groups, and the tokens of the widest call."""
    tokens = pairs = calls = widest = 0.0
    for group in groups:
        before = group.prefix.stop if group.prefix else 0
        if group.prefix is not None:
            own = group.prefix.stop - group.prefix.start
            tokens, pairs, calls = tokens + own, pairs + own * before, calls + 1
        for is_path in (True, False):
            sizes = [s.size for s in group.sequences if s.is_path == is_path]
            for width, count in _batches(sizes, budget):
                tokens, calls = tokens + width * count, calls + 1
                pairs += count * width * (width + before)
                widest = max(widest, width * count)
    return tokens, pairs, calls, widest


def _batches(sizes: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """Yield width and number of sequences per batch, as filled by the prefix-sharing scorer."""
    begin = 0
    while begin < len(sizes):
        count = batch_length(sizes[begin:], budget)
        yield sizes[begin], count
        begin += count


def _rows_work(
    lengths: Sequence[int], batches: AdaptiveBatches
) -> tuple[float, float, float, float]:
    """Return tokens, pairs and calls of padded rows, longest first."""
    tokens = pairs = calls = widest = 0.0
    begin = 0
    while begin < len(lengths):
        width = lengths[begin]
        count = min(batches.size_for(width), len(lengths) - begin)
        tokens, pairs, calls = tokens + count * width, pairs + count * width**2, calls + 1
        widest, begin = max(widest, count * width), begin + count
    return tokens, pairs, calls, widest


def _with_generation(
    demand: TaskDemand, contexts: Sequence[tuple[int, int]], batches: AdaptiveBatches
) -> TaskDemand:
    """Add generated answers: each ends at its first stop string, after at least one token."""
    if not contexts:
        return demand
    lengths = sorted((length for length, _ in contexts), reverse=True)
    tokens, pairs, calls, widest = _rows_work(lengths, batches)
    longest = max(limit for _, limit in contexts)
    return replace(
        demand,
        given=demand.given + sum(lengths),
        computed=demand.computed + tokens,
        pairs=demand.pairs + pairs,
        calls=demand.calls + calls,
        widest=max(demand.widest, widest),
        written=(float(len(contexts)), float(sum(limit for _, limit in contexts))),
        steps=(calls, calls * longest),
    )


def _questions(harness: MultimodalHarness) -> Iterator[TaskDemand]:
    """Yield tasks with images; tokens of a prompt are added if its processor is known."""
    size = harness.benchmark.batch_size
    batch = batching.MAX_AUTO_IMAGES if size == "auto" else size
    for task in harness.tasks:
        count = len(task.indices)
        options = dict(task.task.config.generation_kwargs or {})
        longest = int(options.get("max_new_tokens") or options.get("max_gen_toks") or 16)
        calls = float(-(-count // batch))
        yield TaskDemand(
            task.name, count, count, calls=calls, images=count, rows=float(count),
            written=(float(count), float(count * longest)), steps=(calls, calls * longest),
        )  # fmt: skip
