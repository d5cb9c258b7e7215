"""`bench gc` lists what nothing refers to, and removes exactly that, and only what is ours."""

import json
import os

import pytest
from filelock import FileLock

from bench.cli.commands import gc
from bench.cli.commands.gc import MIN_AGE_SECONDS, find_unreferenced, remove
from bench.cli.main import main
from bench.errors import UserError
from bench.records import Store
from bench.records.store import MARKER
from bench.sweeps import RunRequest, RunResult, create_plan, perform_job
from tests.records.test_store import make

RUN, OTHER, GONE = "a" * 12, "b" * 12, "c" * 12


def age(root):
    """Let everything have been there for hours."""
    long_ago = root.stat().st_mtime - 3 * MIN_AGE_SECONDS
    for path in root.rglob("*"):
        os.utime(path, (long_ago, long_ago), follow_symlinks=False)


def sweep_of(root, run, seed):
    plan = create_plan(root, ["-m"], None).with_jobs([[f"seed={seed}"]], complete=True)
    perform_job(plan.folder, 0, RunRequest("bench run"), lambda: RunResult(make(run), reused=False))
    return plan


@pytest.fixture
def results(tmp_path):
    """A results folder with one record in one sweep, and one piece of every kind of garbage."""
    root = tmp_path / "results"
    Store(root).write(make(RUN), [], "")
    kept = sweep_of(root, RUN, 1)
    gone = sweep_of(root, GONE, 2)
    pieces = [
        root / "runs" / f".{OTHER}.abcd_123" / "record.json",
        root / "runs" / f".old-{RUN}.abcd_123" / RUN / "record.json",
        root / "runs" / ".probe-123",
        root / "locks" / f"{RUN}.lock",
        root / "tracked" / f"{GONE}.json",
        kept.folder / ".plan.json.abcd_123",
        kept.folder / "jobs" / ".00000.json.abcd_123",
        kept.folder / "submitit" / "1" / "1_submitted.pkl",
        root / "unfinished" / RUN / "samples.jsonl",
    ]
    for piece in pieces:
        piece.parent.mkdir(parents=True, exist_ok=True)
        piece.write_text("x" * 10)
    (root / "tracked" / f"{RUN}.json").write_text("{}")
    (root / "unfinished" / OTHER).mkdir()
    age(root)
    return root, kept, gone


def paths(entries):
    return {entry.path for entry in entries}


def expected(kept, gone):
    return {
        f"runs/.{OTHER}.abcd_123", f"runs/.old-{RUN}.abcd_123", "runs/.probe-123",
        f"locks/{RUN}.lock", f"tracked/{GONE}.json", f"unfinished/{RUN}",
        f"sweeps/{kept.name}/submitit", f"sweeps/{kept.name}/.plan.json.abcd_123",
        f"sweeps/{kept.name}/jobs/.00000.json.abcd_123", f"sweeps/{gone.name}",
    }  # fmt: skip


def test_everything_is_named_and_nothing_goes_unasked(results, capsys):
    root, kept, gone = results
    assert paths(find_unreferenced(root).removable) == expected(kept, gone)
    assert find_unreferenced(root).kept == ()
    before = sorted(root.rglob("*"))
    assert main(["gc", "--results-dir", str(root)]) == 0
    assert "nothing was deleted" in capsys.readouterr().err
    assert sorted(root.rglob("*")) == before
    assert main(["gc", "--json", "--results-dir", str(root)]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(expected(kept, gone))


def test_yes_removes_it_and_a_second_time_there_is_nothing(results, capsys):
    root, kept, gone = results
    assert main(["gc", "--yes", "--results-dir", str(root)]) == 0
    assert f"deleted {len(expected(kept, gone))}" in capsys.readouterr().err
    assert find_unreferenced(root) == gc.Findings((), ())
    assert [record.id for record in Store(root).all()] == [RUN]
    assert (kept.folder / "jobs" / "00000.json").is_file()
    assert (root / "tracked" / f"{RUN}.json").is_file()
    assert (root / "unfinished" / OTHER).is_dir()


def test_what_is_young_may_be_at_work(results):
    root, *_ = results
    for path in root.rglob("*"):
        os.utime(path)
    found = find_unreferenced(root)
    assert found.removable == ()
    assert all("younger" in entry.reason for entry in found.kept)


@pytest.mark.parametrize("name", ["runs", "sweeps", "tracked", "locks", "unfinished"])
def test_a_folder_that_is_a_link_is_left_with_all_it_leads_to(results, tmp_path, name, capsys):
    root, *_ = results
    precious = tmp_path / "precious"
    (root / name).rename(precious)
    (root / name).symlink_to(precious)
    before = sorted(precious.rglob("*"))
    assert main(["gc", "--yes", "--results-dir", str(root)]) == 0
    assert sorted(precious.rglob("*")) == before
    assert f"{root / name}: a link" in capsys.readouterr().err


@pytest.mark.parametrize("place", [
    "runs/.link", f"runs/.{OTHER}.abcd_124", f"unfinished/{RUN}0", f"tracked/{OTHER}.json",
    "locks/x.lock", "sweeps/20261128-000000-000000",
])  # fmt: skip
def test_no_link_is_followed_or_removed(results, tmp_path, place):
    root, *_ = results
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "work").write_text("years of it")
    (root / place).symlink_to(precious)
    age(root)
    assert main(["gc", "--yes", "--results-dir", str(root)]) == 0
    assert (root / place).is_symlink()
    assert (precious / "work").read_text() == "years of it"


