"""How many files a reader meets on the way from the command line to the first changed weight.

The job is the smallest real one: CAMERA-P on the embedded mixture of experts, one task, four
documents. It runs in a process of its own under `sys.setprofile`. A file counts when one of its
functions is called before micro-experts are removed; what runs while a module is imported
(decorators, class bodies) does not count, since nobody reads that on the way.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[2]
LIMIT = 60
# The one place where micro-experts leave a model; entering one of these is the change.
CHANGING = "methods/moe/micro_experts.py"
FUNCTIONS = ("delete_micro_experts", "zero_micro_experts")
JOB = (
    "run", "model=micro_moe", "method=camera_p", "ratio=0.4", "benchmark=nine_tasks_micro",
    "benchmark.tasks=[arc_easy]", "benchmark.limit=4", "calibration.rows=4", "tracker=none",
)  # fmt: skip


def traced(results: str) -> int:
    """Run the job in this process and print one file per line, in the order of their first call."""
    files: list[str] = []
    changed = False

    def look(frame: FrameType, event: str, argument: object) -> None:
        nonlocal changed
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(str(ROOT)):
            return
        path = str(Path(name).relative_to(ROOT))
        if path == CHANGING and frame.f_code.co_name in FUNCTIONS:
            changed = True
            sys.setprofile(None)
        counted = path.split("/", maxsplit=1)[0] in ("bench", "methods", "hydra_plugins")
        if counted and path not in files and not _while_importing(frame):
            files.append(path)

    from bench.cli.main import main as bench

    sys.setprofile(look)
    try:
        code = bench([*JOB, f"results_dir={results}"])
    finally:
        sys.setprofile(None)
    for file in files:
        print(f"FILE {file}")
    if not changed:
        print(f"no weight changed: {CHANGING} was not reached", file=sys.stderr)
    return code if changed else 1


def _while_importing(frame: FrameType | None) -> bool:
    """Whether the call belongs to the execution of a module's top level: decorators, bases."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(str(ROOT)):
            return True
        frame = frame.f_back
    return False


def main() -> int:
    """Trace the job in a fresh process and print the files; 1 when there are too many."""
    with tempfile.TemporaryDirectory() as folder:
        code = "import sys; from tests.structure.trace import traced; sys.exit(traced(sys.argv[1]))"
        done = subprocess.run(
            [
                sys.executable,
                "-P",
                "-c",
                f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}",
                folder,
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
            # A new machine's: nothing is remembered, and its rates are not known.
            env=os.environ | {"XDG_CACHE_HOME": folder},
        )
    files = [line[5:] for line in done.stdout.splitlines() if line.startswith("FILE ")]
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return 1
    for place, file in enumerate(files, 1):
        print(f"{place:4d} {file}")
    print(
        f"{len(files)} files have a function called before the first weight changes (limit {LIMIT})"
    )
    return 0 if len(files) <= LIMIT else 1
