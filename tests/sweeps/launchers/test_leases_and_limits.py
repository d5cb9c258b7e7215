"""One job per device, limits that a job's own process keeps, and jobs that are stopped."""

import multiprocessing
import os
import signal
import time
from contextlib import suppress

import numpy as np
import pytest
from omegaconf import OmegaConf

from bench.device.devices import visible_gpus
from bench.errors import Stopped
from bench.sweeps.job import RunRequest, perform_job, read_status, write_status
from bench.sweeps.launchers import local as leases
from bench.sweeps.launchers.local import JobTimeoutError, RetryingLauncher, resource_limits
from bench.sweeps.plan import plan_in

DEVICES = ("test-a", "test-b")


def take(queue, done):
    os.environ["CUDA_VISIBLE_DEVICES"] = "test-a,test-b"
    leases._HELD_LOCKS.clear()
    queue.put((leases.lease_device(DEVICES), os.environ["CUDA_VISIBLE_DEVICES"]))
    done.wait(30)


def test_two_processes_never_share_a_device_and_a_third_waits(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    context = multiprocessing.get_context("fork")
    queue, done, last = context.Queue(), context.Event(), context.Event()
    first = [context.Process(target=take, args=(queue, done)) for _ in DEVICES]
    for process in first:
        process.start()
    held = [queue.get(timeout=30) for _ in DEVICES]
    assert sorted(device for device, _ in held) == sorted(DEVICES)
    assert all(device == seen for device, seen in held)
    third = context.Process(target=take, args=(queue, last))
    third.start()
    time.sleep(0.2)
    assert queue.empty()
    done.set()
    assert queue.get(timeout=30)[0] in DEVICES
    last.set()
    for process in (*first, third):
        process.join()


def test_without_devices_nothing_is_taken():
    assert leases.lease_device(()) is None


def test_devices_are_those_that_the_environment_shows(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-abc")
    assert visible_gpus() == ["2", "GPU-abc"]
    for nothing in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        assert visible_gpus() == []


def test_time_runs_out():
    began = time.perf_counter()
    with pytest.raises(JobTimeoutError, match=r"0\.001 minutes"), resource_limits(0.001, None):
        time.sleep(30)
    assert time.perf_counter() - began < 10


def test_memory_runs_out_and_the_process_goes_on():
    with pytest.raises(MemoryError), resource_limits(None, 0.01):
        np.ones(2**27)
    assert np.ones(2**20).sum() == 2**20


def test_a_handler_that_python_cannot_put_back_becomes_the_default(monkeypatch):
    """`getsignal` returns None for a handler that a library installed from C."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with resource_limits(1.0, None):
        pass
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


class InThisProcess(RetryingLauncher):
    """Runs `act` as the work of each job, and counts them."""

    def run_jobs(self, jobs):
        for job in jobs:
            self.settings["calls"].append(job.number)
            perform_job(job.folder, job.number, RunRequest("bench run"), self.settings["act"])


class Killed(RetryingLauncher):
    """Is interrupted after the processes of its jobs were killed."""

    def run_jobs(self, jobs):
        for job in jobs:
            write_status(job.folder, {"number": job.number, "state": "running"})
        raise KeyboardInterrupt


def launched(launcher, folder):
    plan_in(folder).with_jobs([["seed=1"], ["seed=2"]], complete=True)
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}, "objective": "average"})
    launcher.setup(hydra_context=None, task_function=None, config=config)
    launcher.launch([["seed=1"], ["seed=2"]], 0)


def states(folder):
    found = [read_status(folder, number) or {} for number in range(2)]
    return [(status.get("state"), status.get("reason")) for status in found]


def test_jobs_that_an_interrupted_launcher_killed_wait_again(tmp_path):
    folder = tmp_path / "sweeps" / "s"
    with pytest.raises(KeyboardInterrupt):
        launched(Killed(), folder)
    assert states(folder) == [("waiting", "interrupted")] * 2


def test_what_stops_a_job_in_a_worker_stops_the_sweep(tmp_path):
    """Only its status file comes from a worker, whatever the launcher makes of its error."""

    class Silent(InThisProcess):
        def run_jobs(self, jobs):
            with suppress(Stopped):
                super().run_jobs(jobs)

    def act():
        raise Stopped("the disk is full")

    folder, calls = tmp_path / "sweeps" / "s", []
    with pytest.raises(Stopped, match="the disk is full"):
        launched(Silent(act=act, calls=calls), folder)
    assert calls == [0]
    assert states(folder)[0] == ("waiting", "the disk is full")
