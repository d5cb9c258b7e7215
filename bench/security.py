"""Foreign code, shadowed packages, secrets, and control characters.

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
from urllib.parse import quote, quote_plus, unquote

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


def refuse_foreign_code(node: object, packages: Iterable[str], key: str = "") -> None:
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


def package_exists(name: str) -> bool:
    """Tell whether a top-level package can be imported, without importing it."""
    try:
        return name.isidentifier() and find_spec(name) is not None
    except ValueError:  # `__main__` has no spec
        return False


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
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|APIKEY|ACCESSKEY|PWD"
    r"|(?<!BY)(?<!COM)(?<!ASK)PASS|(?:^|_)(?:KEY|PAT|AUTH|COOKIE))S?(?![A-Z])",
    re.IGNORECASE,
)
"""Words of names that hold credentials: HF_TOKEN, SSHPASS, OPENAI_API_KEY, SECRET_KEY_BASE."""
_PUBLIC_NAME = re.compile(
    r"_(?:FILE|PATH|DIR|SOCK|URL|URI|HOST|PORT|NAME|TYPE|METHOD|MODE|SIZE|LENGTH|LIMIT|COUNT)$",
    re.IGNORECASE,
)
"""Endings of names that tell about a credential and hold none: SSH_AUTH_SOCK, TOKEN_URL."""
FOLDER_VARIABLES = frozenset({"PWD", "OLDPWD"})
MIN_SECRET_LENGTH = 8
"""Characters; shorter values would redact ordinary words as well."""
MIN_RANDOM_LENGTH = 20
"""Characters from which a value can be told to be random whatever its variable is called."""
MIN_USER_TOKEN_LENGTH = 16
"""Characters from which the user of a URL is a token and no name."""
REDACTED = "[hidden]"

_TOKENS = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"hf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|wandb_v1_\w{16,}"  # W&B
    r"|sk-(?:[a-z]+[0-9]*-)*[A-Za-z0-9_]{20,}[\w-]*"  # OpenAI, Anthropic, OpenRouter
    r"|gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_\w{20,}|glpat-[\w-]{16,}"  # GitHub, GitLab
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}"  # AWS, Google
    r"|gsk_[A-Za-z0-9]{20,}|xai-[A-Za-z0-9]{20,}|nvapi-[\w-]{20,}"  # Groq, xAI, NVIDIA
    r"|r8_[A-Za-z0-9]{20,}|dop_v1_[a-f0-9]{32,}"  # Replicate, DigitalOcean
    r"|SG\.[\w-]{16,}\.[\w-]{16,}|ya29\.[\w-]{16,}"  # SendGrid, Google OAuth
    r"|xox[a-z]-[\w-]{16,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{40,}"  # Slack, npm, PyPI
    r"|(?:(?<=AccountKey=)|(?<=AccessKey=))[A-Za-z0-9+/]{20,}={0,2}"  # Azure
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"  # JSON web tokens
    r")"
)
"""Tokens that services mark by a prefix, so that they are found in public texts."""
_AFTER_SCHEME = re.compile(r"(?<=://)(?:(?!://)\S)+")
_PORT = re.compile(r"\d{1,5}$")
_NAMED_PART = re.compile(r"""(?<![\w-])([A-Za-z_][\w-]{0,60})["']?[ ]?[=:][ ]?["']?""")
_PART = re.compile(r"""[^\s"',;&{}]{1,4096}""")
_NUMBER = re.compile(r"[\d.,:+_-]+")
MIN_NUMBER_DIGITS = 10
"""Digits; shorter numbers are dates, sizes and seeds."""
_HEX = re.compile(r"(?:0x)?[0-9a-fA-F-]+")


def redact(text: str) -> str:
    """Return the text with every secret of this user, and every token and password, replaced."""
    # Longest first: a secret that contains another would otherwise leave its remainder readable.
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        if secret not in text:
            continue
        # A password that is a word or a number hides that and leaves longer ones that contain it.
        # What is as long as a generated secret is neither.
        whole = rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])"
        plain = len(secret) < MIN_RANDOM_LENGTH and (secret.isalpha() or secret.isdigit())
        text = re.sub(whole if plain else re.escape(secret), REDACTED, text)
    text = _AFTER_SCHEME.sub(_without_login, text)
    return _TOKENS.sub(REDACTED, text)


def _without_login(address: re.Match[str]) -> str:
    text = address[0]
    user, password = _login(text)
    # A login starts the address, so that its length says where the rest starts.
    rest = text[len(user) + (len(password) + 1 if password else 0) :]
    return (
        (REDACTED if _is_user_token(user) else user) + (f":{REDACTED}" if password else "") + rest
    )


