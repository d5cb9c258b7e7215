"""Entry point of the command line; commands import their dependencies only when they are called.

Exit codes: 0 done; 1 some runs failed; 2 the user's input is wrong; 75 interrupted, run the same
command again to resume; 141 the reader of the output has gone, as `head` does.
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import pkgutil
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from io import TextIOWrapper
from pathlib import Path
from types import FrameType

from bench.cli.arguments import RESULTS_DIR_FLAG, results_dir_as_override
from bench.cli.parser import (
    COMMANDS,
    RAW_COMMANDS,
    TRACEBACK_FLAG,
    build_parser,
)
from bench.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OUTPUT_CLOSED,
    EXIT_WRONG_INPUT,
    UNWRITABLE_ERRNOS,
    RunsFailed,
    Stopped,
    UserError,
    error_sentence,
    exit_reason,
    is_panic,
    unknown_name,
)
from bench.security import redact
from bench.ui import fail

_GC_THRESHOLD = 100_000
"""Allocations between two garbage collections. Imports create millions of permanent objects; with
the default threshold of 700, garbage collection takes a fifth of the start-up time."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _open_missing_streams()
    code = _exit_code(list(sys.argv[1:] if arguments is None else arguments))
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter would try again when it exits, complain, and end with its own code.
        _discard_output()
        code = code or _report_unexpected(error)
    return code


def _exit_code(given: list[str]) -> int:
    """Run one command, report its error if there is one, and return the exit code."""
    # Handled here for every command, because `run` and `table` do not use argparse.
    whole = TRACEBACK_FLAG in given
    try:
        with _process_settings(), _tracebacks_shown() if whole else nullcontext():
            _refuse_unreadable_bytes(given)
            return _run_command([word for word in given if word != TRACEBACK_FLAG])
    except UserError as error:
        fail(str(error))
        return EXIT_WRONG_INPUT
    except RunsFailed as error:
        for reason in error.reasons:
            fail(f"failed: {reason}")
        return EXIT_FAILED
    except Stopped as error:
        fail(str(error))
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        fail("interrupted; run the same command to resume")
        return EXIT_INTERRUPTED
    except SystemExit as error:
        return _report_exit(error)
    except Exception as error:
        return _report_unexpected(error)
    except BaseException as error:
        if not is_panic(error):
            raise
        return _report_unexpected(error)


def _open_missing_streams() -> None:
    """Open the null device for standard streams that are closed (`>&-`).

    Otherwise the next opened file would get the number of the closed stream, and output of a
    library to stderr could end up in a record.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115  # open to the end


def _run_command(given: list[str]) -> int:
    # argparse would reject Hydra's flags such as -m and --cfg, so commands with overrides read
    # their arguments themselves and use argparse only for --help.
    if given and given[0] in RAW_COMMANDS and not {"-h", "--help"} & set(given):
        raw_handler: Callable[[list[str]], int] = pkgutil.resolve_name(RAW_COMMANDS[given[0]])
        words = given[1:]
        # Hydra accepts only overrides.
        if any(word.startswith(RESULTS_DIR_FLAG) for word in words):
            words = results_dir_as_override(words)
        return raw_handler(words)
    # argparse would list all commands instead of suggesting the nearest one.
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:
        raise unknown_name("command", given[0], COMMANDS)
    parsed = build_parser().parse_args(given)
    # `ls` needs a results folder only for its list of runs.
    if getattr(parsed, "what", "runs") == "runs" and "results_dir" in parsed:
        _refuse_absent_folder(parsed.results_dir)
    return int(pkgutil.resolve_name(parsed.handler)(parsed))


@contextmanager
def _tracebacks_shown() -> Iterator[None]:
    """Print the traceback of any error in the `with` block, before its one-sentence message."""
    import traceback

    try:
        yield
    except Exception as error:
        print(redact("".join(traceback.format_exception(error))), file=sys.stderr, end="")
        raise


def _refuse_unreadable_bytes(given: Sequence[str]) -> None:
    """Raise if an argument has bytes that the locale's encoding cannot decode."""
    for argument in given:
        # Python decodes such bytes as lone surrogates, which cannot be written anywhere.
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            shown = argument.encode("ascii", "replace").decode()
            raise UserError(
                f"{shown}: not readable as {sys.getfilesystemencoding()}: set PYTHONUTF8=1, or a "
                "locale such as LC_ALL=C.UTF-8"
            )


def _refuse_absent_folder(results_dir: Path) -> None:
    """Raise if the results folder does not exist, because an empty list would hide a typo."""
    if not results_dir.is_dir():
        fault = "is not a folder" if results_dir.exists() else "no such folder"
        raise UserError(
            f"results_dir={results_dir}: {fault}, so there are no records: name a folder written "
            "by `bench run`"
        )


@contextmanager
def _process_settings() -> Iterator[None]:
    """Set up the process for a command, and restore its settings afterwards.

    `main` may be called in a long-lived process, such as a notebook or a test.
    """
    threshold = gc.get_threshold()
    frozen = gc.get_freeze_count()
    gc.set_threshold(_GC_THRESHOLD)
    _skip_collections_at_exit()
    # Python delivers signals to the main thread only, and refuses handlers set in other threads.
    in_main_thread = threading.current_thread() is threading.main_thread()
    interruptible = _interrupts_raised() if in_main_thread else nullcontext()
    # In a C locale, a table with an accented name would otherwise cause an encoding error.
    stream, errors = sys.stdout, getattr(sys.stdout, "errors", None)
    if isinstance(stream, TextIOWrapper) and errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="replace")
    try:
        with interruptible:
            yield
    finally:
        if isinstance(stream, TextIOWrapper) and errors is not None:
            stream.reconfigure(errors=errors)
        # Moves all objects into the old generation. Otherwise the next allocation, with the
        # restored threshold, would start a collection of a million objects. Skipped if the caller
        # has frozen objects, which would be unfrozen.
        if not frozen:
            gc.freeze()
            gc.unfreeze()
        gc.set_threshold(*threshold)


