"""Rendering of the page: template, style, scripts, and data that cannot become markup or code.

Text from data and models is untrusted. It enters the page only in two forms: as JSON in which every
character with a meaning in HTML or JavaScript is escaped, and as gzip in base64, whose alphabet has
no such character. A policy in the page's head allows only the page's own scripts, by hash, and no
network requests.
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
"""The page's own scripts. They share a scope, and each uses only earlier ones."""
PACKAGE_FILES = importlib.resources.files("bench.reporting.html")


def render_page(
    index: Mapping[str, object],
    details: Sequence[Sequence[Mapping[str, object]]],
    samples: Sequence[Mapping[str, object]],
    searches: Sequence[Mapping[str, object]] = (),
) -> str:
    """Return the complete HTML page."""
    # Escaping is enabled for every template, whatever its file name, and an undefined variable is
    # an error, because it could remove the security policy from the head.
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    # The policy contains hashes of the scripts as inserted, so they must not change afterwards, not
    # even in white space.
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
    """Return the libraries as released, except for the reference to a source map."""
    listed = json.loads(_read_text("vendor/vendor.json"))
    # Developer tools would request the source map, which is not shipped and which the policy
    # blocks.
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


# `<` starts `</script>` and `<!--`, which end or change a script element even inside strings.
# U+2028 and U+2029 are line breaks in JavaScript but not in JSON. They occur only inside JSON
# strings, where \u escapes are equivalent.
ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&'\u2028\u2029"}


def json_text(value: object) -> Markup:
    """Return compact JSON that is safe inside a script element; NaN and infinity become null."""
    return Markup(_dump(value).translate(ESCAPES))


def gzip_base64(value: object) -> str:
    """Return JSON as gzip in base64, which the browser unpacks on demand."""
    # "replace", because a model's answer may contain a lone surrogate, which UTF-8 cannot encode.
    text = _dump(value).encode("utf-8", "replace")
    # With mtime=0, the same records give the same file byte by byte.
    packed = gzip.compress(text, compresslevel=6, mtime=0)
    return base64.b64encode(packed).decode()


def security_policy(scripts: Sequence[str]) -> str:
    """Return the content security policy that allows exactly these inline scripts."""
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    # Inline styles are allowed for the style sheet in the head and for style attributes of plots.
    # The first rule forbids everything else that is not listed.
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
    # Takes a quarter of the time of Python's own encoder, which is needed only for lone surrogates.
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
