"""One run, from top to bottom.

find inputs -> reuse a record -> load the model -> apply methods -> evaluate -> measure -> record
-> track

Modules that need torch are imported inside functions, so that a finished sweep is answered without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from bench.evaluation import evaluate
from bench.evaluation.response_cache import ResponseCache
from bench.records import Record, Store, without_real_saving
from bench.records.atomic_files import disk_errors_as_stopped
from bench.records.record import utc_now
from bench.runner.inputs import RunInputs, resolve_run
from bench.runner.method_application import apply_methods
from bench.runner.record_builder import (
    chat_template_of,
    code_revision,
    config_yaml,
    describe_dense_model,
    method_memory_costs,
    provenance_of,
)
from bench.sweeps import RunRequest, RunResult
from bench.tracking.tracker import track
from bench.ui import Progress

if TYPE_CHECKING:
    from bench.config.run_config import RunConfig
    from bench.measurement.quantities import MeasuredPair
    from bench.models.model import Model
    from bench.models.source import ModelSource
    from bench.records import AppliedMethod
    from bench.runner.session import Session


def execute(config: RunConfig, request: RunRequest, session: Session) -> RunResult:
    """Execute one run and return its record; a recorded run is not executed again."""
    processes = session.process_group
    progress = Progress(quiet=not processes.is_first)
    store = Store(config.results_dir)
    with disk_errors_as_stopped(store.root):
        store.ensure_writable()
    inputs = resolve_run(config, session)

    with disk_errors_as_stopped(store.root), _claim(store, inputs.id, session, progress):
        known = None if config.force else store.find(inputs.id)
        # All processes must take the same branch: one that evaluates alone would wait in an
        # exchange forever.
        known = processes.broadcast(known)
        if known is not None:
            return RunResult(known, reused=True)
        if processes.is_first:
            _move_unreadable_aside(store, inputs.id, progress)
        record = _execute_run(config, request, inputs, session, store, progress)

    if not processes.is_first:
        return RunResult(record, reused=False)
    # After the record is written and the lock released: a tracker that fails or hangs loses no
    # result and blocks no other process.
    with progress.phase(f"sending {record.id} to {config.tracker.kind}"):
        warning = track(record, store, config.tracker)
    return RunResult(record, reused=False, warning=warning)


def _execute_run(
    config: RunConfig,
    request: RunRequest,
    inputs: RunInputs,
    session: Session,
    store: Store,
    progress: Progress,
) -> Record:
    """Load, apply, evaluate, measure and write: the part of a run that takes time."""
    from bench.device.devices import describe_device, seed_everything, set_threads
    from bench.measurement.costs import count_costs, measure_costs, phase_costs
    from bench.models.hashing import state_hash

    processes = session.process_group
    started = utc_now()
    # Asked now: by the end of a long run the working tree may have moved on.
    code_revision()
    set_threads(config.threads)
    seed_everything(config.seed)

    with progress.phase("loading the model"):
        model = session.base_model.acquire(inputs.source, will_change=bool(config.method))

    # Methods change the model in place. All that a record says about the dense model is its size;
    # its costs are those of the dense run.
    dense = describe_dense_model(model)
    checkpoints = store.unfinished(inputs.id, processes.rank)
    context = inputs.calibration_inputs.prepare(config, model, progress, checkpoints)
    methods = apply_methods(config, model, context, session)

    # The journal is keyed by the weights after the methods: responses of a killed run are reused
    # only if applying the methods again gave exactly the same network.
    weights = state_hash(model.network)
    with store.journal(inputs.id, weights, processes.rank) as journal:
        for note in journal.notes:
            progress.warn(note)
        evaluation = evaluate(model, inputs.benchmark, progress, ResponseCache(journal))

    with progress.phase("counting costs"):
        after = count_costs(model, config.costs, progress)
    with progress.phase("measuring costs"):
        pair = _measured_pair(model, methods, inputs.source, session)
        measured = measure_costs(pair, config.costs, progress)

    costs = [
        *after.costs,
        *measured.costs,
        *method_memory_costs(methods),
        *phase_costs(progress.seconds),
    ]
    record = Record(
        id=inputs.id,
        started=started,
        finished=utc_now(),
        sweep=request.sweep,
        command=request.command,
        config=config.plain(),
        environment={**describe_device(), "versions": inputs.versions},
        model=dense,
        methods=tuple(methods),
        metrics=evaluation.metrics,
        costs=tuple(costs),
        missing=(*evaluation.missing, *after.missing, *measured.missing),
        evidence=evaluation.evidence,
        provenance=provenance_of(config, inputs)
        | {"backend": evaluation.backend, "chat_template": chat_template_of(config, model)},
    )
    if processes.is_first:
        with progress.phase("writing the record"):
            store.write(record, evaluation.samples, config_yaml(config))
    return record


@contextmanager
def _claim(store: Store, run: str, session: Session, progress: Progress) -> Iterator[None]:
    """Keep other processes from executing the same run meanwhile."""

    def report_wait() -> None:
        progress.say(f"another process is executing run {run}: waiting for it")

    # Two processes with the same run: the second waits, then finds the record. Of the processes of
    # one distributed run only the first takes the lock, or they would wait for each other.
    first = session.process_group.is_first
    with store.claim(run, on_wait=report_wait) if first else nullcontext():
        yield


def _move_unreadable_aside(store: Store, run: str, progress: Progress) -> None:
    """Keep the files of a record that cannot be read, since the run will write new ones."""
    reason = store.unreadable.get(run)
    if reason:
        place = store.move_aside(run)
        progress.warn(
            f"the record of run {run} is unreadable ({reason}): running it again; "
            f"the old files are in {place}"
        )


def _measured_pair(
    model: Model, methods: Sequence[AppliedMethod], source: ModelSource, session: Session
) -> MeasuredPair:
    """Return the models to measure, and whether a gain in time may be claimed."""
    from bench.measurement.quantities import MeasuredPair

    if not methods:
        return MeasuredPair(model)
    dense = session.base_model.peek(source)
    missing = None if dense else "the dense model did not fit into memory next to this one"
    return MeasuredPair(model, dense, no_gain_reason=without_real_saving(methods) or missing)
