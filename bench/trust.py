"""Which code a config may name. Hydra imports what a `_target_` names, and importing is running."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.errors import UserError

# Hydra's own word, and the two words of Python's logging configuration that name code.
TARGETS = frozenset({"_target_", "()", "class"})
HYDRAS_OWN = ("hydra", "hydra_plugins", "logging")


def refuse_foreign_code(node: Any, packages: Iterable[str], key: str = "") -> None:
    """Raise for a name of code, however deep in the config, outside the packages that may run.

    Raises:
        UserError: names the key, what it names, and the packages.
    """
    allowed = tuple(packages)
    if isinstance(node, list | tuple):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return
    for name, inner in node.items():
        here = f"{key}.{name}" if key else str(name)
        if name in TARGETS and isinstance(inner, str) and inner.partition(".")[0] not in allowed:
            raise UserError(
                f"{here}={inner}: code runs only from {', '.join(allowed)}; "
                "name the package in packages=[...] if you trust it"
            )
        refuse_foreign_code(inner, allowed, here)
