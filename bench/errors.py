"""Errors for users, exit codes of commands, and optional libraries with their pip command."""

from __future__ import annotations

import difflib
import errno
import importlib
import inspect
import logging
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import ModuleType

# 75 is EX_TEMPFAIL of sysexits.h, which schedulers and scripts understand as "retry later".
EXIT_DONE, EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 75
EXIT_OUTPUT_CLOSED = 141
"""128 + SIGPIPE: the code that a shell reports for other programs whose reader has gone."""
FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
UNWRITABLE_ERRNOS = (*FULL_DISK_ERRNOS, errno.EFBIG, errno.EROFS)
"""Error numbers of a disk that accepts no more data; after freeing space a run can resume."""


class UserError(Exception):
    """The user's input is wrong; the message is one sentence with key, value and cure."""


class MissingData(UserError):
    """Data or weights that a run needs cannot be reached; the message names all of them.

    `items` lists them separately if there are several.
    """

    def __init__(self, message: str, items: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.items = tuple(items)


def error_sentence(error: BaseException) -> str:
    """Return an error's type, the first line of its message, and its notes."""
    message = (str(error) or "no message").splitlines()[0]
    return ", ".join([f"{type(error).__name__}: {message}", *getattr(error, "__notes__", ())])


def source_line(error: BaseException, *packages: str) -> str | None:
    """Return `FILE:LINE` of the innermost frame of some packages in a traceback, or None.

    For a module that cannot be parsed, which has no frame, the line is that of the error.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).partition(".")[0] in packages:
            found = f"{frame.f_code.co_filename}:{line}"
    return found


def class_line(kind: type) -> str:
    """Return the name of a class, with `FILE:LINE` of its definition if it is in a file."""
    try:
        return f"{kind.__name__} ({inspect.getsourcefile(kind)}:{inspect.getsourcelines(kind)[1]})"
    except (OSError, TypeError):
        return kind.__name__


def nearest(word: str, options: Iterable[str]) -> str | None:
    """Return the option most similar to `word`, or None if nothing is close."""
    matches = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown_name(kind: str, word: str, options: Iterable[str]) -> UserError:
    """Build the error for a name that does not exist, with a suggestion and all allowed names."""
    allowed = sorted(options)
    close = nearest(word, allowed)
    hint = f"did you mean {close!r}? " if close else ""
    # Names of a table's rows may hold commas themselves.
    listed = ", ".join(repr(name) if "," in name else name for name in allowed)
    return UserError(f"unknown {kind} {word!r}: {hint}allowed: {listed or 'none'}")


def refuse_bare_text(argument: str, value: object, example: str) -> None:
    """Raise if a string was given instead of a list of strings; `example` is a correct call."""
    if isinstance(value, str) or not all(isinstance(each, str) for each in _iterable(value)):
        raise UserError(f"{argument}={value!r} is not a list of strings: write {example}")


def _iterable(value: object) -> Iterable[object]:
    return value if isinstance(value, Iterable) else (value,)


def refuse_unclear_folder(folder: object) -> object:
    """Validate the name of an output folder, and return it.

    Raises:
        ValueError: it is empty, or begins with a `~` that the shell has not expanded.
    """
    if folder == "":
        raise ValueError(
            "the path is empty, perhaps from an unset shell variable: name a folder, or . for the "
            "current one"
        )
    # Hydra creates the folder from the text, and libraries treat `~` differently.
    if isinstance(folder, str) and folder.startswith("~"):
        raise ValueError(
            "the shell has not expanded the ~: write the path in full, or $HOME without quotes"
        )
    return folder


class Stopped(BaseException):
    """A run was stopped from outside, for example by a full disk; the same command resumes it.

    It derives from BaseException, like KeyboardInterrupt, so that jobs of a sweep do not record it
    as their failure.
    """


class RunsFailed(Exception):
    """All runs of a sweep failed; `reasons` holds one sentence each."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


class LibraryFailure(Exception):
    """A library exited the program or panicked instead of raising an exception."""


def is_panic(error: BaseException) -> bool:
    """Return whether an error is a panic of a Rust library, such as tokenizers.

    Its class derives from BaseException and cannot be imported, because every library has its own.
    """
    return type(error).__module__ == "pyo3_runtime"


REQUEUED = Event()
"""Set before a job queue ends this process with `sys.exit` in order to run its job again."""


@contextmanager
def library_failures_as_errors(subject: str) -> Iterator[None]:
    """Convert `sys.exit` and panics of libraries into errors, which fail a run but not a sweep.

    `subject` is the start of the message and says what the library was doing.

    Raises:
        LibraryFailure: a library exited the program or panicked inside the `with` block.
    """
    try:
        yield
    except SystemExit as error:
        if REQUEUED.is_set():
            raise
        raise LibraryFailure(f"{subject} ended the program: {exit_reason(error)}") from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise LibraryFailure(f"{subject} panicked: {error_sentence(error)}") from error


TOLD_ERRORS = (OSError, ValueError, ImportError)
"""Exceptions of transformers with messages for users; those of other types need the type."""


@contextmanager
def one_sentence_errors(place: Path) -> Iterator[None]:
    """Convert exceptions of transformers into one sentence, and suppress its warnings."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    # Verbosity and progress bars are global state of transformers, which belongs to the caller.
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # Intended: the settings of `Quantization` replace those of the checkpoint's config.
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            yield
    except UserError:
        raise
    except BaseException as error:
        # With untrusted files transformers may raise anything, and tokenizers may panic.
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = next((line for line in str(error).splitlines() if line), "no message")
        if not isinstance(error, TOLD_ERRORS):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"{place} cannot be loaded: {reason}") from error
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def exit_reason(error: SystemExit) -> str:
    """Return the message of a `sys.exit`, or `exit code N`."""
    text = str(error.code).strip()
    return text.splitlines()[0] if isinstance(error.code, str) and text else f"exit code {text}"


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
