"""Entry point of the command line; each command imports what it needs when it is called.

Exit codes: 0 done; 1 some runs failed; 2 the user's input is wrong; 75 interrupted, run the same
command again to resume.
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import pkgutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from io import TextIOWrapper
from pathlib import Path
from types import FrameType

from bench.cli.parser import (
    COMMANDS,
    RAW_COMMANDS,
    RESULTS_DIR_FLAG,
    TRACEBACK_FLAG,
    build_parser,
    results_dir_as_override,
)
from bench.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
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
"""Allocations between two garbage collections. Importing creates millions of objects that stay;
with the default threshold of 700, GC takes a fifth of start-up."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _open_missing_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Of every command, and of no argparse parser: `run` and `table` read their words themselves.
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
    """Give a process that was started without standard streams (`>&-`) the null device instead.

    The next file that is opened would otherwise get the number of the closed stream, and what a
    library writes to stderr would end up in a record.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115  # open to the end


def _run_command(given: list[str]) -> int:
    # argparse would reject Hydra's flags such as -m and --cfg, so commands that take overrides
    # bypass it and read their arguments themselves. argparse only answers --help for them.
    if given and given[0] in RAW_COMMANDS and not {"-h", "--help"} & set(given):
        raw_handler: Callable[[list[str]], int] = pkgutil.resolve_name(RAW_COMMANDS[given[0]])
        words = given[1:]
        # Hydra takes overrides only.
        if any(word.startswith(RESULTS_DIR_FLAG) for word in words):
            words = results_dir_as_override(words)
        return raw_handler(words)
    # argparse would list all commands instead of naming the nearest one.
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:
        raise unknown_name("command", given[0], COMMANDS)
    parsed = build_parser().parse_args(given)
    # `ls` takes a results folder for one of its lists only.
    if getattr(parsed, "what", "runs") == "runs" and "results_dir" in parsed:
        _refuse_absent_folder(parsed.results_dir)
    return int(pkgutil.resolve_name(parsed.handler)(parsed))


@contextmanager
def _tracebacks_shown() -> Iterator[None]:
    """Print the traceback of any error inside the block, before its sentence."""
    import traceback

    try:
        yield
    except Exception as error:
        print(redact("".join(traceback.format_exception(error))), file=sys.stderr, end="")
        raise


def _refuse_unreadable_bytes(given: Sequence[str]) -> None:
    """Raise if an argument has bytes that the locale's encoding cannot read, as in the C locale."""
    for argument in given:
        # Python hides such bytes as lone surrogates, which no record and no message can hold.
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            shown = argument.encode("ascii", "replace").decode()
            raise UserError(
                f"{shown}: not readable as {sys.getfilesystemencoding()}: set PYTHONUTF8=1, or a "
                "locale such as LC_ALL=C.UTF-8"
            )


def _refuse_absent_folder(results_dir: Path) -> None:
    """Raise if there is no results folder, where an empty answer would hide a misspelt path."""
    if not results_dir.is_dir():
        fault = "is not a folder" if results_dir.exists() else "no such folder"
        raise UserError(
            f"results_dir={results_dir}: {fault}, so there are no records: name the folder that "
            "`bench run` wrote"
        )


@contextmanager
def _process_settings() -> Iterator[None]:
    """Set up the process for a command and restore its settings afterwards.

    `main` may be called in a process that goes on, such as a notebook or a test.
    """
    threshold = gc.get_threshold()
    frozen = gc.get_freeze_count()
    gc.set_threshold(_GC_THRESHOLD)
    _skip_collections_at_exit()
    # Python delivers signals to the main thread only, and refuses handlers set in other threads.
    in_main_thread = threading.current_thread() is threading.main_thread()
    interruptible = _interrupts_raised() if in_main_thread else nullcontext()
    # In a C locale a table with an accented name would otherwise end in an encoding error.
    stream, errors = sys.stdout, getattr(sys.stdout, "errors", None)
    if isinstance(stream, TextIOWrapper) and errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="replace")
    try:
        with interruptible:
            yield
    finally:
        if isinstance(stream, TextIOWrapper) and errors is not None:
            stream.reconfigure(errors=errors)
        # All that was allocated becomes old without being looked at: with the threshold back, the
        # next allocation would start a collection of a million young objects. What a caller froze
        # would be thawed with it.
        if not frozen:
            gc.freeze()
            gc.unfreeze()
        gc.set_threshold(*threshold)


