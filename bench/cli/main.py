"""Entry point of the command line; each command imports what it needs when it is called.

Exit codes: 0 done; 1 some runs failed; 2 the user's input is wrong; 75 interrupted, run the same
command again to resume.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from bench.cli.commands import run, table
from bench.cli.parser import COMMANDS, build_parser
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
    unknown_name,
)
from bench.security import redact

_GC_THRESHOLD = 100_000
"""Allocations between two garbage collections. Importing creates millions of objects that stay;
with the default threshold of 700, GC takes a fifth of start-up."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # Affects the whole process, also when `main` is called as a library (tests do); so do the
    # signal handlers below.
    gc.set_threshold(_GC_THRESHOLD)
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Schedulers send one of these before they kill a job: raised as an interrupt, they leave time
    # to save what a later run resumes from.
    for asked in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(asked, _interrupt)
    try:
        # argparse would reject Hydra's flags such as -m and --cfg, so `run` and `table` bypass it
        # and read their arguments themselves. argparse only answers --help for them.
        if given[:1] == ["run"] and not {"-h", "--help"} & set(given):
            return run.run_command(given[1:])
        if given[:1] == ["table"] and not {"-h", "--help"} & set(given):
            return table.run_command(given[1:])
        # argparse would list all commands instead of naming the nearest one.
        if given and not given[0].startswith("-") and given[0] not in COMMANDS:
            raise unknown_name("command", given[0], COMMANDS)
        parsed = build_parser().parse_args(given)
        handler: Callable[[argparse.Namespace], int] = parsed.handler
        return handler(parsed)
    except UserError as error:
        print(f"bench: {redact(str(error))}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except RunsFailed as error:
        for reason in error.reasons:
            print(f"bench: failed: {redact(reason)}", file=sys.stderr)
        return EXIT_FAILED
    except Stopped as error:
        print(f"bench: {error}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print("bench: interrupted; run the same command to resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as error:  # argparse and Hydra exit like this after --help or a usage error
        return EXIT_DONE if error.code in (0, None) else EXIT_WRONG_INPUT
    except Exception as error:
        return _report_unexpected(error)


def _report_unexpected(error: Exception) -> int:
    """Report an unexpected error and return the exit code."""
    # A run turns a full disk into `Stopped` itself; this one met a sweep's plan or status files.
    if isinstance(error, OSError) and error.errno in UNWRITABLE_ERRNOS:
        said = f"{error.filename or 'the disk'}: {error.strerror}; free some space"
        print(f"bench: {redact(said)} and run the same command to resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"bench: failed: {_save_traceback(error)}", file=sys.stderr)
    return EXIT_FAILED


def _save_traceback(error: Exception) -> str:
    """Write the traceback to a file, secrets redacted, and return a one-sentence error."""
    import tempfile
    import traceback

    # Not below results/: the error may be that nothing can be written there.
    with tempfile.NamedTemporaryFile("w", prefix="bench-", suffix=".log", delete=False) as file:
        file.write(redact("".join(traceback.format_exception(error))))
    return redact(f"{error_sentence(error)} (details: {file.name})")


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
