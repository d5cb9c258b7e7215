"""Rules for reading a record's numbers, shared by all reports.

They determine how a metric is shown, when two metrics are comparable, and how to describe what was
scored and what the methods did to the weights.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from bench.records.leaves import flat_items
from bench.records.record import AVERAGE, standing_effects

if TYPE_CHECKING:
    from bench.records import AppliedMethod, Metric, Record

PERCENT_METRICS = frozenset(
    {"acc", "acc_norm", "exact_match", "f1", "mean", "mc1", "mc2"}
    | {"pope_accuracy", "pope_accuracy_mean", "pope_f1_score", "mmbench_accuracy"}
    | {"mme_perception_share"}
)
"""Metrics that are fractions and shown in %."""
NORMAL_QUANTILE = 1.959963984540054
"""97.5 % quantile of the standard normal distribution, half of a 95 % interval in standard errors.
A constant, so that reports do not have to import scipy."""
HARNESS_LIBRARIES = {"lm_eval": "lm-eval", "lmms_eval": "lmms-eval", "images": "slimbench"}
"""Library whose version is part of a number's identity, by harness."""
MAX_NAMED = 3
"""Maximum number of tasks or files named in a heading."""
MODEL_KEYS = ("dtype", "max_length", "seed")
BENCHMARK_KEYS = (
    "tasks", "metrics", "perplexity", "num_fewshot", "limit", "overlong", "allow_missing",
    "system_prompt", "ocr_tokens", "chat_template", "chat_template_args", "fewshot_as_multiturn",
    "think_end_token", "gen_kwargs",
)  # fmt: skip
"""Keys of the benchmark config that determine what is evaluated and what counts as an answer.
Together with MODEL_KEYS, which determine what is loaded, they identify a setting."""
USUAL: dict[str, object] = {
    "overlong": "truncate", "allow_missing": 0.0, "ocr_tokens": True, "chat_template": False,
    "chat_template_args": {}, "fewshot_as_multiturn": True, "think_end_token": None,
    "gen_kwargs": {},
}  # fmt: skip
"""Values of keys that are omitted in headings and settings."""
HASH_DIGITS = 8
MAX_DIFFERENCE_CHARS = 24
"""Longer entries of a setting are represented by their start and a hash."""
DIFFERING_KNOBS = 3
"""Maximum number of knobs in a label."""
MAX_KNOB_LENGTH = 24


def metric_scale(metric: str) -> tuple[float, int]:
    """Return the factor and the number of decimals with which a metric is shown."""
    return (100.0, 1) if metric in PERCENT_METRICS else (1.0, 2)


def metric_identity(record: Record, metric: Metric) -> dict[str, object]:
    """Return everything that two comparable numbers must share, under names that users know."""
    harness = str(record.config["benchmark"].get("harness"))
    library = HARNESS_LIBRARIES.get(harness, harness)
    source = record.provenance.get("data", {}).get(metric.task) or {}
    return {
        "metric": metric.metric,
        "filter": metric.filter,
        "shots": metric.shots,
        "split": metric.split,
        "task version": metric.task_version,
        # A harness may change prompts and scoring between releases without a new task version.
        "harness": f"{library} {record.environment.get('versions', {}).get(library)}",
        "data fingerprint": source.get("fingerprint"),
        # Numbers over different subsets of the samples are not comparable.
        "samples": f"{metric.n} of {metric.n + metric.missing}" if metric.missing else metric.n,
    }


def headline_key(metric: Metric) -> tuple[str, str, str, int]:
    """Return the key of a report's row or column: numbers of one kind on one task."""
    return metric.task, metric.metric, metric.filter, metric.shots


def setting_key(record: Record) -> dict[str, str]:
    """Return everything that two comparable runs must share, by name, without unset entries."""
    benchmark, model = record.config["benchmark"], record.config.get("model", {})
    data = record.provenance.get("data", {})
    # One hash over the fingerprints of all tasks, because a setting may have dozens of them, and
    # the key is also used to name it.
    prints = [data[task].get("fingerprint") for task in sorted(data)]
    entries = {
        "model": record.model.name,
        "weights": record.model.fingerprint[:HASH_DIGITS],
        "benchmark": benchmark["name"],
        "data": _short_hash(json.dumps(prints)) if prints else None,
        **{name: model.get(name) for name in MODEL_KEYS},
        **{name: benchmark.get(name) for name in BENCHMARK_KEYS},
    }
    return {
        # Unset entries are dropped, so that records from before a key existed have the same setting
        # as those with its default.
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for name, value in entries.items()
        if value not in (None, {}, []) and not (name in USUAL and value == USUAL[name])
    }


