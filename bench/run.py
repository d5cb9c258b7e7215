"""One run, from top to bottom.

config -> resolve -> check -> load model -> apply methods -> evaluate -> measure -> record -> track

Nothing heavy is imported at module level, so that `import bench` and `bench --help` start at once.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.applying import apply_methods
from bench.errors import NO_ROOM, Stopped
from bench.lending import Loan, lend

if TYPE_CHECKING:
    from bench.config import RunConfig
    from bench.evaluation import Plan
    from bench.launch import Launched
    from bench.measurement.cost import Cost
    from bench.measurement.rows import Found
    from bench.measurement.subject import Subject
    from bench.models.loading import Source
    from bench.models.model import Model
    from bench.models.pristine import Pristine
    from bench.progress import Progress
    from bench.records import MethodPart, ModelPart, Record, Store
    from bench.sweep import Asked, Result

LIBRARIES = ("slimbench", "torch", "transformers", "lm-eval", "lmms-eval")


def run(overrides: Sequence[str] = ()) -> list[Record]:
    """Execute the runs that the overrides describe, as `bench run` does, and return the records.

    >>> bench.run(["model=micro_moe", "method=camera_p", "method.camera_p.ratio=0.4"])
    >>> bench.run(["-m", "method=dense,camera_p", "ratio=0.2,0.4"])

    Raises:
        UserError: the overrides are wrong, or data or weights are missing.
        RunsFailed: no run succeeded.
    """
    return start(overrides).records


def start(overrides: Sequence[str]) -> Launched:
    """Like `run`, but also return failures, warnings and the number of reused records."""
    from bench.launch import launch

    return launch(list(overrides), check, execute)


def go_on(results_dir: Path, sweep: str) -> Launched:
    """Run the missing and failed jobs of a sweep; `sweep` is its name or a prefix of it."""
    from bench.launch import resume
    from bench.sweep.plan import find

    return resume(find(results_dir.absolute(), sweep), execute)


def check(config: RunConfig) -> list[Path] | None:
    """Refuse a run that cannot work, before anything is loaded or written.

    Returns the files that decide the run; None if data on a hub, which may change, do too.
    """
    from bench.records import Store

    Store(config.results_dir).ensure_writable()
    inputs = resolve(config)
    return None if inputs.may_change(config) else inputs.files(config)


@dataclass(frozen=True)
class Inputs:
    """Everything that a run reads, found and fingerprinted, with no weights loaded yet."""

    id: str
    source: Source
    plan: Plan
    loan: Loan
    versions: dict[str, str]

    def may_change(self, config: RunConfig) -> bool:
        """Return whether the hub could return different data next time."""
        if config.offline:
            return False
        from_hub = [source.origin == "hub" for source in self.plan.sources.values()]
        # A model is fixed only if the config names the commit itself; a branch such as main may
        # move.
        from_hub.append(self.source.revision not in (None, config.model.revision))
        return any(from_hub) or self.loan.may_change(config)

    def files(self, config: RunConfig) -> list[Path]:
        """Return the model's folder, and every file or folder that the config names."""
        # Any text of the config may be a path (a method's settings folder, local data), so all that
        # exist count. A file by any name, a folder only if written as a path: "digits" is a data
        # set.
        named = set(_texts(_plain(config))) - {str(config.results_dir)}
        found = [text for text in named if os.path.isfile(text) or "/" in text]  # noqa: PTH113
        return [self.source.folder, *map(Path, sorted(filter(os.path.exists, found)))]


