"""The page as a file: template, style, scripts, and data that cannot become markup or run.

Text from data and models is untrusted. It enters the page in two forms only: as JSON in which every
character with a meaning in HTML or JavaScript is escaped, and as gzip in base64, whose alphabet has
no such character. A policy in the page's head allows the page's own scripts by their hashes and
nothing else, network requests included.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup
from pydantic_core import to_json

APP_SCRIPTS = (
    "data", "format", "route", "theme", "figure", "grid", "overview", "leaderboard", "pareto",
    "tables", "samples", "run", "compare", "searches", "main",
)  # fmt: skip
"""The page's own scripts. They share one scope, and each uses only those before it."""
PACKAGE_FILES = importlib.resources.files("bench.reporting.html")


def render_page(
    index: Mapping[str, object],
    details: Sequence[Sequence[Mapping[str, object]]],
    samples: Sequence[Mapping[str, object]],
    searches: Sequence[Mapping[str, object]] = (),
) -> str:
    """Return the complete HTML page."""
    # Escaping is on for every template, not chosen by file name, and an undefined variable is an
    # error: a silent gap could drop the security policy from the head.
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    # The policy holds the hashes of exactly the texts that the template inserts: a script must not
    # change, not even by white space, once the policy is built.
    scripts = [*vendored_scripts(), app_script()]
    return environment.from_string(_read_text("page.html.jinja")).render(
        title="slimbench report",
        policy=security_policy(scripts),
        style=Markup(_read_text("style.css")),
        scripts=[Markup(script) for script in scripts],
        index=json_text(index),
        details=[gzip_base64(chunk) for chunk in details],
        samples=[gzip_base64(chunk) for chunk in samples],
        searches=[gzip_base64(search) for search in searches],
    )


def vendored_scripts() -> list[str]:
    """Return the libraries, each as released except for its pointer to a source map."""
    listed = json.loads(_read_text("vendor/vendor.json"))
    # Developer tools would request the source map, which the page's policy forbids and which is not
    # shipped.
    return [_without_map(_read_text(f"vendor/{entry['file']}")) for entry in listed]


def app_script() -> str:
    """Return the page's own scripts joined into one function scope."""
    parts = "\n".join(_read_text(f"app/{name}.js") for name in APP_SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}\n}})();'


def _without_map(script: str) -> str:
    lines = script.splitlines()
    return "\n".join(line for line in lines if not line.startswith("//# sourceMappingURL="))


def _read_text(name: str) -> str:
    return PACKAGE_FILES.joinpath(name).read_text(encoding="utf-8")


# `<` starts `</script>` and `<!--`, which end or change a script element in whatever string they
# stand; U+2028 and U+2029 are line breaks to JavaScript but not to JSON. Inside JSON strings, the
# only place where these can occur, \u escapes mean the same.
ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&'\u2028\u2029"}


def json_text(value: object) -> Markup:
    """Return compact JSON that is safe inside a script element; NaN and infinity become null."""
    return Markup(_dump(value).translate(ESCAPES))


def gzip_base64(value: object) -> str:
    """Return JSON as gzip in base64, which the browser unpacks on demand."""
    # "replace": a model's answer may hold a lone surrogate, which UTF-8 cannot encode.
    text = _dump(value).encode("utf-8", "replace")
    # mtime=0: the same records give the same file, byte by byte.
    packed = gzip.compress(text, compresslevel=6, mtime=0)
    return base64.b64encode(packed).decode()


def security_policy(scripts: Sequence[str]) -> str:
    """Return the content security policy that allows exactly these inline scripts."""
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    # Inline styles are allowed for the style sheet in the head and for the style attributes that
    # plots set. Whatever is not named here is denied by the first rule.
    rules = (
        "default-src 'none'",
        f"script-src {allowed}",
        "style-src 'unsafe-inline'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    )
    return "; ".join(rules)


def _dump(value: object) -> str:
    """Return compact JSON; infinite values and NaN become null."""
    # A quarter of the time of Python's own encoder, which alone writes half a character.
    try:
        return to_json(value, inf_nan_mode="null").decode()
    except ValueError:
        return json.dumps(_without_nonfinite(value), separators=(",", ":"), ensure_ascii=False)


def _without_nonfinite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(item) for item in value]
    return value
