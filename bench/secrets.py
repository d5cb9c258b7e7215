"""Passwords never reach a file or a terminal: every text that leaves the program passes `hide`.

What is a secret is known by where it is kept: environment variables that are named like one, the
Hugging Face hub's token file, and the passwords of `~/.netrc`, where W&B keeps its key.
"""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Iterator
from pathlib import Path

NAMED_SO = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?$", re.IGNORECASE)
SHORTEST = 8
"""Characters; what is shorter would hide ordinary words as well."""
HIDDEN = "[hidden]"


def hide(text: str) -> str:
    """Return the text with every secret of this user replaced."""
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def _secrets() -> Iterator[str]:
    values = [value for name, value in os.environ.items() if NAMED_SO.search(name)]
    values += [_hub_token(), *_netrc_passwords()]
    for value in values:
        if len(value.strip()) >= SHORTEST:
            yield value.strip()


def _hub_token() -> str:
    """Return the token that `hf auth login` has stored, or an empty text."""
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