def question_key(record: Record) -> dict[str, str]:
    """Return the setting of a run without its seed, so that all seeds of a model share it."""
    key = setting_key(record)
    if record.drawn:
        key.pop("seed", None)
        key.pop("weights", None)
    return key


def setting_names(plain: Sequence[str], keys: Sequence[dict[str, str]]) -> list[str]:
    """Name each setting by its heading, plus entries that differ between settings of this name."""
    names = []
    for name, key in zip(plain, keys, strict=True):
        others = [other for same, other in zip(plain, keys, strict=True) if same == name]
        differing = [part for part in key if any(o.get(part) != key[part] for o in others)]
        suffix = ", ".join(f"{part} {_shortened(key[part])}" for part in differing)
        names.append(f"{name} ({suffix})" if suffix else name)
    return names


def _shortened(text: str) -> str:
    # Two long texts may start alike, so a hash of the text is added.
    if len(text) <= MAX_DIFFERENCE_CHARS:
        return text
    return f"{text[: MAX_DIFFERENCE_CHARS - HASH_DIGITS - 1]} {_short_hash(text)}"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]


def model_text(record: Record) -> str:
    """Return the model's name; for a local folder, its name and the start of the weights' hash."""
    path = record.config.get("model", {}).get("path")
    if not path:
        return record.model.name
    # Folders in different places may share a name.
    weights, folder = record.model.fingerprint[:HASH_DIGITS], PurePath(path).name
    # The name of a model given as a path is its folder or file.
    known = record.model.name in (folder, PurePath(path).stem)
    return f"{record.model.name} ({'' if known else f'{folder} '}{weights})"


def answered_text(metric: Metric) -> str:
    """Return the number of samples of a metric as a suffix, empty if none is missing.

    For an average, `n` is the number of tasks and missing samples are those of these tasks.
    """
    if not metric.missing:
        return ""
    if metric.task == AVERAGE:
        return f" ({metric.n} tasks, {metric.missing} rows missing)"
    return f" (n {metric.n}, {metric.missing} missing)"


def benchmark_text(record: Record) -> str:
    """Return the benchmark with everything that distinguishes two evaluations with it.

    Embedded data and local files are included, because a benchmark has the name of its real data.
    So are shots, the limit, and the treatment of long prompts and missing answers.
    """
    benchmark = record.config["benchmark"]
    without_shots = {AVERAGE, *benchmark.get("perplexity", {})}
    shots = sorted({m.shots for m in record.metrics if m.headline and m.task not in without_shots})
    parts = list(_origins(record))
    if shots and benchmark.get("harness") != "images":
        parts.append(" and ".join(f"{count}-shot" for count in shots))
    if benchmark.get("limit") is not None:
        parts.append(f"limit {benchmark['limit']}")
    max_length = record.config.get("model", {}).get("max_length")
    if max_length is not None:
        parts.append(f"max_length {max_length}")
    parts += [
        f"{name} {benchmark[name]}"
        for name in ("overlong", "allow_missing", "chat_template", "think_end_token", "gen_kwargs")
        if benchmark.get(name, USUAL[name]) != USUAL[name]
    ]
    return f"{benchmark['name']} ({', '.join(parts)})" if parts else str(benchmark["name"])


def scored_text(record: Record) -> str:
    """Return model and benchmark as a heading for their numbers."""
    return f"{model_text(record)} on {benchmark_text(record)}"


def benchmark_names(records: Sequence[Record]) -> dict[str, str]:
    """Return the benchmark of each run by id, so that equal names mean comparable numbers.

    Runs that share a heading but differ in what was scored (tasks, metrics, data) get the entries
    in which they differ. All seeds of a model's weights count as the same model.
    """
    keys = [question_key(record) for record in records]
    names = setting_names([scored_text(record) for record in records], keys)
    return {
        record.id: name.removeprefix(f"{model_text(record)} on ")
        for record, name in zip(records, names, strict=True)
    }


def data_text(record: Record, task: str) -> str | None:
    """Return what a task was scored on if it is not the real data set, else None.

    A file is represented by its name without folder and the start of its fingerprint, because files
    in different places may share a name.
    """
    source = record.provenance.get("data", {}).get(task) or {}
    if source.get("origin") == "embedded":
        return f"embedded {source['location']}"
    if source.get("origin") != "file":
        return None
    name, digest = PurePath(source["location"]).name, source.get("fingerprint") or ""
    return f"{name} {digest[:HASH_DIGITS]}".rstrip()


