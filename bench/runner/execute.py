"""One run, from top to bottom.

config -> resolve -> check -> load model -> apply methods -> evaluate -> measure -> record -> track

Nothing heavy is imported at module level, so that `import bench` and `bench --help` start at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from bench.runner.inputs import RunInputs, _plain_config, check_run, resolve_run
from bench.runner.method_application import apply_methods
from bench.runner.record_builder import (
    _config_yaml,
    _dense_model,
    _method_memory_costs,
    _now,
    _provenance,
)
from bench.runner.session import _base_model_cache

if TYPE_CHECKING:
    from bench.config.run_config import RunConfig
    from bench.measurement.quantities import CostReport, MeasuredPair
    from bench.models.model import Model
    from bench.models.source import ModelSource
    from bench.records import AppliedMethod, Record, Store
    from bench.runner.launch import LaunchOutcome
    from bench.sweeps import RunRequest, RunResult
    from bench.ui import Progress


def run(overrides: Sequence[str] = ()) -> list[Record]:
    """Execute the runs that the overrides describe, as `bench run` does, and return the records.

    >>> bench.runner.execute(["model=micro_moe", "method=camera_p", "method.camera_p.ratio=0.4"])
    >>> bench.runner.execute(["-m", "method=dense,camera_p", "ratio=0.2,0.4"])

    Raises:
        UserError: the overrides are wrong, or data or weights are missing.
        RunsFailed: no run succeeded.
    """
    return launch_run(overrides).records


def launch_run(overrides: Sequence[str]) -> LaunchOutcome:
    """Like `run`, but also return failures, warnings and the number of reused records."""
    from bench.runner.launch import launch

    return launch(list(overrides), check_run, execute)


def resume_sweep(results_dir: Path, sweep: str) -> LaunchOutcome:
    """Run the missing and failed jobs of a sweep; `sweep` is its name or a prefix of it."""
    from bench.runner.launch import resume_plan
    from bench.sweeps.plan import find_sweep

    return resume_plan(find_sweep(results_dir.absolute(), sweep), execute)


def execute(config: RunConfig, asked: RunRequest) -> RunResult:
    """Execute one run and return its record; a recorded run is not executed again."""
    from bench.evaluation.distributed import current_process_group
    from bench.records import Store
    from bench.records.atomic_files import disk_errors_as_stopped
    from bench.sweeps import RunResult
    from bench.tracking.tracker import track
    from bench.ui import Progress

    ranks = current_process_group()
    progress = Progress(quiet=not ranks.is_first)
    store = Store(config.results_dir)
    with disk_errors_as_stopped(store.root):
        store.ensure_writable()
    inputs = resolve_run(config)

    def say() -> None:
        progress.say(f"another process is executing run {inputs.id}: waiting for it")

    # Two processes with the same run: the second waits, then finds the record. Of the processes of
    # one distributed run only the first takes the lock, or they would wait for each other.
    claim = store.claim(inputs.id, on_wait=say) if ranks.is_first else nullcontext()
    with disk_errors_as_stopped(store.root), claim:
        known = None if config.force else store.find(inputs.id)
        # All processes must take the same branch: one that evaluates alone would wait in an
        # exchange forever.
        known = ranks.broadcast(known)
        if known is not None:
            return RunResult(known, reused=True)
        reason = store.unreadable.get(inputs.id)
        if reason and ranks.is_first:
            place = store.move_aside(inputs.id)
            progress.warn(
                f"the record of run {inputs.id} is unreadable ({reason}): running it again; "
                f"the old files are in {place}"
            )
        record = _execute_run(config, inputs, store, progress, asked)
    if not ranks.is_first:
        return RunResult(record, reused=False)
    # After the record is written and the lock released: a tracker that fails or hangs loses no
    # result and blocks no other process.
    with progress.phase(f"sending {record.id} to {config.tracker.kind}"):
        warning = track(record, store, config.tracker)
    return RunResult(record, reused=False, warning=warning)


def _execute_run(
    config: RunConfig, inputs: RunInputs, store: Store, progress: Progress, asked: RunRequest
) -> Record:
    """Load, apply, evaluate, measure and write: the part of a run that takes time."""
    from bench.device.devices import describe_device, seed_everything, set_threads
    from bench.evaluation import evaluate
    from bench.evaluation.distributed import current_process_group
    from bench.evaluation.response_cache import ResponseCache
    from bench.measurement.costs import measure_costs, phase_costs
    from bench.models.hashing import state_hash
    from bench.records import Record

    started = _now()
    set_threads(config.threads)
    seed_everything(config.seed)

    with progress.phase("loading the model"):
        model = _base_model_cache().acquire(inputs.source, will_change=bool(config.method))
    # Methods change the model in place, so the dense costs are counted first. A dense run counts
    # after evaluating, so that the first scores do not wait for it.
    before = _count_costs(model, config, progress) if config.method else None
    own = store.unfinished(inputs.id, current_process_group().rank)
    context = inputs.loan.to(config, model, progress, own)
    methods = apply_methods(config, model, context)
    # The journal is keyed by the weights after the methods: responses of a killed run are reused
    # only if applying the methods again gave exactly the same network.
    with store.journal(
        inputs.id, state_hash(model.network), current_process_group().rank
    ) as journal:
        for note in journal.notes:
            progress.warn(note)
        evaluation = evaluate(model, inputs.plan, progress, ResponseCache(journal))
    after = _count_costs(model, config, progress)
    with progress.phase("measuring costs"):
        measured = measure_costs(
            _measured_pair(model, inputs.source, methods), config.costs, progress
        )

    costs = [
        *after.costs,
        *measured.costs,
        *_method_memory_costs(methods),
        *phase_costs(progress.seconds),
    ]
    record = Record(
        id=inputs.id,
        started=started,
        finished=_now(),
        sweep=asked.sweep,
        command=asked.command,
        config=_plain_config(config),
        environment={**describe_device(), "versions": inputs.versions},
        model=_dense_model(model, (before or after).costs),
        methods=tuple(methods),
        metrics=evaluation.metrics,
        costs=tuple(costs),
        missing=(*after.missing, *measured.missing),
        provenance=_provenance(config, inputs) | {"backend": evaluation.backend},
    )
    if current_process_group().is_first:
        with progress.phase("writing the record"):
            store.write(record, evaluation.samples, _config_yaml(config))
    return record


def _count_costs(model: Model, config: RunConfig, progress: Progress) -> CostReport:
    from bench.measurement.costs import count_costs

    with progress.phase("counting costs"):
        return count_costs(model, config.costs)


def _measured_pair(
    model: Model, source: ModelSource, methods: Sequence[AppliedMethod]
) -> MeasuredPair:
    """Return the models to measure, and whether a gain in time may be claimed."""
    from bench.measurement.quantities import MeasuredPair
    from bench.records import without_real_saving

    if not methods:
        return MeasuredPair(model)
    dense = _base_model_cache().peek(source)
    missing = None if dense else "the dense model did not fit into memory next to this one"
    return MeasuredPair(model, dense, no_gain_reason=without_real_saving(methods) or missing)
