"""One job per device, and limits that a job's own process keeps."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from bench.device.devices import visible_gpus
from bench.sweeps.launchers import local as leases
from bench.sweeps.launchers.local import JobTimeoutError, resource_limits

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
