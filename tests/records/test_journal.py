"""A journal gives back every whole entry, whatever happened to its file."""

import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.records.journal import Journal

ENTRIES = [[["k1", [-1.25, True]]], [["k2", "ja\nnein ü"]], [["k3", float("inf")], ["k4", None]]]


def filled(folder, identity="w"):
    path = folder / "a" / "responses.journal"
    with Journal(path, identity) as journal:
        for entry in ENTRIES:
            journal.append(entry)
    return path


def found(path, identity="w"):
    with Journal(path, identity) as journal:
        return journal.entries, journal.notes


def test_what_is_appended_is_there_again(tmp_path):
    path = filled(tmp_path)
    assert found(path) == (ENTRIES, [])
    with Journal(path, "w") as journal:
        journal.append(["more"])
    assert found(path) == ([*ENTRIES, ["more"]], [])


@given(st.data())
def test_cut_anywhere_the_whole_entries_before_are_there(tmp_path_factory, data):
    path = filled(tmp_path_factory.mktemp("j"))
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = max(content[:cut].count(b"\n") - 1, 0)
    entries, _ = found(path)
    assert entries == ENTRIES[:whole]
    with Journal(path, "w") as journal:
        journal.append(["more"])
    assert found(path)[0] == [*ENTRIES[:whole], ["more"]]


@given(st.data())
def test_no_flipped_bit_is_ever_read(tmp_path_factory, data):
    path = filled(tmp_path_factory.mktemp("j"))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(content))
    entries, notes = found(path)
    assert all(entry in ENTRIES for entry in entries)
    assert len(entries) < len(ENTRIES)
    last_newline = place == len(content) - 1
    assert bool(notes) or last_newline
    assert all(str(path) in note for note in notes)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"format": 99, "identity": "w"}, "its format is 99, this program reads 1"),
        ({"format": 1, "identity": "v"}, "belongs to a network with different weights"),
        ([1], "its format is None"),
    ],
)
def test_another_format_or_identity_is_set_aside(tmp_path, header, said):
    path = filled(tmp_path)
    text = json.dumps(header).encode()
    rest = path.read_bytes().split(b"\n", 1)[1]
    path.write_bytes(b"%08x %b\n" % (zlib.crc32(text), text) + rest)
    whole = path.read_bytes()
    entries, (note,) = found(path)
    assert entries == [] and said in note and "responses.journal.aside1" in note
    assert path.with_name("responses.journal.aside1").read_bytes() == whole
    assert found(path) == ([], [])


def test_what_does_not_fit_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = filled(tmp_path)
    before = path.read_bytes()
    import os

    real = os.pwrite

    def short(handle, data, place):
        if len(data) < 5:
            raise OSError(28, "No space left on device")
        return real(handle, data[: len(data) // 2], place)

    with Journal(path, "w") as journal:
        monkeypatch.setattr(os, "pwrite", short)
        with pytest.raises(OSError, match="No space"):
            journal.append(["does not fit"])
        monkeypatch.undo()
        assert path.read_bytes() == before
        journal.append(["fits"])
    assert found(path) == ([*ENTRIES, ["fits"]], [])


def test_a_closed_journal_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("bench.records.journal.SYNC_SECONDS", 1e9)
    monkeypatch.setattr("bench.records.journal.os.fsync", synced.append)
    with Journal(tmp_path / "responses.journal", "w") as journal:
        journal.append(["an entry"])
        before = len(synced)
    assert len(synced) == before + 1
