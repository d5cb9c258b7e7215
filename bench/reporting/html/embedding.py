"""Embed data and scripts in a page so that nothing in them can become markup or run.

Text from data and models is untrusted. It enters the page in two forms only: as JSON in which every
character with a meaning in HTML or JavaScript is escaped, and as gzip in base64, whose alphabet has
no such character. A policy in the page's head allows the page's own scripts by their hashes and
nothing else, network requests included.
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

# `<` starts `</script>` and `<!--`, which end or change a script element in whatever string they
# stand; U+2028 and U+2029 are line breaks to JavaScript but not to JSON. Inside JSON strings, the
# only place where these can occur, \u escapes mean the same.
ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&'\u2028\u2029"}


def json_text(value: Any) -> Markup:
    """Return compact JSON that is safe inside a script element; NaN and infinity become null."""
    return Markup(_dumped(value).translate(ESCAPES))


def packed(value: Any) -> str:
    """Return JSON as gzip in base64, which the browser unpacks on demand."""
    # "replace": a model's answer may hold a lone surrogate, which UTF-8 cannot encode.
    text = _dumped(value).encode("utf-8", "replace")
    # mtime=0: the same records give the same file, byte by byte.
    squeezed = gzip.compress(text, compresslevel=6, mtime=0)
    return base64.b64encode(squeezed).decode()


def policy(scripts: Sequence[str]) -> str:
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


def _dumped(value: Any) -> str:
    """Return compact JSON; infinite values and NaN become null."""
    # Non-finite values are rare: copying every value to look for them would cost more than encoding
    # a second time when the encoder meets one.
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except ValueError:
        return _dumped(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
