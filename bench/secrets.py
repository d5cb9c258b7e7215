"""Redaction of secrets: every text that leaves the program passes `hide`.

Secrets are known by where they are kept: environment variables with such a name, the Hugging Face
token file, and the passwords of `~/.netrc`, where W&B stores its key.
"""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Iterator
from pathlib import Path

NAMED_SO = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?$", re.IGNORECASE)
SHORTEST = 8
"""Characters; shorter values would redact ordinary words as well."""
HIDDEN = "[hidden]"


def hide(text: str) -> str:
    """Return the text with every secret of this user replaced."""
    # Longest first: a secret that contains another would otherwise leave its remainder readable.
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def _secrets() -> Iterator[str]:
    # Read on every call, since a token may be set or a file written during the process.
    values = [value for name, value in os.environ.items() if NAMED_SO.search(name)]
    values += [_hub_token(), *_netrc_passwords()]
    for value in values:
        if len(value.strip()) >= SHORTEST:
            yield value.strip()


def _hub_token() -> str:
    """Return the token that `hf auth login` stored, or an empty string."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    file = Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _netrc_passwords() -> list[str]:
    try:
        known = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc")
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return []
    return [password for _, _, password in known.hosts.values() if password]