def execute(config: RunConfig, asked: Asked) -> Result:
    """Execute one run and return its record; a recorded run is not executed again."""
    from bench.evaluation.ranks import joined
    from bench.progress import Progress
    from bench.records import Store
    from bench.sweep import Result
    from bench.tracking import track

    ranks = joined()
    progress = Progress(quiet=not ranks.is_first)
    store = Store(config.results_dir)
    with _stopping(store):
        store.ensure_writable()
    inputs = resolve(config)

    def say() -> None:
        progress.say(f"another process is executing run {inputs.id}: waiting for it")

    # Two processes with the same run: the second waits, then finds the record. Of the processes of
    # one distributed run only the first takes the lock, or they would wait for each other.
    claim = store.claim(inputs.id, on_wait=say) if ranks.is_first else nullcontext()
    with _stopping(store), claim:
        known = None if config.force else store.find(inputs.id)
        # All processes must take the same branch: one that evaluates alone would wait in an
        # exchange forever.
        known = ranks.as_the_first(known)
        if known is not None:
            return Result(known, reused=True)
        reason = store.unreadable.get(inputs.id)
        if reason and ranks.is_first:
            place = store.set_aside(inputs.id)
            progress.warn(
                f"the record of run {inputs.id} is unreadable ({reason}): running it again; "
                f"the old files are in {place}"
            )
        record = _perform(config, inputs, store, progress, asked)
    if not ranks.is_first:
        return Result(record, reused=False)
    # After the record is written and the lock released: a tracker that fails or hangs loses no
    # result and blocks no other process.
    with progress.phase(f"sending {record.id} to {config.tracker.kind}"):
        warning = track(record, store, config.tracker)
    return Result(record, reused=False, warning=warning)


def resolve(config: RunConfig) -> Inputs:
    """Find model files and data, let every method check the model, and name the run.

    Raises:
        UserError: a method does not fit the model, or a required input is missing.
    """
    from bench.device import dtype, pick
    from bench.evaluation import plan_once
    from bench.models import loading
    from bench.models.anatomy import dissect
    from bench.records import run_id

    source = loading.resolve(config.model, offline=config.offline)
    skeleton = loading.skeleton(source)
    if config.costs.measure:
        from bench.measurement.workload import refuse_unfit

        refuse_unfit(config.costs.timing, config.model, skeleton)
    anatomy = dissect(skeleton)
    for method in config.method.values():
        method.check(anatomy)
    planned = plan_once(config.benchmark, offline=config.offline)
    planned.refuse_unfit(config.model)
    loan = lend(config)

    identity = config.identity()
    device = pick(config.model.device)
    # `auto` and `cuda` are resolved first: the id must say on which kind of device and in which
    # dtype the numbers were computed.
    identity["model"] |= {
        "device": device.type,
        "dtype": str(dtype(config.model.dtype, device)).removeprefix("torch."),
    }
    found = versions()
    inputs = {
        "config": identity,
        "weights": source.fingerprint,
        "data": planned.fingerprints,
        **loan.fingerprints,
        "versions": found,
    }
    return Inputs(run_id(inputs), source, planned, loan, found)


def _perform(
    config: RunConfig, inputs: Inputs, store: Store, progress: Progress, asked: Asked
) -> Record:
    """Load, apply, evaluate, measure and write: the part of a run that takes time."""
    from bench.device import describe, seed_everything, use_threads
    from bench.evaluation import evaluate
    from bench.evaluation.memory import Memory
    from bench.evaluation.ranks import joined
    from bench.measurement.costs import phases
    from bench.measurement.measuring import measure
    from bench.models.state import state_hash
    from bench.records import CostPart, GapPart, MetricPart, Record

    started = _now()
    use_threads(config.threads)
    seed_everything(config.seed)

    with progress.phase("loading the model"):
        model = _pristine().borrow(inputs.source, will_change=bool(config.method))
    # Methods change the model in place, so the dense costs are counted first. A dense run counts
    # after evaluating, so that the first scores do not wait for it.
    before = _counted(model, config, progress) if config.method else None
    own = store.unfinished(inputs.id, joined().number)
    context = inputs.loan.to(config, model, progress, own)
    methods = apply_methods(config, model, context)
    # The journal is keyed by the weights after the methods: responses of a killed run are reused
    # only if applying the methods again gave exactly the same network.
    with store.journal(inputs.id, state_hash(model.network), joined().number) as journal:
        for note in journal.notes:
            progress.warn(note)
        evaluation = evaluate(model, inputs.plan, progress, Memory(journal))
    after = _counted(model, config, progress)
    with progress.phase("measuring costs"):
        measured = measure(_subject(model, inputs.source, methods), config.costs, progress)

    costs = [*after.costs, *measured.costs, *_applying(methods), *phases(progress.seconds)]
    gaps = [*after.gaps, *measured.gaps]
    record = Record(
        id=inputs.id,
        started=started,
        finished=_now(),
        group=asked.group,
        command=asked.command,
        config=_plain(config),
        environment={**describe(), "versions": inputs.versions},
        model=_dense(model, (before or after).costs),
        methods=tuple(methods),
        metrics=tuple(MetricPart(**asdict(metric)) for metric in evaluation.metrics),
        costs=tuple(CostPart(**asdict(cost)) for cost in costs),
        gaps=tuple(GapPart(**asdict(gap)) for gap in gaps),
        provenance=_provenance(config, inputs) | {"engine": evaluation.engine},
    )
    if joined().is_first:
        with progress.phase("writing the record"):
            store.write(record, evaluation.samples, _yaml(config))
    return record


