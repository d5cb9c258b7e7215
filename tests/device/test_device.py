"""The device layer on a CPU, as far as it goes."""

import random
import subprocess
import sys

import numpy
import pytest
import torch

from bench.device import devices
from bench.device.devices import visible_gpus
from bench.errors import UserError


def test_auto_is_the_gpu_where_there_is_one():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert devices.select_device("auto").type == expected
    assert devices.select_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("wanted", "part"), [("cuda:99", "CUDA devices"), ("gpu", "allowed"), ("cuda:x", "cuda:N")]
)
def test_a_device_that_is_not_there_is_refused(wanted, part):
    with pytest.raises(UserError, match=part):
        devices.select_device(wanted)


def test_auto_dtype_follows_the_device():
    assert devices.select_dtype("auto", torch.device("cpu")) == torch.float32
    assert devices.select_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert devices.select_dtype("float16", torch.device("cpu")) == torch.float16
    with pytest.raises(UserError, match="did you mean 'float16'"):
        devices.select_dtype("float1", torch.device("cpu"))


def test_a_seed_reaches_every_generator():
    draws = []
    for _ in range(2):
        devices.seed_everything(5)
        draws.append((random.random(), numpy.random.rand(), torch.rand(1).item()))
    devices.seed_everything(6)
    assert draws[0] == draws[1] != (random.random(), numpy.random.rand(), torch.rand(1).item())


def test_threads_are_set_or_left_alone():
    before = torch.get_num_threads()
    try:
        devices.set_threads(None)
        assert torch.get_num_threads() == before
        devices.set_threads(before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_description_can_be_stored_and_names_the_threads():
    import json

    described = json.loads(json.dumps(devices.describe_device()))
    assert described["threads"] == torch.get_num_threads()
    assert described["memory_bytes"] > 0
    assert devices.free_bytes(torch.device("cpu")) > 0


@pytest.mark.parametrize(
    ("listed", "visible"),
    [
        ("0,1", ["0", "1"]), ("0,-1,1", ["0"]), ("-1", []), ("", []), ("0,,1", ["0"]),
        ("GPU-ab,MIG-cd", ["GPU-ab", "MIG-cd"]),
    ],
)  # fmt: skip
def test_cuda_hides_every_gpu_after_an_entry_that_is_none(monkeypatch, listed, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert visible_gpus() == visible


def test_an_nvidia_smi_that_hangs_or_fails_means_no_gpu(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(devices, "NVIDIA_SMI_SECONDS", 0.2)

    def answers(script):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        return visible_gpus()

    assert answers("exec sleep 60") == []
    assert answers("exit 9") == []
    tool.write_text("no program")
    assert visible_gpus() == []
    monkeypatch.setattr(devices, "NVIDIA_SMI_SECONDS", 30)
    assert answers("echo 0; echo 1") == ["0", "1"]


def test_the_launchers_do_not_load_torch():
    script = "import sys, bench.device.devices; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", script], check=False).returncode == 0


def test_without_a_driver_gpus_are_looked_for_without_torch(tmp_path):
    script = (
        "import sys; from bench.device import devices; "
        f"devices.Path = lambda _: __import__('pathlib').Path({str(tmp_path)!r}); "
        "sys.platform = 'linux'; "
        "assert devices.gpu_names() == []; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", script], check=False).returncode == 0


def test_the_processor_is_named_by_its_model_where_the_system_tells(monkeypatch):
    text = "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n\nmodel name\t: another\n"
    monkeypatch.setattr(devices.Path, "read_text", lambda *_, **__: text)
    assert devices.describe_device()["cpu"] == "Some CPU @ 3 GHz"
    monkeypatch.setattr(devices.Path, "read_text", lambda *_, **__: "flags: none\n")
    assert devices.describe_device()["cpu"]


@pytest.mark.parametrize(
    ("dtype", "mebibytes", "reported"),
    [
        (torch.float32, 200, False),
        (torch.float32, 600, True),
        # Kernels for 16-bit products are compiled once per shape and kept.
        (torch.bfloat16, 1200, False),
        (torch.float16, 1200, False),
        (torch.bfloat16, 2000, True),
    ],
)
def test_compiled_kernels_of_16_bit_products_are_no_leak(monkeypatch, dtype, mebibytes, reported):
    used = [0]
    monkeypatch.setattr(devices.LeakMonitor, "_used", lambda _: used[0])
    network = torch.nn.Linear(4, 4, dtype=dtype)
    leaks = devices.LeakMonitor(network, torch.device("cpu"))
    used[0] = mebibytes * 2**20
    assert leaks.leaked_bytes(network) == (used[0] if reported else 0)
