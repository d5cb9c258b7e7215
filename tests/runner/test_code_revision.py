"""The commit that a record names: never a clean one for a changed tree."""

import subprocess

import pytest

from bench.runner import execute


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A working tree with one commit that holds this package."""
    for name in ("bench/runner/execute.py", "methods/mine.py", "README.md", ".gitignore"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("results/\n")
    monkeypatch.setattr(execute, "__file__", str(tmp_path / "bench/runner/execute.py"))
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "someone")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "someone@example.org")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    return tmp_path


def git(tree, *arguments):
    done = subprocess.run(["git", "-C", tree, *arguments], check=True, capture_output=True)
    return done.stdout.decode().strip()


def revision():
    execute.code_revision.cache_clear()
    try:
        return execute.code_revision()
    finally:
        execute.code_revision.cache_clear()


def test_a_clean_tree_is_its_commit(tree):
    assert revision() == git(tree, "rev-parse", "HEAD")


@pytest.mark.parametrize(
    "name", ["methods/mine.py", "README.md", "methods/new.py", "conf/new.yaml"]
)
def test_a_changed_tree_is_dirty(tree, name):
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_text("changed")
    assert revision() == f"{git(tree, 'rev-parse', 'HEAD')}-dirty"


def test_a_staged_or_deleted_file_is_dirty(tree):
    (tree / "methods/mine.py").write_text("changed")
    git(tree, "add", ".")
    assert revision().endswith("-dirty")
    git(tree, "reset", "--quiet", "--hard")
    assert not revision().endswith("-dirty")
    (tree / "methods/mine.py").unlink()
    assert revision().endswith("-dirty")


@pytest.mark.parametrize("name", ["results/runs/record.json", "notes.txt"])
def test_results_and_notes_leave_it_clean(tree, name):
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_text("new")
    assert revision() == git(tree, "rev-parse", "HEAD")


def test_a_package_inside_somebodys_repository_has_no_commit(tree, monkeypatch):
    installed = tree / "results/site-packages/bench/runner/execute.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    monkeypatch.setattr(execute, "__file__", str(installed))
    assert revision() is None


def test_without_git_there_is_no_commit(tree, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert revision() is None
