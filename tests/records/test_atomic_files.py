"""A file or folder is written whole, and is on the disk before it gets its name."""

import os
from pathlib import Path

from bench.records.files import write_folder


def test_a_folder_is_synced_with_everything_below_it(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def record(handle):
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    def fill(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "deep.txt").write_text("deep")
        (folder / "flat.txt").write_text("flat")

    monkeypatch.setattr(os, "fsync", record)
    write_folder(tmp_path / "made", fill)
    assert (tmp_path / "made" / "inner" / "deep.txt").read_text() == "deep"
    assert {"inner", "deep.txt", "flat.txt"} <= set(synced)
