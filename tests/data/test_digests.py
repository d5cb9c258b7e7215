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
    (remembered,) = digests.cache_folder("digests").iterdir()
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


NAMES = ("s.json", "s.pt", "s.bin", "S", "README.md", "tables/s.json", "a/b/c/s.gguf")


@pytest.mark.parametrize("name", NAMES)
def test_any_file_of_a_users_package_counts(plug_in, tmp_path, name):
    write, hashed = plug_in
    write(plugged_d__in__method="", plugged_d__in____init__="")
    seen = [hashed("plugged_d.method")]
    file = tmp_path / "plugged_d" / name
    for content in ("1", "2"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        seen.append(hashed("plugged_d.method"))
    assert len(set(seen)) == 3


@settings(max_examples=20, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["a", "b", "__pycache__", ".git", ".cache"]), max_size=3),
    name=st.sampled_from(["x", "x.pt", "x.bin", "x.json", "__init__.py", ".x", "x.pyc"]),
)
def test_all_but_caches_and_hidden_folders_lie_within(tmp_path_factory, parts, name):
    folder = tmp_path_factory.mktemp("package")
    file = folder.joinpath(*parts, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    counts = not {"__pycache__", ".git", ".cache"} & set(parts) and name != "x.pyc"
    assert list(digests.files_within(folder).values()) == [file] * counts


def test_linked_folders_count_and_a_loop_of_links_ends(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "s.json").touch()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "tables").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "back").symlink_to(tmp_path / "package")
    (tmp_path / "package" / "gone").symlink_to(tmp_path / "nothing")
    assert list(digests.files_within(tmp_path / "package")) == ["tables/s.json"]


def test_a_module_that_is_imported_dynamically_counts_with_its_imports(plug_in):
    write, hashed = plug_in
    write(
        plugged_f__in__method="import importlib as i\ni.import_module('.hidden', __package__)",
        plugged_f__in__hidden="import plugged_far", plugged_f__in____init__="", plugged_far="x=1",
    )  # fmt: skip
    before = hashed("plugged_f.method")
    write(plugged_far="x=2")
    between = hashed("plugged_f.method")
    write(plugged_f__in__hidden="import plugged_far\nx=1")
    assert len({before, between, hashed("plugged_f.method")}) == 3


def test_a_draft_that_python_does_not_run_is_hashed_and_not_parsed(plug_in):
    write, hashed = plug_in
    write(plugged_g__in__method="", plugged_g__in____init__="", plugged_g__in__draft="def (")
    before = hashed("plugged_g.method")
    write(plugged_g__in__draft="def f(")
    assert hashed("plugged_g.method") != before


