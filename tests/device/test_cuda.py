"""The same on a GPU: `make test-gpu` runs these where there is one."""

import pytest
import torch

from bench.device import devices
from bench.estimation.layer_timing import decoder_times
from bench.runner.execute import execute
from bench.runner.session import Session
from bench.sweeps import RunRequest
from tests.models.tiny_networks import llama

pytestmark = pytest.mark.gpu


@pytest.fixture
def run(tmp_path):
    from bench.config.composition import compose_run_config

    session = Session()

    def call(*overrides):
        small = ["benchmark.limit=8", "tracker=none", f"results_dir={tmp_path}"]
        return execute(compose_run_config([*overrides, *small]), RunRequest("test"), session).record

    with session:
        yield call


def accuracies(record):
    return {m.task: m.value for m in record.metrics if m.headline and m.metric != "perplexity"}


@pytest.mark.parametrize("method", ["dense", "camera_p", "random_experts"])
def test_a_run_on_the_gpu_agrees_with_the_cpu(run, method):
    on_cpu = run(f"method={method}", "model.device=cpu", "model.dtype=float32")
    on_gpu = run(f"method={method}", "model.device=cuda", "model.dtype=float32")
    assert on_cpu.id != on_gpu.id
    assert on_gpu.environment["gpus"]
    assert accuracies(on_cpu) == pytest.approx(accuracies(on_gpu), abs=0.13)
    assert on_cpu.metric("english").value == pytest.approx(on_gpu.metric("english").value, rel=1e-3)


def test_bfloat16_is_the_default_and_stays_close(run):
    half, full = run("model.device=cuda"), run("model.device=cuda", "model.dtype=float32")
    assert half.cost("bytes").value < 0.6 * full.cost("bytes").value
    assert half.metric("english").value == pytest.approx(full.metric("english").value, rel=0.03)


def test_layers_are_timed_on_the_gpu_for_estimates():
    with torch.device("meta"):
        network = llama()
    cuda, before = torch.device("cuda"), torch.cuda.max_memory_allocated()
    layers = list(network.model.layers)
    found = decoder_times(network, [(layers[0], len(layers))], cuda)
    assert min(found.forward.seconds) > 0
    assert torch.cuda.max_memory_allocated() > before
    assert all(weight.is_meta for weight in network.parameters())


def test_memory_comes_back():
    cuda = torch.device("cuda")
    free = devices.free_bytes(cuda)
    block = torch.empty(64 * 2**20, device=cuda)
    devices.synchronize(cuda)
    assert devices.free_bytes(cuda) < free
    del block
    devices.release_memory(cuda)
    assert devices.free_bytes(cuda) >= free - 2**21
