""""""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.models import hashing as fingerprints
from bench.models.hashing import digest, fingerprint


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@settings(max_examples=30, deadline=None)
@given(first=st.binary(max_size=40), second=st.binary(max_size=40))
def test_equal_exactly_when_bytes_are(tmp_path_factory, first, second):
    folder = tmp_path_factory.mktemp("files")
    marks = []
    for number, content in enumerate((first, second)):
        (folder / str(number)).mkdir()
        file = folder / str(number) / "model.safetensors"
        file.write_bytes(content)
        marks.append(fingerprint([file]))
    assert (marks[0] == marks[1]) == (first == second)


def test_changes_with_names_and_not_with_order(tmp_path):
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file in files:
        file.write_text(file.name)
    assert fingerprint(files) == fingerprint(files[::-1])
    before = fingerprint(files[:2])
    assert fingerprint([files[0], files[1].rename(tmp_path / "d")]) != before


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"one")
    first = digest(file)
    real = fingerprints.hashlib.file_digest
    monkeypatch.setattr(fingerprints.hashlib, "file_digest", None)
    assert digest(file) == first
    monkeypatch.setattr(fingerprints.hashlib, "file_digest", real)
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert digest(file) != first


def test_a_broken_or_unwritable_cache_does_not_matter(tmp_path, monkeypatch):
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"one")
    first = digest(file)
    for remembered in fingerprints._digest_cache().iterdir():
        remembered.write_text("nonsense")
    assert digest(file) == first
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert digest(file) == first


def test_blobs_of_the_hub_are_named_by_their_digest(tmp_path):
    name = "ab" * 32
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_bytes(b"anything")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    assert digest(tmp_path / "model.safetensors") == name
