"""Code that a config may name. Hydra imports what a `_target_` names, and importing runs code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.errors import UserError

# Hydra's own key, and the two keys of Python's logging configuration that name code.
TARGETS = frozenset({"_target_", "()", "class"})
HYDRAS_OWN = ("hydra", "hydra_plugins", "logging")


def refuse_foreign_code(node: Any, packages: Iterable[str], key: str = "") -> None:
    """Raise for any `_target_`, however deep in the config, outside the allowed packages.

    Raises:
        UserError: names the key, its value, and the packages.
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
                f"{here}={inner}: only code from {', '.join(allowed)} may run; "
                "add the package to packages=[...] if you trust it"
            )
        refuse_foreign_code(inner, allowed, here)
