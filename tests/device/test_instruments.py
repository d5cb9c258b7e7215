"""Clock, peaks of memory and the watch over the machine, on real work on a CPU."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from bench.device.devices import Clock
from bench.device.machine import MachineMonitor, MachineReading, measured_quietly
from bench.device.memory import PeakMemory, _ResidentPeakGauge, _SampledGauge, is_out_of_memory

CPU = torch.device("cpu")
MIB = 2**20


def test_laps_are_the_times_between_marks():
    clock = Clock(CPU)
    clock.mark()
    time.sleep(0.01)
    clock.mark()
    clock.mark()
    slept, nothing = clock.laps()
    assert slept >= 0.01 > nothing >= 0


def test_a_peak_is_seen_after_it_has_passed_and_what_was_held_before_is_not():
    kept = torch.ones(64 * MIB // 4)
    with PeakMemory(CPU) as peak:
        torch.ones(48 * MIB // 4).sum()
        torch.ones(16 * MIB // 4).sum()
    assert peak.above == pytest.approx(48 * MIB, rel=0.1)
    assert kept[0] == 1


FREED = """
import torch
from bench.device.memory import PeakMemory as Peak

for _ in range(2):
    with Peak(torch.device("cpu")) as peak:
        pieces = [torch.ones(1024) for _ in range(4096)]
        del pieces
    print(peak.above)
"""


@pytest.mark.broad
def test_memory_that_was_free_before_counts_when_it_is_used_again():
    """In a process of its own: in one of many tests, holes between what lives are filled first."""
    told = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    for above in map(int, told.stdout.split()):
        assert above == pytest.approx(16 * MIB, rel=0.25)


def test_a_restart_forgets_the_peak_but_not_what_is_still_held():
    with PeakMemory(CPU) as peak:
        torch.ones(64 * MIB // 4).sum()
        kept = torch.ones(16 * MIB // 4)
        peak.restart()
    assert peak.above == pytest.approx(16 * MIB, rel=0.25)
    assert kept[0] == 1


@pytest.mark.skipif(not _ResidentPeakGauge.works(), reason="needs the kernel's record of a peak")
def test_pages_of_a_mapped_file_are_no_memory_of_the_block(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(64 * MIB))
    size = 64 * MIB // 4
    with PeakMemory(CPU) as peak:
        mapped = torch.from_file(str(file), size=size)
        torch.ones(16 * MIB // 4).add_(mapped[: 16 * MIB // 4])
        mapped.sum()
    assert peak.above == pytest.approx(16 * MIB, rel=0.25)
    # Written where they are, they take the place of what was mapped before.
    with PeakMemory(CPU) as peak:
        mapped.add_(1)
    assert peak.above == pytest.approx(0, abs=4 * MIB)


@pytest.mark.parametrize("gauge", [_ResidentPeakGauge, _SampledGauge])
def test_every_gauge_of_the_resident_set_sees_a_peak_that_lasts(gauge):
    if gauge is _ResidentPeakGauge and not _ResidentPeakGauge.works():
        pytest.skip("this kernel does not let the mark be set back")
    watched = gauge()
    before = watched.now()
    watched.reset()
    block = torch.ones(64 * MIB // 4)
    time.sleep(0.05)
    del block
    assert watched.peak() - before == pytest.approx(64 * MIB, rel=0.1)
    watched.close()


def test_a_reset_waits_for_a_sample_in_progress():
    gauge = _SampledGauge()
    sampling, go_on = threading.Event(), threading.Event()
    real = gauge.now

    def old_peak():
        if threading.current_thread() is gauge._thread:
            sampling.set()
            go_on.wait(10)
            return 2**60
        return real()

    gauge.now = old_peak
    assert sampling.wait(10)
    reset = threading.Thread(target=gauge.reset)
    reset.start()
    reset.join(0.2)
    gauge.now = real
    go_on.set()
    reset.join(10)
    assert gauge.peak() < 2**60
    gauge.close()


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
    ],
)
def test_libraries_beside_torchs_allocator_run_out_of_memory_too(message):
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"))


def test_memory_that_ran_out_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_out_of_memory(caught.value)


def test_a_process_on_our_cores_is_seen_as_somebody_elses():
    script = "import time\nend = time.time() + 30\nwhile time.time() < end: pass"
    cores = range(own_cores())
    busy = [subprocess.Popen([sys.executable, "-c", script]) for _ in cores]
    try:
        time.sleep(0.5)
        with MachineMonitor(CPU) as watch:
            time.sleep(1.0)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert watch.reading.others > 0.5 * watch.reading.cores
    assert "loaded" in watch.reading.fault
    assert watch.reading.numbers()["threads"] == torch.get_num_threads()


def own_cores():
    with MachineMonitor(CPU) as watch:
        pass
    return watch.reading.cores


@pytest.mark.parametrize(
    ("cores", "needed", "others", "loaded"),
    [(2, 1, 0.9, False), (2, 2, 0.9, True), (1, 1, 0.05, False), (1, 1, 0.2, True)],
)
def test_a_machine_is_loaded_when_too_few_cores_are_left(cores, needed, others, loaded):
    reading = MachineReading(
        threads=needed, cores=cores, needed=needed, others=others,
        cpu_mhz=None, gpu_mhz=1980.0, slowed=None,
    )  # fmt: skip
    assert (reading.fault is not None) == loaded
    assert "cpu_mhz" not in reading.numbers()
    assert reading.numbers()["gpu_mhz"] == 1980


def test_a_gpu_that_is_slowed_spoils_a_measurement_on_a_quiet_machine():
    reading = MachineReading(
        threads=1, cores=8, needed=1, others=0.0, cpu_mhz=None, gpu_mhz=900.0,
        slowed="slowed by heat",
    )  # fmt: skip
    assert reading.fault == "the GPU was slowed by heat"


@pytest.mark.parametrize("attempts, seconds, measured", [(3, 60.0, 3), (3, 0.0, 1), (1, 60.0, 1)])
def test_a_disturbed_measurement_is_repeated_within_its_time(
    monkeypatch, attempts, seconds, measured
):
    monkeypatch.setattr(MachineReading, "fault", "the machine was loaded")
    values = iter(range(attempts))
    _, reading = measured_quietly(lambda: next(values), CPU, attempts, seconds)
    assert reading.fault
    assert next(values, attempts) == measured
