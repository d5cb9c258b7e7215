"""Assemble the page from one template, one style sheet, the scripts and the data."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from bench.reporting.html.embedding import json_text, packed, policy

APP = (
    "data", "format", "route", "theme", "figure", "grid", "overview", "leaderboard", "pareto",
    "tables", "samples", "run", "main",
)  # fmt: skip
"""The page's own scripts. They share one scope, and each uses only those before it."""
HERE = importlib.resources.files("bench.reporting.html")


def render(
    index: dict[str, Any],
    details: Sequence[Sequence[dict[str, Any]]],
    samples: Sequence[dict[str, Any]],
) -> str:
    """Return the complete HTML page."""
    # Escaping is on for every template, not chosen by file name, and an undefined variable is an
    # error: a silent gap could drop the security policy from the head.
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    # The policy holds the hashes of exactly the texts that the template inserts: a script must not
    # change, not even by white space, once the policy is built.
    scripts = [*vendored(), application()]
    return environment.from_string(_text("page.html.jinja")).render(
        title="slimbench report",
        policy=policy(scripts),
        style=Markup(_text("style.css")),
        scripts=[Markup(script) for script in scripts],
        index=json_text(index),
        details=[packed(chunk) for chunk in details],
        samples=[packed(chunk) for chunk in samples],
    )


def vendored() -> list[str]:
    """Return the libraries, each as released except for its pointer to a source map."""
    listed = json.loads(_text("vendor/vendor.json"))
    # Developer tools would request the source map, which the page's policy forbids and which is not
    # shipped.
    return [_without_map(_text(f"vendor/{entry['file']}")) for entry in listed]


def application() -> str:
    """Return the page's own scripts joined into one function scope."""
    parts = "\n".join(_text(f"app/{name}.js") for name in APP)
    return f'(() => {{\n"use strict";\n{parts}\n}})();'


def _without_map(script: str) -> str:
    lines = script.splitlines()
    return "\n".join(line for line in lines if not line.startswith("//# sourceMappingURL="))


def _text(name: str) -> str:
    return HERE.joinpath(name).read_text(encoding="utf-8")
