"""Errors for users, exit codes of commands, and optional libraries with their pip command."""

from __future__ import annotations

import difflib
import errno
import importlib
from collections.abc import Iterable
from types import ModuleType

# 75 is EX_TEMPFAIL of sysexits.h, which schedulers and scripts understand as "retry later".
EXIT_DONE, EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 75
UNWRITABLE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Error numbers of a disk that accepts no more data; after freeing space a run can resume."""


class UserError(Exception):
    """The user's input is wrong; the message is one sentence with key, value and cure."""


class MissingData(UserError):
    """Data or weights that a run needs cannot be reached; the message names all of them.

    `items` names them one by one if there are several.
    """

    def __init__(self, message: str, items: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.items = tuple(items)


def error_sentence(error: BaseException) -> str:
    """Return an error's type, the first line of its message, and its notes."""
    message = (str(error) or "no message").splitlines()[0]
    return ", ".join([f"{type(error).__name__}: {message}", *getattr(error, "__notes__", ())])


def nearest(word: str, options: Iterable[str]) -> str | None:
    """Return the option most similar to `word`, or None if nothing is close."""
    matches = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown_name(kind: str, word: str, options: Iterable[str]) -> UserError:
    """Build the error for a name that does not exist, with a suggestion and all allowed names."""
    allowed = sorted(options)
    close = nearest(word, allowed)
    hint = f"did you mean {close!r}? " if close else ""
    return UserError(f"unknown {kind} {word!r}: {hint}allowed: {', '.join(allowed) or 'none'}")


class Stopped(BaseException):
    """Something outside a run stopped it, such as a full disk; the same command resumes it.

    It derives from BaseException, as KeyboardInterrupt does, so that no job of a sweep records it
    as a failure of its own.
    """


class RunsFailed(Exception):
    """All runs of a sweep failed; `reasons` holds one sentence each."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


def optional_module(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Raises:
        UserError: it is not installed; the message gives the pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed: pip install 'slimbench[{extra}]'"
        ) from None
