"""Trainings go on from their checkpoints through `bench run`; damaged ones are set aside."""

import io
import os
import signal
from functools import partial

import pytest
import torch

from bench.records import Store
from bench.ui import Progress
from methods import checkpoint
from methods.checkpoint import Checkpoint, CheckpointManager
from tests.faults.killable_runs import only, timeless, train

QUIET = ("threads=1", "tracker=none", "costs.length=32")
TRAININGS = {
    "wgsef": (
        "model=micro_lenet", "benchmark=images", "benchmark.limit=40", "method=wgsef",
        "ratio=0.5", "method.wgsef.recipe.epochs=3", "method.wgsef.recipe.batch=400",
        "method.wgsef.recipe.save_every=1",
    ),
    "wgsef_finetune": (
        "method=wgsef_finetune", "benchmark.tasks=[boolq]", "~benchmark.perplexity",
        "benchmark.limit=4", "calibration.rows=4", "method.wgsef_finetune.steps=5",
        "method.wgsef_finetune.rows=2",
    ),
    "visual_finetune": (
        "model=micro_llava", "benchmark=mllm_seven_micro", "benchmark.tasks=[gqa]",
        "benchmark.limit=4", "method=visual_finetune", "method.visual_finetune.count=20",
        "method.visual_finetune.batch=4",
    ),
}  # fmt: skip


def arm(number):
    """Let a training write at every step, and kill it after one of its checkpoints."""
    checkpoint.MIN_INTERVAL_SECONDS, checkpoint.MAX_WRITE_SHARE = 0.0, 1e9
    CheckpointManager.save = _killing(CheckpointManager.save, number)


def _killing(save, number):
    seen = []

    def deadly(self, make):
        save(self, make)
        seen.append(make)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return deadly


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TRAININGS))
def test_a_killed_training_goes_on_and_ends_as_one_that_was_not(tmp_path, name):
    results, whole = tmp_path / "results", tmp_path / "whole" / "results"
    arguments = TRAININGS[name]
    code, said = train(whole, *arguments, small=QUIET)
    assert code == 0, said
    code, said = train(results, *arguments, before=partial(arm, 3), small=QUIET)
    assert code == -signal.SIGKILL, said
    assert list((results / "unfinished").glob(f"*/{name}/step-*"))
    code, said = train(results, *arguments, small=QUIET)
    assert code == 0, said
    assert "resuming training from step 3" in said
    ours, theirs = timeless(only(results)), timeless(only(whole))
    assert ours == theirs
    assert not list((results / "unfinished").iterdir())


def kept(folder):
    checkpoint.write_checkpoint(folder, Checkpoint(7, {"a": torch.arange(6.0)}, {"loss": 0.5}))
    (path,) = folder.glob("step-*")
    return path


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 4
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: flip(path / "tensors.safetensors", -3), "checksum does not match"),
        (lambda path: flip(path / "tensors.safetensors", 2), "checksum does not match"),
        (lambda path: flip(path / "state.json", -6), "cannot read checkpoint"),
        (lambda path: (path / "tensors.safetensors").write_bytes(b"{"), "checksum"),
        (lambda path: (path / "tensors.safetensors").unlink(), "No such file"),
        (lambda path: (path / "state.json").write_text('{"format": 99}'), "format is 99"),
        (lambda path: (path / "state.json").write_text("[]"), "format is None"),
        (
            lambda path: (path / "state.json").write_text('{"format": 1, "text": 5, "sums": {}}'),
            "its state is int",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_set_aside_with_a_word(tmp_path, damage, said):
    path, warnings = kept(tmp_path), []
    damage(path)
    assert checkpoint.read_checkpoint(tmp_path, warnings.append) is None
    (warning,) = warnings
    assert said in warning and str(path) in warning
    assert (tmp_path / f"aside1-{path.name}").is_dir()
    assert checkpoint.read_checkpoint(tmp_path, warnings.append) is None
    assert len(warnings) == 1


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_its_steps_and_no_more(tmp_path):
    results, arguments = tmp_path / "results", TRAININGS["wgsef"]
    train(results, *arguments, before=partial(arm, 2), small=QUIET)
    (file,) = results.glob("unfinished/*/wgsef/step-*/tensors.safetensors")
    flip(file, -3)
    code, said = train(results, *arguments, small=QUIET)
    assert code == 0, said
    assert "moved aside to aside1-step" in " ".join(said.split())
    assert len(Store(results).all()) == 1


def test_a_disk_that_takes_no_checkpoint_does_not_stop_the_training(tmp_path):
    said = io.StringIO()
    (tmp_path / "file").write_text("in the way")
    keeper = CheckpointManager(tmp_path / "file" / "folder", Progress(said))
    keeper.save(lambda: Checkpoint(1, {}, {}))
    assert "could not write a checkpoint" in said.getvalue()
    assert keeper.latest() is None