def _origins(record: Record) -> Iterator[str]:
    """Yield what distinguishes the data of a run from the real data sets."""
    data = record.provenance.get("data", {})
    embedded = [task for task, source in data.items() if source.get("origin") == "embedded"]
    files = [task for task, source in data.items() if source.get("origin") == "file"]
    if embedded:
        # With only a few other tasks it is clearer to name the tasks.
        yield "embedded data" if len(embedded) == len(data) else f"embedded: {_listed(embedded)}"
    if files:
        named = [f"{task} from {data_text(record, task)}" for task in files]
        yield _listed(named)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def effect_text(methods: Sequence[AppliedMethod]) -> str:
    """Return what was done to the weights, such as `removed+quantized`, or an empty string."""
    return "+".join(standing_effects(methods))


def run_knobs(record: Record) -> dict[str, object]:
    """Return what determines a run besides its model, benchmark and seed, by dotted name.

    These are the knobs of its methods, and the settings of calibration text and images that they
    read.
    """
    found = {
        name: value
        for method in record.methods
        for name, value in flat_items(method.name, method.config)
    }
    for group in ("calibration", "prompts"):
        # A config has both groups whether or not a method reads them, which the provenance shows.
        settings = record.config.get(group)
        if record.provenance.get(group) is None or not isinstance(settings, dict):
            continue
        # A source that equals the name adds nothing.
        unsaid = {"seed", *(("source",) if settings.get("source") == settings.get("name") else ())}
        found |= {f"{group}.{key}": each for key, each in settings.items() if key not in unsaid}
    return found


def differing_names(knobs: Sequence[Mapping[str, object]]) -> dict[str, str]:
    """Return the dotted knobs in which runs differ, each with the shortest distinct name.

    The name is the knob's last part if that is sufficient, else the whole dotted name.
    """
    names = dict.fromkeys(name for each in knobs for name in each)
    differing = [n for n in names if any(each.get(n) != knobs[0].get(n) for each in knobs)]
    tails = {name: name.rpartition(".")[2] for name in differing}
    shared = Counter(tails.values())
    # A bare `rows` would not show whether it belongs to calibration text or prompts.
    inputs = ("calibration.", "prompts.")
    return {
        name: name if shared[tail] > 1 or name.startswith(inputs) else tail
        for name, tail in tails.items()
    }


def distinct_labels(group: Sequence[Record]) -> dict[str, str]:
    """Return the label of each run by id; equal labels are extended by the knobs that differ."""
    alike: dict[str, list[Record]] = defaultdict(list)
    for record in group:
        alike[record.label].append(record)
    found = {}
    for label, records in alike.items():
        knobs = [_knob_texts(record) if len(records) > 1 else {} for record in records]
        shown = differing_names(knobs)
        for record, each in zip(records, knobs, strict=True):
            said = [f"{shown[n]} {each[n]}" for n in shown if n in each][:DIFFERING_KNOBS]
            found[record.id] = f"{label}, {', '.join(said)}" if said else label
    return found


def differing_settings(group: Sequence[Record]) -> dict[str, str]:
    """Return, by id, the settings that best tell each run from the others, if any.

    Settings with more different values come first, because only a few are named. All settings in
    the config that determine a run count, even if its methods do not read them.
    """
    settings = [
        run_knobs(record)
        | {
            name: value
            for key in dict.fromkeys(["seed", "benchmark", *record.config])
            if key not in UNTELLING
            for name, value in flat_items(key, record.config.get(key))
            # `auto` gives the same results as the value that it resolves to.
            if name != "model.device"
        }
        for record in group
    ]
    shown = differing_names(settings)
    names = sorted(shown, key=lambda name: -len({str(own.get(name)) for own in settings}))
    found = {}
    for record, own in zip(group, settings, strict=True):
        said = [f"{shown[n]} {_shortened_knob(str(own[n]))}" for n in names if n in own]
        found[record.id] = ", ".join(said[:DIFFERING_KNOBS])
    return found


UNTELLING = frozenset({
    "calibration", "force", "keep_weights", "method", "objective", "offline", "packages", "prompts",
    "ratio", "results_dir", "threads", "tracker",
})  # fmt: skip
"""Parts of a config that do not affect results, or that are covered by the methods' knobs."""


def _knob_texts(record: Record) -> dict[str, str]:
    """Return the settings that may differ between runs of one label, as short texts."""
    knobs = {**run_knobs(record), "seed": record.config.get("seed")}
    return {key: _shortened_knob(str(value)) for key, value in knobs.items()}


def _shortened_knob(text: str) -> str:
    # Most values are numbers or single words, for which the search below is skipped to save time.
    plain = len(text) <= MAX_KNOB_LENGTH and text.isalnum()
    return text if plain else textwrap.shorten(text, MAX_KNOB_LENGTH)
