"""Modules of the user's that bear the names of ours: everything works, or one sentence says why."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import security
from bench.config.composition import compose_run_config, config_names
from bench.errors import UserError
from bench.schema import TrackerConfig
from bench.sweeps.launchers.local import SAFE_PATH, safe_import_path
from bench.tracking import upload

HOSTILE = "raise SystemExit('this is not slimbench')\n"


@pytest.fixture
def hostile_folder(tmp_path):
    """A folder of somebody who named their own modules as ours."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "__init__.py").write_text(HOSTILE)
    (tmp_path / "conf" / "config.yaml").write_text("a: 1\n")
    (tmp_path / "methods.py").write_text(HOSTILE)
    (tmp_path / "bench.py").write_text(HOSTILE)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "__init__.py").write_text(HOSTILE)
    return tmp_path


def python(folder, *arguments):
    """Start Python in a folder, with this working tree on its import path."""
    known = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=known, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_config_tree_is_found_beside_a_foreign_conf(hostile_folder, monkeypatch):
    (hostile_folder / "methods.py").unlink()
    monkeypatch.chdir(hostile_folder)
    monkeypatch.syspath_prepend(str(hostile_folder))
    monkeypatch.delitem(sys.modules, "conf", raising=False)
    assert "camera_p" in config_names("method")
    assert compose_run_config(["method=camera_p"]).model.name == "micro_moe"


def test_a_module_in_front_of_methods_is_named_in_one_sentence(hostile_folder, monkeypatch):
    monkeypatch.syspath_prepend(str(hostile_folder))
    monkeypatch.delitem(sys.modules, "methods", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=r"methods\.py shadows slimbench's package 'methods'"):
        compose_run_config(["method=camera_p"])


def test_a_plugin_package_in_front_of_hydras_is_named(tmp_path, monkeypatch):
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "hydra_plugins", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(UserError, match="hydra_plugins"):
        security.refuse_shadowed_packages()


def test_a_notebook_beside_foreign_modules_works_or_says_why(hostile_folder):
    (hostile_folder / "bench.py").unlink()
    # `python -c` and a notebook put the working folder first on sys.path.
    run = "import bench; bench.run(['method=camera_p'])"
    done = python(hostile_folder, "-c", run)
    assert "shadows slimbench's package 'methods'" in done.stderr.splitlines()[-1]
    done = python(hostile_folder, "-P", "-c", "import bench.ui; print(bench.__file__)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("before", [None, "0"])
def test_workers_of_a_launcher_do_not_import_from_the_working_folder(
    hostile_folder, monkeypatch, before
):
    if before is None:
        monkeypatch.delenv(SAFE_PATH, raising=False)
    else:
        monkeypatch.setenv(SAFE_PATH, before)
    # submitit and loky start their workers with `-m`.
    with safe_import_path():
        done = python(hostile_folder, "-m", "bench", "--help")
    assert done.returncode == 0, done.stderr
    assert os.environ.get(SAFE_PATH) == before


def test_an_upload_does_not_import_from_the_working_folder(hostile_folder, monkeypatch):
    monkeypatch.chdir(hostile_folder)
    with pytest.raises(upload.UploadFailed, match="unknown run"):
        upload.upload_in_subprocess("0123", hostile_folder / "none", TrackerConfig(kind="wandb"))