def _login(address: str) -> tuple[str, str]:
    """Return the user and the password, as written, of an address without its scheme."""
    host = re.split(r"[/?#]", address, maxsplit=1)[0]
    if "@" in host:
        user, _, password = host.rpartition("@")[0].partition(":")
        return user, password
    user, colon, rest = host.partition(":")
    # A password may hold a slash: what follows the colon is then no port, and an @ comes later.
    if colon and "@" in address and rest and "[" not in user and not _PORT.match(rest):
        return user, address.rpartition("@")[0][len(user) + 1 :]
    return "", ""


def _is_user_token(user: str) -> bool:
    """Tell a token that stands as the user of a URL (Sentry, Git) from the name of a person."""
    return len(user) >= MIN_USER_TOKEN_LENGTH and (
        user.isalnum() or any(character.isdigit() for character in user)
    )


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
        values += _parts(value)
        if name in FOLDER_VARIABLES:
            continue
        if is_random(value) or _names_credential(name):
            # A key of several lines is printed line by line; `\n` stands for a line in JSON.
            lines = re.split(r"\r?\n|\\n", value)
            values += [value, *(line for line in lines if not line.startswith("-----"))]
    for value in {value.strip() for value in values}:
        if len(value) >= MIN_SECRET_LENGTH and not _is_known(value):
            yield from _spellings(value)


def _names_credential(name: str) -> bool:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).replace("-", "_")
    return CREDENTIAL_NAME.search(words) is not None and not _PUBLIC_NAME.search(words)


def _parts(value: str) -> Iterator[str]:
    """Yield the credentials inside a value: of its URLs, connection strings and JSON."""
    for address in _AFTER_SCHEME.findall(value):
        user, password = _login(address)
        if _is_user_token(user):
            yield user
        yield from (password, unquote(password))
    place = 0
    while name := _NAMED_PART.search(value, place):
        place = name.end()
        if _names_credential(name[1]) and (part := _PART.match(value, place)):
            yield part[0]
            # No part is read twice, so that the time stays linear.
            place = part.end()


def _spellings(secret: str) -> Iterator[str]:
    """Yield a secret as it is and as it stands in a URL."""
    yield secret
    for encoded in (quote(secret), quote(secret, safe=""), quote_plus(secret)):
        yield encoded
        yield re.sub(r"%[0-9A-F]{2}", lambda code: code[0].lower(), encoded)


def _is_known(value: str) -> bool:
    """Tell whether a value is public: a path, a number, or a name of the shipped configs."""
    if _NUMBER.fullmatch(value):
        return sum(map(str.isdigit, value)) < MIN_NUMBER_DIGITS
    if all(part in _shipped_names() for part in re.split(r"[./=,]", value)):
        return True
    # GOOGLE_APPLICATION_CREDENTIALS and its like hold the path of a file with the secret, which
    # need not exist yet. A base64 text may start with a slash as well.
    if re.match(r"(?:~|\.{1,2})?/[\w.-]+/", value) and not is_random(value):
        return True
    return ("/" in value or value.startswith(("~", "."))) and _exists(value)


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


@cache
def _shipped_names() -> frozenset[str]:
    """Return the groups, choices, keys and values of the shipped configs, and the schema's keys."""
    # A password such as `slimbench` or `benchmark` would otherwise hide the project in every
    # message and refuse every run.
    names = {"slimbench"}
    for file in CONFIG_DIR.rglob("*.yaml"):
        names |= {file.stem, file.parent.name}
        lines = file.read_text(encoding="utf-8").splitlines()
        names.update(*(re.findall(r"\w+", line.partition("#")[0]) for line in lines))
    schema = (INSTALLATION / "bench" / "schema.py").read_text(encoding="utf-8")
    names.update(re.findall(r"^    (\w+):", schema, re.MULTILINE), re.findall(r'"(\w+)"', schema))
    return frozenset(names)


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


# A terminal executes control characters: ESC starts sequences that move the cursor, change the
# window title or hide text. The bidirectional marks reorder what is read ("Trojan Source"), and
# lone surrogates cannot be encoded.
_REMOVED = dict.fromkeys(
    code
    for first, last in (
        (0x00, 0x08),
        (0x0B, 0x1F),
        (0x7F, 0x9F),
        (0x202A, 0x202E),
        (0x2066, 0x2069),
    )
    for code in range(first, last + 1)
)
_REPLACED = dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}")
_UNSAFE = {**_REMOVED, **_REPLACED}


def clean(text: str) -> str:
    """Return the text without control characters; tabs and line breaks stay."""
    return text.translate(_UNSAFE)
