"""Digests of files and of source code: no changed byte is missed."""

import importlib
import io
import os
import subprocess
import sys
import tarfile
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.data import digests
from bench.data.digests import code_hash, digest, fingerprint

LONG_AGO = 1_500_000_000


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def later(monkeypatch):
    """Let an hour pass, after which a file that was just written is at rest."""
    real = time.time_ns
    monkeypatch.setattr(digests.time, "time_ns", lambda: real() + 3600 * 10**9)


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


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch, later):
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"one")
    first = digest(file)
    real = digests.hashlib.file_digest
    monkeypatch.setattr(digests.hashlib, "file_digest", None)
    assert digest(file) == first
    monkeypatch.setattr(digests.hashlib, "file_digest", real)
    file.write_bytes(b"two")
    assert digest(file) != first


def overwrite(file, content):
    file.write_bytes(content)


def exchange(file, content):
    other = file.with_name("other")
    other.write_bytes(content)
    other.replace(file)


def unpack(file, content):
    """As `tar --mtime` packs, and image layers and reproducible builds with it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        member = tarfile.TarInfo(file.name)
        member.size, member.mtime = len(content), LONG_AGO
        archive.addfile(member, io.BytesIO(content))
    packed.seek(0)
    with tarfile.open(fileobj=packed) as archive:
        archive.extractall(file.parent, filter="data")


def copy_with_times(file, content):
    source = file.with_name("source")
    source.write_bytes(content)
    os.utime(source, (LONG_AGO, LONG_AGO))
    subprocess.run(["cp", "--preserve=all", source, file], check=True)


def through_a_link(file, content):
    """As an edit of a snapshot in the hub's cache: the blob changes, its name does not."""
    blob = file.parent / "blobs" / ("ab" * 32)
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(content)
    file.unlink(missing_ok=True)
    file.symlink_to(blob)


@pytest.mark.parametrize(
    "write",
    [overwrite, exchange, unpack, copy_with_times, through_a_link],
    ids=lambda f: f.__name__,
)
def test_equal_size_and_time_hide_no_change(tmp_path, write, later):
    file = tmp_path / "model.safetensors"
    seen = []
    for content in (b"old bytes", b"new bytes"):
        write(file, content)
        os.utime(file, (LONG_AGO, LONG_AGO))
        assert (file.stat().st_size, file.stat().st_mtime) == (9, LONG_AGO)
        seen.append(digest(file))
    assert seen[0] != seen[1]


def test_what_was_just_written_is_not_remembered(tmp_path, monkeypatch):
    # Within one step of the file system's clock a second write changes no time.
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"one")
    stamp = digests.file_stamp(file)
    monkeypatch.setattr(digests, "file_stamp", lambda _: stamp)
    first = digest(file)
    file.write_bytes(b"two")
    assert digest(file) != first


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path, monkeypatch, later):
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"one")
    real = digests.hashlib.file_digest

    def read_and_change(stream, name):
        read = real(stream, name)
        file.write_bytes(b"two, longer")
        return read

    monkeypatch.setattr(digests.hashlib, "file_digest", read_and_change)
    first = digest(file)
    monkeypatch.setattr(digests.hashlib, "file_digest", real)
    assert digest(file) != first


@pytest.mark.parametrize("content", ["nonsense", "[1]", '["a"]', "{}", "null", ""])
def test_a_broken_or_unwritable_memory_does_not_matter(tmp_path, monkeypatch, later, content):
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"one")
    first = digest(file)
    (remembered,) = digests._digest_memory().iterdir()
    remembered.write_text(content)
    assert digest(file) == first
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert digest(file) == first


@pytest.fixture
def plug_in(tmp_path, monkeypatch, forget_sources):
    """Return a function that writes source files, and one that hashes a module of them anew."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(**files):
        for name, content in files.items():
            path = name.replace("__in__", "/")
            file = tmp_path / path if "." in path else tmp_path / f"{path}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)

    def hashed(module):
        forget()
        importlib.invalidate_caches()
        found = importlib.import_module(module)
        return code_hash(tmp_path / found.__file__, module, module.partition(".")[0])

    def forget():
        forget_sources()
        for name in [name for name in sys.modules if name.startswith("plugged")]:
            del sys.modules[name]

    yield write, hashed
    forget()


def test_the_source_of_a_package_without_init_counts(plug_in):
    write, hashed = plug_in
    write(plugged_a__in__method="from plugged_a.deep import factor", plugged_a__in__deep="factor=1")
    before = hashed("plugged_a.method")
    write(plugged_a__in__deep="factor=2")
    assert hashed("plugged_a.method") != before


def test_a_single_module_counts_with_the_modules_beside_it(plug_in):
    write, hashed = plug_in
    write(plugged_b="import plugged_helper", plugged_helper="factor=1", plugged_other="x=1")
    before = hashed("plugged_b")
    write(plugged_other="x=2")
    assert hashed("plugged_b") == before
    write(plugged_helper="factor=2")
    assert hashed("plugged_b") != before


def test_another_package_of_the_users_counts(plug_in):
    write, hashed = plug_in
    write(
        plugged_c__in__method="from plugged_lib import maths", plugged_lib__in__maths="factor=1",
        plugged_c__in____init__="", plugged_lib__in____init__="",
    )  # fmt: skip
    before = hashed("plugged_c.method")
    write(plugged_lib__in__maths="factor=2")
    assert hashed("plugged_c.method") != before


def test_a_table_beside_a_module_counts_and_its_readme_does_not(plug_in, tmp_path):
    write, hashed = plug_in
    write(plugged_d__in__method="", plugged_d__in____init__="")
    (tmp_path / "plugged_d" / "scale.json").write_text("1")
    before = hashed("plugged_d.method")
    (tmp_path / "plugged_d" / "README.md").write_text("a method")
    assert hashed("plugged_d.method") == before
    (tmp_path / "plugged_d" / "scale.json").write_text("2")
    assert hashed("plugged_d.method") != before


def test_installed_libraries_are_not_read(plug_in, monkeypatch):
    write, hashed = plug_in
    write(plugged_e="import os, numpy, torch, transformers, bench.method, pydantic")
    opened = []
    real = digests.contents_hash
    monkeypatch.setattr(digests, "contents_hash", lambda files: opened.extend(files) or real(files))
    hashed("plugged_e")
    assert opened == ["plugged_e"]
