"""Errors for packages that a task needs but that are not installed, with the pip command."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

from bench.errors import UserError

DISTRIBUTIONS = {
    "antlr4": "antlr4-python3-runtime",
    "cv2": "opencv-python-headless",
    "fitz": "pymupdf",
    "Levenshtein": "levenshtein",
    "PIL": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Modules that tasks import and whose distribution has a different name."""
_EXTRA = re.compile(r"""extra\s*==\s*["']([\w.-]+)["']""")
_NAME = re.compile(r"[\w.-]+")


def missing_package(harness: str, task: str, error: ImportError) -> UserError:
    """Build the error for a task whose code imports a module that is not installed.

    `harness` is the name of the harness's distribution.
    """
    module = (error.name or "").partition(".")[0]
    reason = " ".join(str(error).split())
    # Some tasks state the command in their error; others import a missing name of a module.
    if "pip install" in reason:
        return UserError(f"task {task!r} of {harness} needs what is not installed: {reason}")
    if not module or module in packages_distributions():
        return UserError(f"task {task!r} of {harness} cannot be imported: {reason}")
    command = pip_command(harness, module)
    return UserError(
        f"task {task!r} of {harness} needs {module}, which is not installed: {command}"
    )


def pip_command(harness: str, module: str) -> str:
    """Return the command that installs a module, by an extra of the harness if one lists it."""
    distribution = DISTRIBUTIONS.get(module, module)
    extras = sorted(_extras_with(harness, distribution), key=lambda extra: (len(extra), extra))
    wanted = f"{harness}[{extras[0]}]" if extras else distribution
    return f"pip install '{wanted}'"


def _extras_with(harness: str, distribution: str) -> Iterator[str]:
    try:
        requirements = requires(harness) or []
    except PackageNotFoundError:
        return
    for requirement in requirements:
        name, extra = _NAME.match(requirement), _EXTRA.search(requirement)
        # `dev` and `all` install far more than a task needs.
        if name and extra and _same(name[0], distribution) and extra[1] not in ("dev", "all"):
            yield extra[1]


def _same(one: str, other: str) -> bool:
    """Compare names of distributions as pip does: by PEP 503."""
    return re.sub(r"[-_.]+", "-", one).lower() == re.sub(r"[-_.]+", "-", other).lower()