def _skip_collections_at_exit() -> None:
    """Skip the garbage collections of the interpreter's exit.

    They take two seconds once torch and transformers are imported. Files and temporary folders have
    their own exit handlers.
    """
    # Registered once, however often `main` is called.
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


_REPEATED_AFTER = 0.05
"""Seconds after which a lost interrupt is raised again, when the destructor has ended."""
_MOST_REPEATS = 100
"""Maximum number of times that an import delays an interrupt: 5 of the 30 seconds of Slurm."""


@contextmanager
def _interrupts_raised() -> Iterator[None]:
    """Raise signals as KeyboardInterrupt in the `with` block, and repeat those that are lost.

    Python ignores exceptions in `__del__` and in callbacks of weak references. During an import,
    libraries may treat an interrupt as a missing package or even end the process. Schedulers send a
    signal only once, so the run would continue until it is killed. Such an interrupt is therefore
    raised again shortly after.
    """
    before, timers, raised = sys.unraisablehook, list[threading.Timer](), list[int]()

    def raise_later() -> None:
        # A signal of the system also ends a wait of the main thread.
        main_thread = threading.main_thread().ident
        timer = threading.Timer(_REPEATED_AFTER, signal.pthread_kill, [main_thread, signal.SIGTERM])
        timer.daemon = True
        timers.append(timer)
        timer.start()

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if _is_importing(frame) and len(timers) < _MOST_REPEATS:
            raise_later()
        else:
            raised.append(signum)
            raise KeyboardInterrupt

    def repeat(lost: sys.UnraisableHookArgs) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            raise_later()
        else:
            before(lost)

    handlers = {number: signal.signal(number, interrupt) for number in _interrupting_signals()}
    sys.unraisablehook = repeat
    try:
        yield
    except Exception:
        # A library has converted the interrupt to another error.
        if raised:
            raise KeyboardInterrupt from None
        raise
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()
        for number, handler in handlers.items():
            # None means that the handler was not installed from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _interrupting_signals() -> Iterator[int]:
    """Yield the signals that end a command but leave it time to save what it resumes from."""
    # Schedulers send one of these two before they kill a job.
    yield from (signal.SIGTERM, signal.SIGUSR1)
    # A SIGINT that the caller ignores or handles is left to it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        yield signal.SIGINT


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether a module is being imported by a command."""
    # Frames outside `main` do not count, because a program may call it while being imported.
    while frame is not None and frame.f_code is not main.__code__:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _report_exit(error: SystemExit) -> int:
    """Return the exit code after a library has exited the program."""
    # argparse and Hydra exit like this after --help, or after they have printed a usage error.
    if error.code in (0, None):
        return EXIT_DONE
    if error.code == EXIT_WRONG_INPUT:
        return EXIT_WRONG_INPUT
    reason = redact(exit_reason(error))
    print(f"bench: failed: a library ended the program: {reason}", file=sys.stderr)
    return EXIT_FAILED


def _report_unexpected(error: BaseException) -> int:
    """Report an unexpected error and return the exit code."""
    lost = isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EIO)
    if lost and _is_output_closed():
        # Whoever ends a pipe with `head` has read enough, so there is nothing to tell.
        return EXIT_OUTPUT_CLOSED
    # A run converts a full disk into `Stopped`; here it happened with files of a sweep.
    if isinstance(error, OSError) and error.errno in UNWRITABLE_ERRNOS:
        cause = f"{error.filename or 'the disk'}: {error.strerror}; free some space"
        fail(f"{cause} and run the same command to resume")
        return EXIT_INTERRUPTED
    if isinstance(error, OSError) and error.filename and error.errno in _PATH_ERRNOS:
        fail(f"{_shortened(str(error.filename))}: {error.strerror}")
        return EXIT_WRONG_INPUT
    fail(f"failed: {_save_traceback(error)}")
    if isinstance(error, MemoryError):
        fail("use less memory: a lower benchmark.batch_size, or a smaller model or calibration")
    return EXIT_FAILED


_PATH_ERRNOS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)
"""Error numbers of an invalid path in some option, or of one that this user may not use."""


def _shortened(path: str) -> str:
    return path if len(path) <= _MAX_PATH else f"{path[:60]}..."


_MAX_PATH = 200


def _is_output_closed() -> bool:
    """Return whether stdout is a pipe whose reader has gone, or a terminal that was closed."""
    # Asked, because the pipe of a worker or a server may break as well, which is a failure.
    with suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def _discard_output() -> None:
    """Let what is still to be written to stdout go to the null device."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _save_traceback(error: BaseException) -> str:
    """Write the traceback, without secrets, to a file; return a one-sentence error."""
    import tempfile
    import traceback

    text = redact("".join(traceback.format_exception(error)))
    try:
        # Not in the results folder, which may not be writable.
        with tempfile.NamedTemporaryFile("w", prefix="bench-", suffix=".log", delete=False) as file:
            file.write(text)
    except OSError:  # For example in a read-only container.
        print(text, file=sys.stderr)
        return redact(error_sentence(error))
    return redact(f"{error_sentence(error)} (details: {file.name})")
