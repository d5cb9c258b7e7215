"""A file or folder is written whole, and is on the disk before it gets its name."""

import os
from pathlib import Path

import pytest

from bench.records.files import foreign_entries, repair_interrupted_write, write_folder


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


OWN = ("record.json", "samples.parquet")


def write(folder, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text)


def contents(root):
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_text() for path in files}


def test_a_replaced_folder_hands_on_what_it_did_not_write(tmp_path):
    made = tmp_path / "made"
    write(made, record="old", notes="mine")
    (made / "samples.parquet").write_text("old")
    write(made / "deep", more="mine too")
    write_folder(made, lambda folder: write(folder, record="new"), OWN)
    assert contents(tmp_path) == {
        "made/record.json": "new", "made/notes.json": "mine", "made/deep/more.json": "mine too",
    }  # fmt: skip


@pytest.mark.parametrize("renamed", [False, True])
def test_after_a_kill_only_our_files_go(tmp_path, renamed):
    made = tmp_path / "made"
    write(tmp_path / ".made.abcd_123", record="half", notes="mine")
    write(tmp_path / ".made.efgh_456", record="half")
    write(tmp_path / ".made.my-own-copy", record="a copy")
    write(tmp_path / ".old-made.abcd_123" / "made", record="old", notes="older")
    if renamed:
        write(made, record="new")
    repair_interrupted_write(made, OWN)
    assert contents(tmp_path) == {
        "made/record.json": "new" if renamed else "old", "made/notes.json": "older",
        ".made.abcd_123/notes.json": "mine", ".made.my-own-copy/record.json": "a copy",
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".made.abcd_123", ".made.my-own-copy", "made",
    ]  # fmt: skip


def test_nothing_is_deleted_behind_a_link(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere, record="precious")
    for name in (".made.abcd_123", ".old-made.abcd_123"):
        (tmp_path / name).symlink_to(elsewhere)
    write(tmp_path / ".old-made.efgh_456", record="odd")
    (tmp_path / ".old-made.efgh_456" / "made").symlink_to(elsewhere)
    write(tmp_path / "made", record="new")
    repair_interrupted_write(tmp_path / "made", OWN)
    assert contents(elsewhere) == {"record.json": "precious"}


NESTED = ("record.json", "weights/config.json")


def test_files_of_a_folder_inside_go_with_it_and_others_stay(tmp_path):
    made = tmp_path / "made"
    write(made, record="old")
    write(made / "weights", config="old", notes="mine")
    write_folder(made, lambda folder: write(folder, record="new"), NESTED)
    assert contents(tmp_path) == {"made/record.json": "new", "made/weights/notes.json": "mine"}


def test_what_is_not_ours_is_named_at_any_depth(tmp_path):
    write(tmp_path, record="ours", notes="mine")
    write(tmp_path / "weights", config="ours", more="mine")
    write(tmp_path / "other", config="mine")
    found = [str(path.relative_to(tmp_path)) for path in foreign_entries(tmp_path, NESTED)]
    assert found == ["notes.json", "other", "weights/more.json"]
    (tmp_path / "folder" / "record.json").mkdir(parents=True)
    (tmp_path / "folder" / "weights").write_text("no folder")
    found = [path.name for path in foreign_entries(tmp_path / "folder", NESTED)]
    assert found == ["record.json", "weights"]


def test_a_folder_inside_that_is_a_link_is_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere, config="precious")
    half = tmp_path / ".made.abcd_123"
    write(half, record="half")
    (half / "weights").symlink_to(elsewhere)
    assert foreign_entries(half, NESTED) == [half / "weights"]
    repair_interrupted_write(tmp_path / "made", NESTED)
    assert contents(elsewhere) == {"config.json": "precious"}