@pytest.mark.parametrize("place", [
    "runs/.git/HEAD", "runs/.gitignore", "runs/.snapshot/x", "runs/.nfs0000000012345678",
    "locks/notes.txt", "tracked/mine.json", "unfinished/mine/x", "sweeps/mine/plan.json",
    "sweeps/.git/HEAD", f"runs/.{OTHER}.old-copy/x",
])  # fmt: skip
def test_what_we_did_not_write_is_left_by_name(results, place, capsys):
    root, *_ = results
    (root / place).parent.mkdir(exist_ok=True)
    (root / place).write_text("mine")
    age(root)
    assert main(["gc", "--yes", "--results-dir", str(root)]) == 0
    assert (root / place).read_text() == "mine"
    first = "/".join(place.split("/")[:2])
    assert f"kept {root / first}" in capsys.readouterr().err


def test_a_queued_sweep_and_one_of_a_newer_program_stay(results):
    root, *_ = results
    queued = create_plan(root, ["-m"], None).with_jobs([["seed=3"], ["seed=4"]], complete=True)
    (queued.folder / "submitit").mkdir()
    newer = create_plan(root, ["-m"], None)
    plan = newer.folder / "plan.json"
    plan.write_text(plan.read_text().replace('"schema_version": 2', '"schema_version": 99'))
    unplanned = create_plan(root, ["-m"], None)
    age(root)
    before = paths(find_unreferenced(root).removable)
    assert not any(sweep.name in path for sweep in (queued, newer, unplanned) for path in before)
    assert any("version 99" in entry.reason for entry in find_unreferenced(root).kept)


def test_a_forgotten_sweep_with_a_file_of_the_users_stays(results):
    root, _, gone = results
    (gone.folder / "thoughts.md").write_text("mine")
    age(root)
    found = find_unreferenced(root)
    assert f"sweeps/{gone.name}" not in paths(found.removable)
    assert any("thoughts.md" in entry.reason for entry in found.kept)


def test_the_only_copy_of_a_record_and_what_may_replace_one_stay(results):
    root, *_ = results
    (root / "runs" / RUN).rename(root / "runs" / f".old-{RUN}.abcd_123" / RUN / "moved")
    assert (
        "only copy"
        in {e.path: e.reason for e in find_unreferenced(root).kept}[f"runs/.old-{RUN}.abcd_123"]
    )
    (root / "runs" / f".old-{RUN}.abcd_123" / RUN / "moved").rename(root / "runs" / RUN)
    later = (root / "runs" / RUN / "record.json").stat().st_mtime + 60
    os.utime(root / "unfinished" / RUN / "samples.jsonl", (later, later))
    assert f"unfinished/{RUN}" not in paths(find_unreferenced(root).removable)


def test_what_a_process_holds_stays(results):
    root, *_ = results
    with FileLock(root / "locks" / f"{RUN}.lock"):
        held = paths(find_unreferenced(root).removable)
    assert not held & {f"locks/{RUN}.lock", f"unfinished/{RUN}", f"runs/.old-{RUN}.abcd_123"}


def test_what_changed_after_it_was_listed_stays(results):
    root, *_ = results
    listed = find_unreferenced(root).removable
    (root / "unfinished" / RUN / "new").write_text("a run has begun")
    note = root / "tracked" / f"{GONE}.json"
    note.unlink()
    note.write_text("another")
    left = {entry.path for entry, fault in remove(root, listed) if fault}
    assert left == {f"unfinished/{RUN}", f"tracked/{GONE}.json"}
    assert (root / "unfinished" / RUN / "new").is_file()


def test_a_folder_exchanged_for_a_link_at_the_last_moment_is_not_entered(results, tmp_path):
    root, *_ = results
    (entry,) = (e for e in find_unreferenced(root).removable if e.path.startswith("tracked/"))
    (root / "tracked").rename(tmp_path / "precious")
    (root / "tracked").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"directory|link"):
        gc._delete(root, entry)
    assert (tmp_path / "precious" / f"{GONE}.json").is_file()


def test_records_that_cannot_be_listed_are_not_gone(results):
    """As while the disk of a link is not mounted: their sweeps and notes stay."""
    root, _, _ = results
    (root / "runs").rename(root / "elsewhere")
    (root / "runs").symlink_to("unmounted")
    with pytest.raises(UserError, match="runs: cannot be read as a folder"):
        find_unreferenced(root)


@pytest.mark.parametrize("missing", ["marker", "folder"])
def test_a_folder_that_is_not_ours_is_refused(results, missing):
    root, *_ = results
    if missing == "marker":
        (root / MARKER).unlink()
    with pytest.raises(UserError, match=r"no file|no such folder"):
        find_unreferenced(root if missing == "marker" else root / "nowhere")


@pytest.mark.parametrize("place", [
    f"runs/.{OTHER}.abcd_123/notes.txt", f"runs/.{OTHER}.abcd_123/samples.parquet/deep",
    f"runs/.{OTHER}.abcd_123/mine/record.json", f"runs/.old-{RUN}.abcd_123/notes.txt",
    f"runs/.old-{RUN}.abcd_123/{RUN}/notes.txt", "sweeps/KEPT/submitit/1/notes.txt",
    "sweeps/GONE/submitit/notes.txt",
])  # fmt: skip
def test_a_users_file_in_a_folder_of_ours_keeps_it(results, place, capsys):
    root, kept, gone = results
    mine = root / place.replace("KEPT", kept.name).replace("GONE", gone.name)
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("years of it")
    age(root)
    assert main(["gc", "--yes", "--results-dir", str(root)]) == 0
    assert mine.read_text() == "years of it"
    said = capsys.readouterr().err
    assert "which slimbench did not write" in said
    assert any(part in said for part in mine.parts[-2:])