def _skip_collections_at_exit() -> None:
    """Let the interpreter end without collecting what the operating system frees anyway.

    It looks at every object several times, which takes two seconds after torch and transformers
    were imported. Files and folders that objects own are closed by exit handlers of their own.
    """
    # Once, however often `main` is called. Handlers run last in, first out: this one comes last.
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


_REPEATED_AFTER = 0.05
"""Seconds; long enough for the destructor that lost an interrupt to have ended."""
_MOST_REPEATS = 100
"""Times that an import puts an interrupt off: 5 seconds, of the 30 that Slurm leaves."""


@contextmanager
def _interrupts_raised() -> Iterator[None]:
    """Raise signals as interrupts inside the block, where nothing swallows them.

    What is raised in `__del__` or in a callback of a weak reference is printed and forgotten.
    Within an import, libraries take it for a package that is broken or missing, and one in C ends
    the process. A scheduler sends its signal only once: the run would work on until it is killed,
    or blame its config. Such a signal is raised again a moment later.
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

    # Schedulers send one of these before they kill a job: raised as an interrupt, they leave time
    # to save what a later run resumes from. A Ctrl-C that the caller ignores or handles stays so.
    numbers = [signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    handlers = {number: signal.signal(number, interrupt) for number in numbers}
    sys.unraisablehook = repeat
    try:
        yield
    except Exception:
        # A library has made an error of its own of the interrupt.
        if raised:
            raise KeyboardInterrupt from None
        raise
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()
        for number, handler in handlers.items():
            # None: the handler was not installed from Python and cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _is_importing(frame: FrameType | None) -> bool:
    """Tell whether a module is being imported on behalf of a command."""
    # A program may call `main` while it is imported itself.
    while frame is not None and frame.f_code is not main.__code__:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _report_exit(error: SystemExit) -> int:
    """Return the exit code for a library that ended the program."""
    # argparse and Hydra exit like this after --help, and after a usage error that they printed.
    if error.code in (0, None):
        return EXIT_DONE
    if error.code == EXIT_WRONG_INPUT:
        return EXIT_WRONG_INPUT
    reason = redact(exit_reason(error))
    print(f"bench: failed: a library ended the program: {reason}", file=sys.stderr)
    return EXIT_FAILED


def _report_unexpected(error: BaseException) -> int:
    """Report an unexpected error and return the exit code."""
    # A run turns a full disk into `Stopped` itself; this one met a sweep's plan or status files.
    if isinstance(error, OSError) and error.errno in UNWRITABLE_ERRNOS:
        cause = f"{error.filename or 'the disk'}: {error.strerror}; free some space"
        fail(f"{cause} and run the same command to resume")
        return EXIT_INTERRUPTED
    # A path that no system takes, in whatever option it was given.
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        fail(f"{str(error.filename)[:60]}...: {error.strerror}")
        return EXIT_WRONG_INPUT
    fail(f"failed: {_save_traceback(error)}")
    if isinstance(error, MemoryError):
        fail("use less memory: a lower benchmark.batch_size, or a smaller model or calibration")
    return EXIT_FAILED


def _save_traceback(error: BaseException) -> str:
    """Write the traceback to a file, secrets redacted, and return a one-sentence error."""
    import tempfile
    import traceback

    text = redact("".join(traceback.format_exception(error)))
    try:
        # Not below results/: the error may be that nothing can be written there.
        with tempfile.NamedTemporaryFile("w", prefix="bench-", suffix=".log", delete=False) as file:
            file.write(text)
    except OSError:  # a read-only container has no folder for it
        print(text, file=sys.stderr)
        return redact(error_sentence(error))
    return redact(f"{error_sentence(error)} (details: {file.name})")
