"""Execution of one run, from top to bottom.

find inputs -> reuse a record -> load the model -> apply methods -> evaluate -> measure -> record
-> track

Modules that need torch are imported inside functions, because a finished sweep is answered from its
records without them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from bench.device.devices import threads_set
from bench.errors import UserError
from bench.evaluation import evaluate
from bench.evaluation.response_cache import ResponseCache
from bench.records import (
    AppliedMethod,
    Cost,
    DenseModel,
    EstimatedPhase,
    Record,
    Store,
    without_real_saving,
)
from bench.records.files import disk_errors_as_stopped
from bench.records.record import method_label, utc_now
from bench.runner.inputs import RunInputs, resolve_run
from bench.runner.method_application import apply_methods, later_errors_attributed
from bench.sweeps import RunRequest, RunResult
from bench.tracking.tracker import follow, track
from bench.tracking.upload import LiveRun, Upload
from bench.tracking.wandb_run import SWEEP_VARIABLE, flat_values
from bench.ui import Progress

if TYPE_CHECKING:
    from bench.config.run_config import RunConfig
    from bench.evaluation import Evaluation
    from bench.measurement.quantities import CostReport, MeasuredPair
    from bench.models.model import Model
    from bench.models.source import ModelSource
    from bench.runner.session import Session

LOADING = "loading the model"
"""Phase that is left out of an estimate if the session holds the loaded model."""
KEPT_BYTES = 2**26
"""Size of the largest network that `keep_weights=auto` keeps."""
_CODE_FOLDERS = ("bench", "methods", "conf", "hydra_plugins")


def execute(config: RunConfig, request: RunRequest, session: Session) -> RunResult:
    """Execute one run and return its record; a recorded run is not executed again."""
    processes = session.process_group
    progress = Progress(quiet=not processes.is_first)
    store = Store(config.results_dir)
    with disk_errors_as_stopped(store.root):
        store.ensure_writable()
    inputs = resolve_run(config, session)

    live: Upload | None = None
    with disk_errors_as_stopped(store.root), _claim(store, inputs.id, session, progress):
        known = None if config.force else store.find(inputs.id)
        # All processes must take the same branch: a process that evaluates alone would wait for the
        # others forever.
        known = processes.broadcast(known)
        if known is not None:
            # The agent of a W&B sweep waits for the numbers of every run that it requested.
            agent_waits = processes.is_first and SWEEP_VARIABLE in os.environ
            warning = track(known, store, config.tracker) if agent_waits else None
            return RunResult(known, reused=True, warning=warning)
        if processes.is_first:
            _move_unreadable_aside(store, inputs.id, progress)
            if config.tracker.kind != "none":
                live = progress.watcher = _open_live_run(config, request, inputs, store)
        try:
            # Restored after the run, because later runs of the process may need another number.
            with threads_set(config.threads):
                record = _execute_run(config, request, inputs, session, store, progress)
        except BaseException:
            if live is not None:
                live.abandon()
            raise

    if not processes.is_first:
        return RunResult(record, reused=False)
    # After the record is written and the lock is released, so that a tracker that fails or hangs
    # loses no result and blocks no other process.
    progress.watcher = None
    kind = config.tracker.kind
    sending = f"sending {record.id} to {kind}"
    with nullcontext() if kind == "none" else progress.phase(sending):
        warning = track(record, store, config.tracker, live)
    return RunResult(record, reused=False, warning=warning)


@contextmanager
def _claim(store: Store, run: str, session: Session, progress: Progress) -> Iterator[None]:
    """Prevent other processes from executing the same run inside the `with` block."""

    def report_wait() -> None:
        progress.say(f"another process is executing run {run}: waiting for it")

    # A second process with the same run waits, then finds the record. Of the processes of one
    # distributed run only the first takes the lock, because they would wait for each other.
    first = session.process_group.is_first
    with store.claim(run, on_wait=report_wait) if first else nullcontext():
        yield


def _move_unreadable_aside(store: Store, run: str, progress: Progress) -> None:
    """Move the files of an unreadable record aside, because the run will write new ones."""
    reason = store.unreadable.get(run)
    if reason:
        folder = store.move_aside(run)
        progress.warn(
            f"the record of run {run} is unreadable ({reason}): running it again; "
            f"the old files are in {folder}"
        )


def _open_live_run(
    config: RunConfig, request: RunRequest, inputs: RunInputs, store: Store
) -> Upload | None:
    """Open the W&B run to which this run reports its progress, or return None."""
    plain = config.plain()
    methods = [method_label(name, knobs) for name, knobs in plain["method"].items()]
    live_run = LiveRun(
        name=f"{config.model.name} {' + '.join(methods) or 'dense'}",
        group=request.sweep,
        tags=[config.model.name, *config.method],
        config=flat_values(inputs.id, plain),
    )
    return follow(inputs.id, live_run, store, config.tracker)


def _execute_run(
    config: RunConfig,
    request: RunRequest,
    inputs: RunInputs,
    session: Session,
    store: Store,
    progress: Progress,
) -> Record:
    """Load the model, apply the methods, evaluate, measure, and write the record."""
    from bench.device.devices import describe_device, seed_everything
    from bench.models.hashing import network_hash

    checkpoints = store.unfinished(inputs.id, session.process_group.rank)
    resumed = checkpoints.exists()
    started = utc_now()
    # Cached at the start, because the working tree may change during a long run.
    code_revision()
    seed_everything(config.seed)

    estimate = _estimate(config, inputs, session)
    progress.expect({each.phase: (each.low * each.high) ** 0.5 for each in estimate})
    model, dense, methods = _load_and_compress(config, inputs, session, checkpoints, progress)
    weights = network_hash(model.network)
    with later_errors_attributed(config.method):
        evaluation = _evaluate(model, weights, inputs, session, store, progress)
        costs = _costs(config, model, methods, inputs.source, session, progress)
    save_weights = _weights_to_keep(config, model, methods)
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
        costs=tuple(costs.costs),
        missing=(*evaluation.missing, *costs.missing),
        evidence=evaluation.evidence,
        provenance=provenance_of(config, inputs, model)
        | {"backend": evaluation.backend, "network": weights},
        # The phases of a resumed run do not include the time of the interrupted process.
        estimate=() if resumed else estimate,
        kept_weights=None if save_weights is None else weights,
    )
    if session.process_group.is_first:
        with progress.phase("writing the record"):
            store.write(record, evaluation.samples, config_yaml(config), save_weights)
    return record


def _load_and_compress(
    config: RunConfig, inputs: RunInputs, session: Session, checkpoints: Path, progress: Progress
) -> tuple[Model, DenseModel, list[AppliedMethod]]:
    """Load the model and apply the methods; return it, its dense description, and the reports."""
    with progress.phase(LOADING):
        model = session.base_model.acquire(inputs.source, will_change=bool(config.method))
    # Described before the methods change the model in place. A record has only the size of the
    # dense model; its costs are those of the dense run.
    dense = describe_dense_model(model)
    context = inputs.calibration_inputs.prepare(config, model, progress, checkpoints)
    unchanged = session.base_model.peek(inputs.source)
    return model, dense, apply_methods(config, model, context, session, unchanged)


def _evaluate(
    model: Model,
    weights: str,
    inputs: RunInputs,
    session: Session,
    store: Store,
    progress: Progress,
) -> Evaluation:
    """Evaluate the model, reusing the responses of an interrupted attempt of the run.

    `weights` is the hash of the network after the methods. It is the key of the responses, so that
    they are reused only if applying the methods again gave exactly the same network.
    """
    with store.journal(inputs.id, weights, session.process_group.rank) as journal:
        for note in journal.notes:
            progress.warn(note)
        return evaluate(model, inputs.benchmark, progress, ResponseCache(journal))


def _costs(
    config: RunConfig,
    model: Model,
    methods: Sequence[AppliedMethod],
    source: ModelSource,
    session: Session,
    progress: Progress,
) -> CostReport:
    """Count and measure the costs of the model; add the memory of methods and times of phases."""
    from bench.measurement.costs import count_costs, measure_costs, phase_costs

    with progress.phase("counting costs"):
        costs = count_costs(model, config.costs, progress)
    with progress.phase("measuring costs"):
        pair = _measured_pair(model, methods, source, session)
        measured = measure_costs(pair, config.costs, progress)
    costs.missing += measured.missing
    costs.costs += [*measured.costs, *method_memory_costs(methods), *phase_costs(progress.seconds)]
    return costs


def _estimate(config: RunConfig, inputs: RunInputs, session: Session) -> tuple[EstimatedPhase, ...]:
    """Return the estimated time of the run's phases on this machine, empty if it is unknown.

    An estimate is for a single process, so none is made for a distributed run. Loading is left out
    if the session holds the model.
    """
    if session.estimator is None or session.process_group.world_size > 1:
        return ()
    held = session.base_model.peek(inputs.source) is not None
    try:
        found = session.estimator.estimate(config, inputs.source, inputs.benchmark)
    except (UserError, RuntimeError, ValueError, TypeError, AttributeError, LookupError):
        # Third-party code (tokenizers, tasks, plug-ins) can fail here. If that matters, the run
        # itself fails with a better message.
        return ()
    return tuple(
        phase for phase in found.recorded_phases() if not (held and phase.phase == LOADING)
    )


def describe_dense_model(model: Model) -> DenseModel:
    """Describe a model as it is before any method changes it."""
    from bench.models.bitpacking.packed_modules import count_parameters
    from bench.models.network import stored_bytes

    stored = model.quantization
    return DenseModel(
        name=model.name,
        source=model.config.source,
        revision=model.revision,
        fingerprint=model.fingerprint,
        architecture=model.structure.architecture,
        parameters=stored.parameters if stored else count_parameters(model.network),
        bytes=stored.bytes if stored else stored_bytes(model.network),
    )


def _measured_pair(
    model: Model, methods: Sequence[AppliedMethod], source: ModelSource, session: Session
) -> MeasuredPair:
    """Return the models to measure, and the reason if no gain in time may be claimed."""
    from bench.measurement.quantities import MeasuredPair

    if not methods:
        return MeasuredPair(model)
    dense = session.base_model.peek(source)
    missing = None if dense else "the dense model did not fit into memory next to this one"
    return MeasuredPair(model, dense, no_gain_reason=without_real_saving(methods) or missing)


def method_memory_costs(methods: Sequence[AppliedMethod]) -> list[Cost]:
    """Return the peak memory of each method while it was applied."""
    return [
        Cost(
            scope=f"phase applying {method.name}",
            quantity="peak_bytes",
            unit="B",
            value=method.peak_bytes,
            how="measured",
        )
        for method in methods
        if method.peak_bytes is not None
    ]


def provenance_of(config: RunConfig, inputs: RunInputs, model: Model) -> dict[str, object]:
    """Return the origin of every input, so that the numbers can be traced."""
    return {
        "data": inputs.benchmark.provenance,
        **inputs.calibration_inputs.fingerprints,
        "seed": config.seed,
        "identity": inputs.identity,
        "git_commit": code_revision(),
        "chat_template": chat_template_of(config, model),
    }


def chat_template_of(config: RunConfig, model: Model) -> object:
    """Return the chat template with which prompts were rendered, or None for plain text."""
    if config.benchmark.harness == "lm_eval":
        from bench.evaluation.text.chat import select_template

        return select_template(config.benchmark, model.tokenizer, model.name)
    if config.benchmark.harness != "lmms_eval":
        return None
    from bench.data.chat import chat_template

    return chat_template(model.processor)


def config_yaml(config: RunConfig) -> str:
    """Return the text of the config file that is stored with a record."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config.plain()))


