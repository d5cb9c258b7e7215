"""The instruments on a GPU: `make test-gpu` runs these where there is one."""

import pytest
import torch

from bench.device.devices import Clock
from bench.device.energy_counters import Unavailable
from bench.device.memory import PeakMemory
from bench.measurement.roofline import device_limits

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda:0")


def test_events_time_the_work_and_not_only_its_launch():
    side = 4096
    a_NN = torch.ones(side, side, device=CUDA, dtype=torch.bfloat16)
    a_NN @ a_NN
    clock = Clock(CUDA)
    clock.mark()
    for _ in range(10):
        a_NN @ a_NN
    clock.mark()
    (seconds,) = clock.laps()
    assert seconds > 10 * 2 * side**3 / 5e15


def test_a_peak_is_what_tensors_held():
    kept = torch.ones(2**20, device=CUDA)
    with PeakMemory(CUDA) as peak:
        torch.ones(2**24, device=CUDA).sum()
    assert peak.above == pytest.approx(2**26, rel=0.01)
    assert kept[0] == 1


def test_limits_are_those_of_a_gpu():
    best = device_limits(CUDA, torch.bfloat16, 1)
    assert best.matrix_rate > 1e12
    assert best.bandwidth > 1e10


def test_energy_rises_with_work_or_has_a_reason():
    from bench.device.energy_counters import energy_meter

    try:
        counter = energy_meter(CUDA)
    except Unavailable as reason:
        assert str(reason)
        return
    a_NN = torch.ones(8192, 8192, device=CUDA)
    before = counter.joules()
    for _ in range(50):
        a_NN @ a_NN
    torch.cuda.synchronize(CUDA)
    torch.cuda._sleep(500_000_000)
    torch.cuda.synchronize(CUDA)
    assert counter.joules() > before
