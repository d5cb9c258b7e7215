"""Foreign code, shadowed packages, and redaction of secrets.

Every text that leaves the program passes `redact`. Secrets are known by where they are kept:
environment variables with such a name, the Hugging Face token file, and the passwords of
`~/.netrc`, where W&B stores its key.
"""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.errors import UserError

# Counted from this file and never imported by name: `conf`, `methods` and `results` are common
# names, and a folder of the user's that comes first on sys.path would be taken for ours.
INSTALLATION = Path(__file__).absolute().parents[1]
CONFIG_DIR = INSTALLATION / "conf"
PUBLISHED_DIR = INSTALLATION / "results" / "published"
IMPORTED_BY_NAME = ("methods", "hydra_plugins")
"""Packages of slimbench that are found through sys.path: configs and Hydra name them."""

# Hydra's own key, and the two keys of Python's logging configuration that name code.
CODE_KEYS = frozenset({"_target_", "()", "class"})
HYDRA_PACKAGES = ("hydra", "hydra_plugins", "logging")


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
        if name in CODE_KEYS and isinstance(inner, str) and inner.partition(".")[0] not in allowed:
            raise UserError(
                f"{here}={inner}: only code from {', '.join(allowed)} may run; "
                "add the package to packages=[...] if you trust it"
            )
        refuse_foreign_code(inner, allowed, here)


def refuse_shadowed_packages() -> None:
    """Raise if a module of the user's hides a package of slimbench.

    Raises:
        UserError: names the module's file and the package.
    """
    for name in IMPORTED_BY_NAME:
        spec = find_spec(name)
        places = list(spec.submodule_search_locations or []) if spec else []
        # A namespace package (`hydra_plugins`) has several folders; a regular one has only one.
        if any(Path(place).absolute() == INSTALLATION / name for place in places):
            continue
        found = (spec.origin if spec else None) or (places[0] if places else "nothing")
        raise UserError(
            f"{found} shadows slimbench's package {name!r}: rename it, or start in another folder"
        )


SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?$", re.IGNORECASE)
MIN_SECRET_LENGTH = 8
"""Characters; shorter values would redact ordinary words as well."""
REDACTED = "[hidden]"


def redact(text: str) -> str:
    """Return the text with every secret of this user replaced."""
    # Longest first: a secret that contains another would otherwise leave its remainder readable.
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    return text


def _secrets() -> Iterator[str]:
    # Read on every call, since a token may be set or a file written during the process.
    values = [value for name, value in os.environ.items() if SECRET_NAME.search(name)]
    values += [_hub_token(), *_netrc_passwords()]
    for value in values:
        if len(value.strip()) >= MIN_SECRET_LENGTH:
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
