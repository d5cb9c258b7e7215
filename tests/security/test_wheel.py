"""The wheel, installed outside the tree, in a folder whose modules bear our names."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.security.test_shadowing import HOSTILE

ROOT = Path(__file__).parents[2]
SHIPPED = ("bench", "methods", "conf", "hydra_plugins", "results")


def call(folder, *command):
    """Run a command in a folder, without anything of this working tree on its import path."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        command, cwd=folder, env=known, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The `bin` folder of an environment with the wheel and our site-packages, without our tree."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    # A copy: setuptools writes `build` and `egg-info` beside the sources.
    for name in SHIPPED:
        shutil.copytree(
            ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "runs")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    built = call(
        folder, sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
        "--no-index", "-w", str(folder), str(tree),
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("slimbench-*.whl")

    environment = folder / "environment"
    venv.create(environment, with_pip=False)
    binaries = environment / "bin"
    target = call(
        folder, binaries / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
    ).stdout.strip()
    # Ours as plain folders after its own: `site` would execute the .pth files in ours, one of which
    # is the editable install of this tree.
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(target, "ours.pth").write_text("\n".join(places) + "\n")
    done = call(
        folder, sys.executable, "-m", "pip", "--python", str(binaries / "python"), "install", "-q",
        "--no-deps", "--no-index", "--force-reinstall", "--ignore-installed", str(wheel),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return binaries


@pytest.fixture
def hostile_folder(tmp_path):
    """A folder of somebody who named their own modules as ours."""
    for name in ("bench.py", "methods.py", "conf/__init__.py", "results/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(HOSTILE)
    (tmp_path / "conf" / "config.yaml").write_text("a: 1\n")
    return tmp_path


@pytest.mark.slow
def test_the_wheel_works_beside_foreign_modules(installed, hostile_folder):
    where = call(
        hostile_folder, installed / "python", "-P", "-c", "import bench; print(bench.__file__)"
    )
    assert where.stdout.startswith(str(installed.parent)), where

    listed = call(hostile_folder, installed / "bench", "ls", "models", "--json")
    assert listed.returncode == 0, listed.stderr
    assert "micro_moe" in {row["model"] for row in json.loads(listed.stdout)}

    composed = call(hostile_folder, installed / "bench", "run", "--cfg", "job", "method=camera_p")
    assert composed.returncode == 0, composed.stderr
    assert "camera_p" in composed.stdout

    run = call(
        hostile_folder, installed / "bench", "run", "method=camera_p", "benchmark.tasks=[arc_easy]",
        "~benchmark.perplexity", "benchmark.limit=2", "calibration.rows=2", "costs.length=32",
        "tracker=none", "threads=1",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_python_itself_says_which_module_it_imports(installed, hostile_folder):
    # Python puts the working folder first for `-c` and in notebooks: nothing of ours is asked.
    done = call(hostile_folder, installed / "python", "-c", "import bench")
    assert done.stderr == "this is not slimbench\n"
    (hostile_folder / "bench.py").unlink()
    done = call(hostile_folder, installed / "python", "-c", "import bench; bench.run([])")
    assert "shadows slimbench's package 'methods'" in done.stderr
