"""The device layer on a CPU, as far as it goes."""

import random

import numpy
import pytest
import torch

from bench.device import devices
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
