"""How many files a reader meets on the way from the command line to the first changed weight.

The job is the smallest real one: CAMERA-P on the embedded mixture of experts, one task, four
documents. It runs in a process of its own under `sys.setprofile`; a file counts when a function
of it is called, so importing a module is free and so are class bodies. The first change of a
weight is taken from the weights themselves: every call of the file that removes micro-experts is
followed by a look at the versions that PyTorch keeps of each parameter.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

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
    seen: set[str] = set()
    changed = False

    def look(frame, event, argument):
        nonlocal changed
        if event != "call" or changed:
            return
        code = frame.f_code
        if not code.co_filename.startswith(str(ROOT)) or code.co_name in ("<module>", "<genexpr>"):
            return
        if code.co_name == frame.f_locals.get("__qualname__"):  # the body of a class
            return
        path = Path(code.co_filename).relative_to(ROOT)
        if path.parts[0] not in ("bench", "methods", "hydra_plugins"):
            return
        if str(path) not in seen and not _is_class_body(frame):
            seen.add(str(path))
            files.append(str(path))
        if str(path) == CHANGING and code.co_name in FUNCTIONS:
            changed = True
            sys.setprofile(None)

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


def _is_class_body(frame) -> bool:
    """A class body runs as a call named like the class, with `__module__` among its locals."""
    return "__module__" in frame.f_locals and "__qualname__" in frame.f_locals


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