def _counted(model: Model, config: RunConfig, progress: Progress) -> Found:
    from bench.measurement.costs import count

    with progress.phase("counting costs"):
        return count(model, config.costs)


def _subject(model: Model, source: Source, methods: Sequence[MethodPart]) -> Subject:
    """Return the models to measure, and whether a gain in time may be claimed."""
    from bench.measurement.subject import Subject
    from bench.records import unreal

    if not methods:
        return Subject(model)
    dense = _pristine().beside(source)
    missing = None if dense else "the dense model did not fit into memory next to this one"
    return Subject(model, dense, no_gain=unreal(methods) or missing)


def _applying(methods: Sequence[MethodPart]) -> list[Cost]:
    """Return the peak memory of each method while it was applied."""
    from bench.measurement.cost import Cost

    return [
        Cost(f"phase applying {method.name}", "peak_bytes", "B", method.peak_bytes, "measured")
        for method in methods
        if method.peak_bytes is not None
    ]


@contextmanager
def _stopping(store: Store) -> Iterator[None]:
    """Convert out-of-space errors into `Stopped`, so that a later run can resume."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise Stopped(
            f"results_dir={store.root}: {error.strerror}; "
            "free some space and run the same command to resume"
        ) from error


def _dense(model: Model, costs: Sequence[Cost]) -> ModelPart:
    """Describe the model as it was before any method changed it."""
    from bench.records import ModelPart

    counted = {cost.quantity: cost.value for cost in costs}
    return ModelPart(
        name=model.name,
        source=model.config.source,
        revision=model.revision,
        fingerprint=model.fingerprint,
        architecture=model.anatomy.architecture,
        parameters=int(counted["parameters"]),
        bytes=int(counted["bytes"]),
    )


def _provenance(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """Return the origin of every input, so that the numbers can be traced."""
    return {
        "data": inputs.plan.provenance,
        **inputs.loan.fingerprints,
        "seed": config.seed,
        "git_commit": _git_commit(),
    }


@functools.cache
def _pristine() -> Pristine:
    """Return the loaded base model that all runs of this process share."""
    from bench.models.pristine import Pristine

    return Pristine()


def _plain(config: RunConfig) -> dict[str, Any]:
    """Return the config as JSON values, each method with its knobs."""
    plain: dict[str, Any] = config.model_dump(mode="json", exclude={"method"})
    plain["method"] = {name: m.model_dump(mode="json") for name, m in config.method.items()}
    return plain


def _texts(node: Any) -> Iterator[str]:
    """Yield every string in a tree of JSON values."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from _texts(inner)


def _yaml(config: RunConfig) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(_plain(config)))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@functools.cache
def versions() -> dict[str, str]:
    """Return the library versions that are part of a run's id."""
    # Cached: imported libraries keep their version even if the installation changes meanwhile.
    return {name: version(name) for name in LIBRARIES}


@functools.cache
def _git_commit() -> str | None:
    """Return the commit of the working tree that contains this package, None if installed."""
    import subprocess

    here = Path(__file__).parent
    asked = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=False)
    except OSError:
        return None
    return answer.stdout.strip() or None
