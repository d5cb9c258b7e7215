"""`bench gc` names what nothing refers to, asks, and touches neither records nor what is young."""

import json
import os

import pytest

from bench.cli.commands.gc import MIN_AGE_SECONDS, find_unreferenced
from bench.cli.main import main
from bench.records import Store
from bench.sweeps import RunRequest, RunResult, create_plan, perform_job
from tests.records.test_store import make

RUN = "a" * 12


@pytest.fixture
def results(tmp_path):
    """A results folder with one record in one sweep, and one piece of every kind of garbage."""
    store = Store(tmp_path)
    store.write(make(RUN), [], "")
    kept = create_plan(tmp_path, ["-m"], None).with_jobs([["seed=1"]], complete=True)
    perform_job(kept.folder, 0, RunRequest("bench run"), lambda: RunResult(make(RUN), reused=False))
    gone = create_plan(tmp_path, ["-m"], None).with_jobs([["seed=2"]], complete=True)
    pieces = [
        tmp_path / "runs" / ".0123.half" / "record.json",
        tmp_path / "locks" / f"{RUN}.lock",
        tmp_path / "tracked" / "cccccccccccc.json",
        tmp_path / "unfinished" / RUN / "samples.jsonl",
        tmp_path / "sweeps" / "without_plan" / "jobs" / "00000.json",
        kept.folder / "submitit" / "1" / "1_submitted.pkl",
    ]
    for piece in pieces:
        piece.parent.mkdir(parents=True, exist_ok=True)
        piece.write_text("x" * 10)
    (tmp_path / "tracked" / f"{RUN}.json").write_text("{}")
    (tmp_path / "unfinished" / "dddddddddddd").mkdir()
    long_ago = tmp_path.stat().st_mtime - 2 * MIN_AGE_SECONDS
    for path in tmp_path.rglob("*"):
        os.utime(path, (long_ago, long_ago))
    return tmp_path, kept, gone


def test_everything_is_named_and_nothing_goes_unasked(results, capsys):
    root, kept, gone = results
    expected = {
        "runs/.0123.half", f"locks/{RUN}.lock", "tracked/cccccccccccc.json", f"unfinished/{RUN}",
        "sweeps/without_plan", f"sweeps/{kept.name}/submitit", f"sweeps/{gone.name}",
    }  # fmt: skip
    assert {str(item.path.relative_to(root)) for item in find_unreferenced(root)} == expected
    before = sorted(root.rglob("*"))
    assert main(["gc", "--results-dir", str(root)]) == 0
    assert "nothing was removed" in capsys.readouterr().err
    assert sorted(root.rglob("*")) == before
    assert main(["gc", "--json", "--results-dir", str(root)]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(expected)


def test_yes_removes_it_and_a_second_time_there_is_nothing(results, capsys):
    root, kept, _ = results
    assert main(["gc", "--yes", "--results-dir", str(root)]) == 0
    assert "removed 7" in capsys.readouterr().err
    assert find_unreferenced(root) == []
    assert [record.id for record in Store(root).all()] == [RUN]
    assert (kept.folder / "jobs" / "00000.json").is_file()
    assert (root / "tracked" / f"{RUN}.json").is_file()
    assert (root / "unfinished" / "dddddddddddd").is_dir()


def test_what_is_young_may_be_at_work(results):
    root, *_ = results
    for path in root.rglob("*"):
        os.utime(path)
    assert find_unreferenced(root) == []


def test_links_are_removed_and_never_followed(results, tmp_path_factory):
    root, *_ = results
    precious = tmp_path_factory.mktemp("precious")
    (precious / "work").write_text("years of it")
    link = root / "runs" / ".link"
    link.symlink_to(precious)
    long_ago = root.stat().st_mtime - 2 * MIN_AGE_SECONDS
    os.utime(link, (long_ago, long_ago), follow_symlinks=False)
    assert main(["gc", "--yes", "--results-dir", str(root)]) == 0
    assert not link.is_symlink()
    assert (precious / "work").read_text() == "years of it"
