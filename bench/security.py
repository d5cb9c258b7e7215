"""Foreign code, shadowed packages, and secrets.

Every text that leaves the program passes `redact`, and what would be stored is refused if it holds
a secret. Secrets are known by where they are kept (variables that are named like credentials, the
Hugging Face token file, `~/.netrc`, where W&B stores its key) and by their form: tokens of
services, passwords in URLs, and values of variables that only a random generator writes.
"""

from __future__ import annotations

import itertools
import netrc
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

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


CREDENTIAL_NAME = re.compile(
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|APIKEY|ACCESSKEY"
    r"|(?:^|_)(?:KEY|PASS|PWD|PAT|AUTH|COOKIE))S?$",
    re.IGNORECASE,
)
"""Names of variables that hold credentials: HF_TOKEN, MYSQL_PWD, GITHUB_PAT, OPENAI_API_KEY."""
FOLDER_VARIABLES = frozenset({"PWD", "OLDPWD"})
MIN_SECRET_LENGTH = 8
"""Characters; shorter values would redact ordinary words as well."""
MIN_RANDOM_LENGTH = 20
"""Characters from which a value can be told to be random whatever its variable is called."""
REDACTED = "[hidden]"

_TOKENS = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"hf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|wandb_v1_\w{16,}"  # W&B
    r"|sk-(?:[a-z]+[0-9]*-)*[A-Za-z0-9_]{20,}[\w-]*"  # OpenAI, Anthropic, OpenRouter
    r"|gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_\w{20,}|glpat-[\w-]{16,}"  # GitHub, GitLab
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}"  # AWS, Google
    r"|xox[a-z]-[\w-]{16,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{40,}"  # Slack, npm, PyPI
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"  # JSON web tokens
    r")"
)
"""Tokens that services mark by a prefix, so that they are found in public texts."""
_URL_PASSWORD = re.compile(r"(?<=://)([^\s:@/]*):([^\s@/]+)(?=@)")
_HEX = re.compile(r"(?:0x)?[0-9a-fA-F-]+")


def redact(text: str) -> str:
    """Return the text with every secret of this user, and every token and password, replaced."""
    # Longest first: a secret that contains another would otherwise leave its remainder readable.
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        if secret not in text:
            continue
        # A password that is a word hides the word and leaves longer ones that contain it.
        whole = rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])"
        text = re.sub(whole if secret.isalpha() else re.escape(secret), REDACTED, text)
    text = _URL_PASSWORD.sub(rf"\1:{REDACTED}", text)
    return _TOKENS.sub(REDACTED, text)


def refuse_secret(text: str, key: str) -> None:
    """Raise if a text that would be stored holds a secret.

    Raises:
        UserError: names the key, and not the secret.
    """
    if redact(text) != text:
        raise UserError(
            f"{key} contains one of your passwords or tokens; records would store it: leave it in "
            "its environment variable, or unset a variable that is no secret"
        )


def _secrets() -> Iterator[str]:
    # Read on every call, since a token may be set or a file written during the process.
    values = [_hub_token(), *_netrc_passwords()]
    for name, value in os.environ.items():
        values += [unquote(password) for _, password in _URL_PASSWORD.findall(value)]
        values += [password for _, password in _URL_PASSWORD.findall(value)]
        if name in FOLDER_VARIABLES:
            continue
        if is_random(value) or (CREDENTIAL_NAME.search(name) and not _is_known(value)):
            values.append(value)
    for value in values:
        if len(value.strip()) >= MIN_SECRET_LENGTH:
            yield value.strip()


def _is_known(value: str) -> bool:
    """Tell whether a value is public: a file or folder, or a name of the shipped configs."""
    # GOOGLE_APPLICATION_CREDENTIALS and its like hold the path of a file with the secret.
    text = value.strip()
    looks_like_path = "/" in text or text.startswith(("~", "."))
    return text in _shipped_names() or (looks_like_path and _exists(text))


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


@cache
def _shipped_names() -> frozenset[str]:
    # A password such as `slimbench` would otherwise hide the project in every message and refuse
    # every run.
    return frozenset({"slimbench", *(file.stem for file in CONFIG_DIR.rglob("*.yaml"))})


def is_random(value: str) -> bool:
    """Tell whether a value has the form of a generated secret.

    Such a value is long, has letters of both cases and digits, and changes between them all the
    time, which names in camel case do not. Hexadecimal digits alone are commits, hashes and ids.
    """
    text = value.strip()
    if len(text) < MIN_RANDOM_LENGTH or not re.fullmatch(r"[A-Za-z0-9+/=_.~-]+", text):
        return False
    if _HEX.fullmatch(text) or _exists(text):
        return False
    # Names are made of short words with signs between them.
    if max(map(len, re.split(r"[^A-Za-z0-9]", text))) < MIN_RANDOM_LENGTH // 2:
        return False
    kinds = ["d" if c.isdigit() else "u" if c.isupper() else "l" for c in text if c.isalnum()]
    changes = sum(one != other for one, other in itertools.pairwise(kinds))
    return len(set(kinds)) == 3 and changes > 0.4 * len(kinds)


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