def test_a_package_of_many_files_counts_by_content(plug_in, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_FILES_READ", 2)
    monkeypatch.setattr(digests, "_OWN_MEMORY", 2)
    write, hashed = plug_in
    write(plugged_h__in__method="", plugged_h__in____init__="")
    files = [tmp_path / "plugged_h" / name for name in ("a.pt", "b.pt")]
    for file in files:
        file.write_text("1")
    before = hashed("plugged_h.method")
    files[0].write_text("2")
    os.utime(files[0], (LONG_AGO, LONG_AGO))
    assert hashed("plugged_h.method") != before


def many(folder, count=digests._OWN_MEMORY + 1):
    files = {f"{number}.png": folder / f"{number}.png" for number in range(count)}
    for file in files.values():
        file.write_bytes(b"old bytes")
    return files


def test_many_files_share_a_memory_and_are_read_once_until_one_changes(
    tmp_path, monkeypatch, later
):
    files = many(tmp_path)
    states, weak = digests.file_states(files)
    assert weak is None
    assert states == {name: digest(file) for name, file in files.items()}
    read, real = [], digests.hashlib.file_digest
    monkeypatch.setattr(
        digests.hashlib, "file_digest", lambda s, kind: read.append(s.name) or real(s, kind)
    )
    assert digests.file_states(files)[0] == states
    assert read == []
    exchange(files["7.png"], b"new bytes")
    os.utime(files["7.png"], (LONG_AGO, LONG_AGO))
    files["new.png"] = files.pop("8.png").rename(tmp_path / "new.png")
    after, _ = digests.file_states(files)
    assert after["7.png"] != states["7.png"]
    assert after["new.png"] == states["8.png"]
    assert {name.rpartition("/")[2] for name in read} == {"7.png", "new.png"}


def test_many_files_just_written_are_not_remembered(tmp_path, monkeypatch):
    files = many(tmp_path)
    stamp = digests.file_stamp(files["1.png"])
    monkeypatch.setattr(digests, "file_stamp", lambda _: stamp)
    first = digests.state_hash(files)
    files["1.png"].write_bytes(b"new bytes")
    assert digests.state_hash(files) != first


@pytest.mark.parametrize("content", ["nonsense", "[1]", '{"1.png": 5}', '{"1.png": [1, "x"]}', ""])
def test_a_broken_memory_of_many_files_does_not_matter(tmp_path, later, content):
    files = many(tmp_path)
    first = digests.state_hash(files)
    (remembered,) = digests.cache_folder("digests").iterdir()
    remembered.write_text(content)
    assert digests.state_hash(files) == first


@pytest.mark.parametrize("limit", ["MAX_READ_BYTES", "MAX_REMEMBERED"])
def test_a_set_that_is_too_large_to_read_says_so(tmp_path, monkeypatch, limit):
    files = many(tmp_path)
    monkeypatch.setattr(digests, limit, 100)
    before = digests.state_hash(files)
    assert before.endswith("(by size and time: 101 files of 0.0 GiB)")
    files["1.png"].write_bytes(b"longer than before")
    assert digests.state_hash(files) != before


@pytest.mark.parametrize(
    ("source", "name", "changes"),
    [
        ("open(HERE / 's.pt')", "s.pt", True),
        ("open(HERE / 'tables' / 's.json')", "tables/s.json", True),
        ("open(HERE / 'tables/s.json')", "tables/s.json", True),
        ("open(f'{HERE}/s.bin')", "s.bin", True),
        ("__import__('plugged_named')", "plugged_named.py", True),
        ("open(HERE / 's.pt')", "s.json", False),
        ("'.', '..', '/', '', '../../s.json'", "s.json", False),
    ],
)
def test_of_what_lies_beside_a_single_module_what_its_strings_name_counts(
    plug_in, tmp_path, source, name, changes
):
    write, hashed = plug_in
    # In a function, for the files need not be there when the module is imported.
    write(plugged_i=f"def late():\n    {source}")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x=1")
    before = hashed("plugged_i")
    (tmp_path / name).write_text("x=2")
    assert (hashed("plugged_i") != before) == changes


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("one/s.pt", True),
        ("one/tables/deep/s.json", True),
        ("two/s.pt", False),
        ("two/tables/s.json", False),
        ("two/method.py", False),
    ],
)
def test_of_packages_of_many_methods_the_data_of_those_that_are_imported_counts(
    plug_in, tmp_path, monkeypatch, name, changes
):
    monkeypatch.setattr(digests, "_BY_IMPORTS", {"plugged_many"})
    write, hashed = plug_in
    for family in ("one", "two"):
        (tmp_path / "plugged_many" / family).mkdir(parents=True)
        (tmp_path / "plugged_many" / family / "__init__.py").touch()
        (tmp_path / "plugged_many" / family / "method.py").touch()
    write(plugged_many__in____init__="")
    before = hashed("plugged_many.one.method")
    (tmp_path / "plugged_many" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "plugged_many" / name).write_text("x=1")
    assert (hashed("plugged_many.one.method") != before) == changes


def test_installed_libraries_are_not_read(plug_in, monkeypatch):
    write, hashed = plug_in
    write(plugged_e="import os, numpy, torch, transformers, bench.method, pydantic")
    opened = []
    real = digests.contents_hash
    monkeypatch.setattr(digests, "contents_hash", lambda files: opened.extend(files) or real(files))
    hashed("plugged_e")
    assert opened == ["plugged_e"]
