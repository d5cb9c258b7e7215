"""Disks that are full, read-only, or shared by many: said in a sentence, and nothing is lost."""

import json
import os
import resource
import subprocess

import pytest

from bench.errors import UserError
from bench.records import Store, load
from tests.faults.processes import only, run, timeless
from tests.records.test_store import make

RUN = ("method=camera_p", "ratio=0.4")


def mounted(folder, *options):
    done = subprocess.run(
        ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    return done.returncode == 0


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own, which only root can have."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or not mounted(folder, "-o", "size=64k"):
        pytest.skip("needs root and the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(disk, same):
    results = disk / "results"
    (disk / "ballast").write_bytes(b"\0" * 56 * 1024)
    code, said = run(results, *RUN)
    assert code == 75, said
    assert "No space left on device" in said and "goes on where this stopped" in said
    assert "Traceback" not in said
    assert not Store(results).all()
    (disk / "ballast").unlink()
    remount(disk, "size=8m")
    assert run(results, *RUN)[0] == 0
    same(results)


def test_a_quota_stops_the_run(tmp_path, same):
    results = tmp_path / "results"

    def arm():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000))

    code, said = run(results, *RUN, before=arm)
    assert code == 75, said
    assert "File too large" in said and "Traceback" not in said
    assert not Store(results).all()
    assert run(results, *RUN)[0] == 0
    same(results)


def test_a_read_only_folder_is_refused_before_any_work(disk):
    results = disk / "results"
    results.mkdir()
    remount(disk, "ro")
    code, said = run(results, *RUN)
    assert code == 2
    assert said.strip() == (
        f"bench: results_dir={results}: cannot be written (Read-only file system)"
    )


def test_what_is_on_a_read_only_disk_can_be_read(disk):
    remount(disk, "size=8m")
    Store(disk / "results").write(make(), [], "")
    remount(disk, "ro")
    assert list(load(disk / "results").run.unique()) == ["a" * 12]


def test_twenty_processes_write_five_hundred_records(tmp_path):
    def write_some(number):
        store = Store(tmp_path)
        for each in range(25):
            run_id = f"{number * 25 + each:012x}"
            with store.claim(run_id):
                store.write(make(run_id), [{"task": "t", "doc_id": each}], "a: 1\n")
            with store.claim("f" * 12):
                if store.find("f" * 12) is None:
                    store.write(make("f" * 12, value=number / 20), [], "")

    children = []
    for number in range(20):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                write_some(number)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 20
    store = Store(tmp_path)
    assert len(store.all()) == 501
    assert store.unreadable == {}
    assert len(load(tmp_path).run.unique()) == 501
    assert not [path for path in store.runs.iterdir() if path.name.startswith(".")]


def test_a_damaged_record_is_made_again_and_kept_aside(tmp_path, same):
    results = tmp_path / "results"
    assert run(results, *RUN)[0] == 0
    record = only(results)
    path = results / "runs" / record.id / "record.json"
    whole = json.loads(path.read_text())
    whole["metrics"][0]["value"] = 1.0
    path.write_text(json.dumps(whole))
    with pytest.raises(UserError, match="checksum does not match"):
        Store(results).get(record.id)
    code, said = run(results, *RUN)
    assert (code, "cannot be read" in said) == (0, True)
    same(results)
    kept = json.loads((results / "aside" / record.id / "record.json").read_text())
    assert kept["metrics"][0]["value"] == 1.0
    assert timeless(record) == timeless(only(results))
