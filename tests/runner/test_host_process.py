"""A call restores what it changes in its process."""

import gc
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
from bench.cli.main import main
from bench.config.composition import compose_run_config
from bench.data import hub
from bench.device.devices import seed_everything
from bench.errors import UserError
from bench.records import Store
from bench.runner.execute import execute
from bench.runner.launch import launch
from bench.runner.session import Session, host_process_restored
from bench.sweeps import RunRequest

pytestmark = pytest.mark.own_session


@pytest.fixture
def online(monkeypatch):
    """A process that is not offline, as a notebook may be."""
    import datasets.config
    import huggingface_hub.constants

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setattr(datasets.config, name, False)


@pytest.fixture
def ctrl_c():
    """Ctrl-C interrupts, though a shell that runs the tests in its background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def generators():
    numbers = np.random.get_state(legacy=False)["state"]
    return random.getstate(), numbers["key"].tobytes(), numbers["pos"], bytes(torch.get_rng_state())


def state():
    signals = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    return dict(os.environ), list(sys.argv), signals, gc.get_threshold(), Path.cwd()


@pytest.mark.parametrize("offline", ["offline=true", "++offline=True", "offline='true'"])
def test_an_offline_run_leaves_the_process_online(online, monkeypatch, tmp_path, offline):
    seen = []

    def check(config, session):
        seen.append(hub.is_offline())
        raise UserError("seen enough")

    monkeypatch.setattr("bench.runner.launch.check_run", check)
    before = state()
    with pytest.raises(UserError, match="seen enough"), Session() as session:
        launch([offline, f"results_dir={tmp_path}"], session)
    assert seen == [True]
    assert not hub.is_offline()
    assert state() == before


def test_a_library_imported_offline_is_online_afterwards(online, monkeypatch):
    import datasets

    with hub.offline_switch_restored():
        hub.go_offline()
        # As if it were imported only now: it then was not there when the block began.
        monkeypatch.setitem(sys.modules, "datasets.config", datasets.config)
        assert datasets.config.HF_DATASETS_OFFLINE
    assert not datasets.config.HF_DATASETS_OFFLINE


def test_an_offline_process_stays_offline(online, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.go_offline()
    with hub.offline_switch_restored():
        pass
    assert hub.is_offline()
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_variables_are_restored_after_an_error(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    with pytest.raises(ValueError, match="broken"), host_process_restored():
        os.environ.update(HYDRA_FULL_ERROR="1", DISABLE_MULTIPROC="1")
        raise ValueError("broken")
    assert os.environ["HYDRA_FULL_ERROR"] == "0"
    assert "DISABLE_MULTIPROC" not in os.environ


@pytest.mark.parametrize("arguments", [
    ["run", "modell=x"], ["run", "--cfg", "job"], ["--help"], ["nonsense"], ["ls", "tables"],
])  # fmt: skip
def test_a_command_leaves_the_process_as_it_was(arguments, capsys):
    threshold = gc.get_threshold()
    gc.set_threshold(500, 7, 3)
    previous = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    before = state()
    try:
        main(arguments)
        assert state() == before
    finally:
        signal.signal(signal.SIGUSR1, previous)
        gc.set_threshold(*threshold)


@pytest.mark.parametrize(("call", "inside"), [
    (lambda: bench.run(method="dense"), "bench.runner.launch.launch"),
    (lambda: bench.estimate(method="dense"), "bench.runner.estimate.estimate_runs"),
    (lambda: bench.compare(["a", "b"]), "bench.reporting.comparison.named_runs.compare_runs"),
    (lambda: bench.plot("front"), "bench.reporting.plots.figures.prepare_figure"),
    (bench.records.load, "bench.records.index.index_table"),
    (lambda: bench.records.samples("a"), "bench.records.index.samples_table"),
])  # fmt: skip
def test_no_call_of_the_api_moves_the_generators_of_the_process(monkeypatch, call, inside):
    """A library that is imported in it may draw, as rich does."""

    def draw(*given):
        seed_everything(random.randrange(2**32))
        raise UserError("drawn")

    monkeypatch.setattr(inside, draw)
    monkeypatch.setattr(Store, "get", lambda store, run: SimpleNamespace(id=run))
    before = generators()
    with pytest.raises(UserError, match="drawn"):
        call()
    assert generators() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_in_a_destructor_is_not_lost(monkeypatch, capsys, ctrl_c, number):
    """Python prints what is raised there and goes on."""

    class Dying:
        def __del__(self):
            signal.raise_signal(number)

    def command(given):
        Dying()
        time.sleep(20)

    monkeypatch.setattr("pkgutil.resolve_name", lambda name: command)
    before, hook, began = state(), sys.unraisablehook, time.monotonic()
    assert main(["run"]) == 75
    assert time.monotonic() - began < 10
    assert capsys.readouterr().err.startswith("bench: interrupted; run the same command")
    assert (state(), sys.unraisablehook) == (before, hook)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_within_an_import_waits_for_its_end(monkeypatch, tmp_path, capsys, ctrl_c, number):
    """Hydra and transformers take any error of an import for a missing package."""
    slow = f"import signal, time\nsignal.raise_signal({int(number)})\ntime.sleep(0.2)\nwhole = True"
    (tmp_path / "slowly_imported.py").write_text(slow)
    monkeypatch.syspath_prepend(tmp_path)
    seen = []

    def command(given):
        try:
            import slowly_imported

            seen.append(slowly_imported.whole)
        except BaseException as error:
            seen.append(error)
        time.sleep(20)

    monkeypatch.setattr("pkgutil.resolve_name", lambda name: command)
    monkeypatch.delitem(sys.modules, "slowly_imported", raising=False)
    before, began = state(), time.monotonic()
    assert main(["run"]) == 75
    assert (seen, state()) == ([True], before)
    assert time.monotonic() - began < 10


def test_a_signal_that_a_library_makes_an_error_of_is_none_of_the_user(monkeypatch, capsys):
    def command(given):
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            raise UserError("the config is wrong") from None

    monkeypatch.setattr("pkgutil.resolve_name", lambda name: command)
    assert main(["run"]) == 75
    assert capsys.readouterr().err.startswith("bench: interrupted; run the same command")


def test_a_command_runs_outside_the_main_thread(capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["--help"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_the_global_generators_are_where_they_were():
    import random

    import numpy
    import torch

    def draw():
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    seed_everything(5)
    expected = draw()
    seed_everything(5)
    with pytest.raises(UserError), host_process_restored():
        seed_everything(77)
        draw()
        raise UserError("a run that fails")
    assert draw() == expected


@pytest.mark.broad
def test_calls_from_several_threads_take_turns(monkeypatch, tmp_path):
    inside, together = [], []

    def check(config, session):
        inside.append(config.seed)
        time.sleep(0.05)
        together.append(len(inside))
        inside.pop()
        raise UserError(f"seed {config.seed}")

    def call(seed):
        with pytest.raises(UserError, match=f"seed {seed}"), Session() as session:
            launch([f"seed={seed}", f"results_dir={tmp_path}"], session)

    monkeypatch.setattr("bench.runner.launch.check_run", check)
    before = list(sys.argv)
    threads = [threading.Thread(target=call, args=[seed]) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (together, sys.argv) == ([1, 1, 1], before)


@pytest.mark.broad
def test_a_run_leaves_the_number_of_threads_as_it_was(monkeypatch, tmp_path):
    import torch

    seen = []

    def run(*_):
        seen.append(torch.get_num_threads())
        raise UserError("seen enough")

    monkeypatch.setattr("bench.runner.execute._execute_run", run)
    monkeypatch.setattr("bench.runner.execute.resolve_run", lambda *_: SimpleNamespace(id="0" * 12))
    before = torch.get_num_threads()
    for words in ([f"threads={before + 1}"], []):
        config = compose_run_config([*words, "tracker=none", f"results_dir={tmp_path}"])
        with pytest.raises(UserError, match="seen enough"), Session() as session:
            execute(config, RunRequest("bench run"), session)
    assert [*seen, torch.get_num_threads()] == [before + 1, before, before]