def _weights_to_keep(
    config: RunConfig, model: Model, methods: Sequence[AppliedMethod]
) -> Callable[[Path], None] | None:
    """Return a function that saves the network to a folder, or None if it is not kept."""
    from bench.models.classifiers.classifier import Classifier
    from bench.models.classifiers.serialization import save_classifier

    network = model.network
    if not methods or config.keep_weights is False or not isinstance(network, Classifier):
        return None
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    trained = any(method.trained for method in methods)
    if config.keep_weights is True or (trained and size <= KEPT_BYTES):
        return functools.partial(save_classifier, network)
    return None


# Once per process, because its imported code does not change with the working tree.
@functools.cache
def code_revision() -> str | None:
    """Return the commit of the working tree that contains this package, as `git describe` does.

    `-dirty` is added if a tracked file is changed or there is a new file of code. None if the
    package is installed, even within some other repository.
    """
    folder = Path(__file__).parents[2]
    # An installed package is in no repository, or is not tracked by it.
    if not _git(folder, "ls-files", __file__):
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    added = _git(folder, "ls-files", "--others", "--exclude-standard", *_CODE_FOLDERS)
    # None, a failed command, counts as dirty as well.
    return f"{commit}" if (changed, added) == ("", "") else f"{commit}-dirty"


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of a git command; None without git or a repository, or on an error."""
    import subprocess

    # Without optional locks, so that a run does not disturb a concurrent commit.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
