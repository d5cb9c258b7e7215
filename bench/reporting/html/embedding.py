"""Putting data and scripts into a page so that nothing in them can become markup or run.

Text of data and models is untrusted. It enters the page in two forms only: JSON in which every
character that HTML or JavaScript could take for its own is escaped, and gzip in base64, whose
alphabet has no such character. A policy in the page's head allows the page's own scripts by their
hashes and nothing else, no network included.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&'\u2028\u2029"}


def json_text(value: Any) -> Markup:
    """Return compact JSON that is safe inside a script element; NaN and infinity become null."""
    return Markup(_dumped(value).translate(ESCAPES))


def packed(value: Any) -> str:
    """Return JSON as gzip in base64, which the browser unpacks when it is asked for."""
    text = _dumped(value).encode("utf-8", "replace")
    squeezed = gzip.compress(text, compresslevel=6, mtime=0)
    return base64.b64encode(squeezed).decode()


def policy(scripts: Sequence[str]) -> str:
    """Return the content security policy that lets exactly these inline scripts run."""
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    rules = (
        "default-src 'none'",
        f"script-src {allowed}",
        "style-src 'unsafe-inline'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    )
    return "; ".join(rules)


def _dumped(value: Any) -> str:
    """Return compact JSON; what is not finite is rare, so it is looked for only when met."""
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except ValueError:
        return _dumped(_finite(value))


def _finite(value: Any) -> Any:
    """Return the value with every float that JSON cannot say replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
