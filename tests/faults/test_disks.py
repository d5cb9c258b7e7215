"""Disks that are full, read-only, or shared by many: said in a sentence, and nothing is lost."""

import json
import os
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.errors import UserError
from bench.records import Store, load
from tests.faults.killable_runs import (
    counting,
    largest_batch,
    lines,
    only,
    run,
    scored_twice,
    start,
    timeless,
    wait_for,
)
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


@dataclass
class Failing:
    """A real ext4 file system in a file, whose kernel can be told that the disk is broken."""

    image: Path
    folder: Path

    def mount(self):
        options = ["-o", "loop,errors=remount-ro"]
        asked = ["mount", "-t", "ext4", *options, str(self.image), str(self.folder)]
        return subprocess.run(asked, capture_output=True, check=False).returncode == 0

    @property
    def trigger(self):
        asked = ["findmnt", "-no", "SOURCE", str(self.folder)]
        source = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        return Path("/sys/fs/ext4", Path(source.strip()).name, "trigger_fs_error")

    def fail(self):
        self.trigger.write_text("1")

    def mend(self):
        subprocess.run(["umount", str(self.folder)], check=True)
        checked = ["e2fsck", "-fy", str(self.image)]
        assert subprocess.run(checked, capture_output=True, check=False).returncode < 4
        assert self.mount()


@pytest.fixture
def failing(tmp_path):
    """A disk that can turn read-only while it is written to: a remount would refuse."""
    disk = Failing(tmp_path / "image", tmp_path / "failing")
    disk.folder.mkdir()
    with disk.image.open("wb") as file:
        file.truncate(32 * 2**20)
    tools = all(map(shutil.which, ("mkfs.ext4", "e2fsck", "findmnt")))
    if os.geteuid() != 0 or not tools:
        pytest.skip("needs root, e2fsprogs and findmnt")
    subprocess.run(["mkfs.ext4", "-q", str(disk.image)], check=True)
    if not disk.mount():
        pytest.skip("needs the right to mount a loop device")
    yield disk
    subprocess.run(["umount", "-l", str(disk.folder)], check=True)


@pytest.mark.broad
def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(disk, same):
    results = disk / "results"
    (disk / "ballast").write_bytes(b"\0" * 56 * 1024)
    code, said = run(results, *RUN)
    assert code == 75, said
    assert "No space left on device" in said and "run the same command to resume" in said
    assert "Traceback" not in said
    assert not Store(results).all()
    (disk / "ballast").unlink()
    remount(disk, "size=8m")
    assert run(results, *RUN)[0] == 0
    same(results)


@pytest.mark.broad
@pytest.mark.parametrize(
    "kilobytes", [32, *(pytest.param(size, marks=pytest.mark.slow) for size in (8, 56))]
)
def test_a_full_disk_stops_a_sweep_wherever_it_is(disk, undisturbed, kilobytes):
    results, sweep = disk / "results", ("-m", *RUN, "seed=1,2")
    (disk / "ballast").write_bytes(b"\0" * (64 - kilobytes) * 1024)
    code, said = run(results, *sweep)
    assert code == 75, said
    assert "No space left on device" in said and "run the same command to resume" in said
    assert "Traceback" not in said
    (disk / "ballast").unlink()
    remount(disk, "size=8m")
    code, said = run(results, *sweep)
    assert code == 0, said
    assert len(Store(results).all()) == 2
    assert not list((results / "unfinished").iterdir())


@pytest.mark.broad
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


@pytest.mark.broad
def test_a_disk_that_turns_read_only_stops_the_run_which_goes_on_when_it_is_mended(
    failing, tmp_path, same
):
    results, log = failing.folder / "results", tmp_path / "scored"
    child = start(results, *RUN, before=counting(log, pause=1.0))
    wait_for(lambda: lines(results) > 3)
    failing.fail()
    assert child.wait() == 75, child.text
    assert "Read-only file system" in child.text and "run the same command to resume" in child.text
    assert "Traceback" not in child.text
    failing.mend()
    assert not Store(results).all()
    assert run(results, *RUN, before=counting(log))[0] == 0
    same(results)
    # What was not on the disk yet is gone: a second's batches, and the one in flight.
    assert scored_twice(log) <= 5 * largest_batch(log)


@pytest.mark.slow
def test_a_real_file_system_that_fills_up_stops_the_run_which_goes_on(failing, same):
    results, ballast = failing.folder / "results", failing.folder / "ballast"
    # All but a few blocks, as writing until it is refused leaves them.
    with ballast.open("wb") as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(2**16))
            file.flush()
    os.truncate(ballast, ballast.stat().st_size - 16 * 1024)
    code, said = run(results, *RUN)
    assert code == 75, said
    assert "No space left on device" in said and "Traceback" not in said
    assert not Store(results).all()
    ballast.unlink()
    assert run(results, *RUN)[0] == 0
    same(results)


def test_what_is_on_a_read_only_disk_can_be_read(disk):
    remount(disk, "size=8m")
    Store(disk / "results").write(make(), [], "")
    remount(disk, "ro")
    assert list(load(disk / "results").run.unique()) == ["a" * 12]


@pytest.mark.broad
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


@pytest.mark.broad
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
    assert (code, "is unreadable" in said) == (0, True)
    same(results)
    kept = json.loads((results / "aside" / record.id / "record.json").read_text())
    assert kept["metrics"][0]["value"] == 1.0
    assert timeless(record) == timeless(only(results))
