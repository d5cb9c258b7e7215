"""Training checkpoints: a kill at any moment leaves a readable one."""

import json
from pathlib import Path

import pytest
import torch

from methods.checkpoint import Checkpoint, read_checkpoint, write_checkpoint


class Killed(Exception):
    pass


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    first = Checkpoint(3, {"a": torch.ones(2)}, {"loss": 0.1})
    write_checkpoint(tmp_path, first)
    monkeypatch.setattr(json, "dumps", lambda value: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        write_checkpoint(tmp_path, Checkpoint(4, {"a": torch.zeros(2)}, {}))
    monkeypatch.undo()
    found = read_checkpoint(tmp_path)
    assert found.step == 3 and found.state == {"loss": 0.1} and found.tensors["a"].sum() == 2
    write_checkpoint(tmp_path, Checkpoint(5, {"a": torch.zeros(2)}, {}))
    assert read_checkpoint(tmp_path).step == 5
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000000005"]


@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_kill_while_a_step_is_written_again_loses_no_checkpoint(tmp_path, monkeypatch, killed_at):
    write_checkpoint(tmp_path, Checkpoint(3, {"a": torch.ones(2)}, {}))
    rename, calls = Path.rename, []

    def rename_until_killed(path, target):
        calls.append(path)
        if len(calls) == killed_at:
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_until_killed)
    with pytest.raises(Killed):
        write_checkpoint(tmp_path, Checkpoint(3, {"a": torch.ones(2)}, {}))
    monkeypatch.undo()
    assert read_checkpoint(tmp_path).step == 3
    # The next writer, which may have the same process number, cleans up.
    write_checkpoint(tmp_path, Checkpoint(3, {"a": torch.zeros(2)}, {}))
    assert read_checkpoint(tmp_path).tensors["a"].sum() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003"]


def test_of_a_step_written_twice_the_newer_is_read(tmp_path):
    write_checkpoint(tmp_path, Checkpoint(3, {"a": torch.ones(2)}, {}))
    (tmp_path / "step-000000003").rename(tmp_path / "step-000000003.old9")
    newer = tmp_path / "newer"
    write_checkpoint(newer, Checkpoint(3, {"a": torch.zeros(2)}, {}))
    (newer / "step-000000003").rename(tmp_path / "step-000000003")
    assert read_checkpoint(tmp_path).tensors["a"].sum() == 0
