"""Energy counters: NVML at its module boundary, RAPL as the kernel lays out its files."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bench.device import energy_counters
from bench.device.energy_counters import NvmlDevice, Unavailable
from bench.device.machine import MachineMonitor

GPU = torch.device("cuda:0")
CPU = torch.device("cpu")


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """A stand-in for nvidia-ml-py with one board of a known UUID."""
    module = ModuleType("pynvml")
    module.millijoules, module.reasons = iter([1000, 5000, 12500]), 0
    module.NVMLError, module.NVML_CLOCK_SM = NVMLError, 1

    def handle(uuid):
        if uuid != "GPU-1234":
            raise NVMLError("Not Found")
        return "board"

    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = handle
    module.nvmlDeviceGetTotalEnergyConsumption = lambda board: next(module.millijoules)
    module.nvmlDeviceGetClockInfo = lambda board, kind: {1: 1980}[kind]
    module.nvmlDeviceGetCurrentClocksThrottleReasons = lambda board: module.reasons
    module.nvmlDeviceGetEnforcedPowerLimit = lambda board: 350_000
    monkeypatch.setitem(sys.modules, "pynvml", module)
    properties = SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return module


def test_millijoules_of_the_board_become_joules(nvml):
    counter = energy_counters.energy_meter(GPU)
    assert counter.joules() == 5.0
    assert counter.joules() == 12.5
    assert "board" in counter.how


def test_the_power_limit_is_that_of_the_board_or_unknown(nvml):
    assert NvmlDevice(GPU).power_limit() == 350.0
    del nvml.nvmlDeviceGetEnforcedPowerLimit
    with pytest.raises(Unavailable, match="cannot read the power limit"):
        NvmlDevice(GPU).power_limit()


@pytest.mark.parametrize("name", ["Event", "Throttle"])
def test_what_slows_a_gpu_is_asked_by_the_name_that_the_library_has(nvml, name):
    asked = vars(nvml).pop("nvmlDeviceGetCurrentClocksThrottleReasons")
    setattr(nvml, f"nvmlDeviceGetCurrentClocks{name}Reasons", asked)
    nvml.reasons = 0x20
    assert NvmlDevice(GPU).slowed() == "slowed by heat"


def test_a_library_that_cannot_ask_is_a_reason(nvml):
    del nvml.nvmlDeviceGetClockInfo
    with pytest.raises(Unavailable, match="cannot read the clock"):
        NvmlDevice(GPU).clock_mhz()


def test_a_gpu_without_the_counter_is_a_reason_and_no_zero(nvml):
    def unsupported(board):
        raise NVMLError("Not Supported")

    nvml.nvmlDeviceGetTotalEnergyConsumption = unsupported
    with pytest.raises(Unavailable, match=r"this GPU has no energy counter \(Not Supported\)"):
        energy_counters.energy_meter(GPU)


def test_a_device_that_nvml_does_not_know_is_named(nvml, monkeypatch):
    unknown = SimpleNamespace(uuid="MIG-7")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: unknown)
    with pytest.raises(Unavailable, match="does not answer for GPU-MIG-7"):
        energy_counters.energy_meter(GPU)


def test_a_missing_library_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(Unavailable, match="nvidia-ml-py is not installed"):
        energy_counters.energy_meter(GPU)


def test_clock_and_heat_are_read_and_a_power_cap_is_normal(nvml):
    board = NvmlDevice(GPU)
    assert board.clock_mhz() == 1980
    nvml.reasons = 0x04
    assert board.slowed() is None
    nvml.reasons = 0x04 | 0x40
    assert board.slowed() == "slowed by heat"
    with MachineMonitor(GPU) as watch:
        pass
    assert watch.reading.gpu_mhz == 1980
    assert watch.reading.needed == 1
    assert watch.reading.fault == "the GPU was slowed by heat"


@pytest.mark.parametrize(
    ("bits", "reason"),
    [(0x08, "hardware"), (0x08 | 0x40, "heat"), (0x08 | 0x80, "power supply"), (0x20, "heat")],
)
def test_the_most_specific_reason_for_a_slow_clock_is_named(nvml, bits, reason):
    nvml.reasons = bits
    assert reason in NvmlDevice(GPU).slowed()


@pytest.fixture
def rapl(tmp_path, monkeypatch):
    """Two packages, one of them with a zone inside it, as under /sys/class/powercap."""
    names = {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1", "intel-rapl:0:0": "core"}
    for zone, name in names.items():
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(f"{name}\n")
        (tmp_path / zone / "energy_uj").write_text("900000\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("1000000\n")
    monkeypatch.setattr(energy_counters, "RAPL", tmp_path)
    return tmp_path


def test_packages_are_added_and_zones_inside_them_are_not(rapl):
    counter = energy_counters.energy_meter(CPU)
    assert counter.joules() == 0
    for zone, value in (("intel-rapl:0", 950000), ("intel-rapl:1", 970000)):
        (rapl / zone / "energy_uj").write_text(f"{value}\n")
    (rapl / "intel-rapl:0:0" / "energy_uj").write_text("999999\n")
    assert counter.joules() == pytest.approx(0.12)


def test_a_counter_that_starts_again_at_zero_goes_on_rising(rapl):
    counter = energy_counters.energy_meter(CPU)
    (rapl / "intel-rapl:0" / "energy_uj").write_text("100000\n")
    assert counter.joules() == pytest.approx(0.2)
    (rapl / "intel-rapl:0" / "energy_uj").write_text("300000\n")
    assert counter.joules() == pytest.approx(0.4)


def test_a_counter_for_root_only_is_a_reason(rapl, monkeypatch):
    def refuse(file):
        raise PermissionError(file)

    monkeypatch.setattr(energy_counters, "_read_counter", refuse)
    with pytest.raises(Unavailable, match="root only"):
        energy_counters.energy_meter(CPU)


def test_a_machine_without_counters_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(energy_counters, "RAPL", tmp_path / "nothing")
    with pytest.raises(Unavailable, match="no energy counter"):
        energy_counters.energy_meter(CPU)
