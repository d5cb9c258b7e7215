"""The command line. Starts at once: what a command needs is imported when it is called.

Exit codes: 0 done; 1 some runs failed; 2 the user's input is wrong; 75 interrupted, run the same
command again to go on.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from bench.cli import running
from bench.cli.answers import DONE, FAILED, INTERRUPTED, WRONG
from bench.cli.grammar import COMMANDS, parser
from bench.errors import NO_ROOM, RunsFailed, Stopped, UserError, sentence, unknown
from bench.secrets import hide

__all__ = ["COMMANDS", "main"]

_SELDOM = 100_000
"""New objects between two searches for garbage. Importing makes millions that stay, and at the
interpreter's own 700 a fifth of a start went by in looking through them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    gc.set_threshold(_SELDOM)
    given = list(sys.argv[1:] if arguments is None else arguments)
    for asked in (signal.SIGTERM, signal.SIGUSR1):  # what schedulers send before they kill
        signal.signal(asked, _interrupt)
    try:
        if given[:1] == ["run"] and not {"-h", "--help"} & set(given):
            return running.run(given[1:])
        if given[:1] == ["table"] and not {"-h", "--help"} & set(given):
            return running.table(given[1:])
        if given and not given[0].startswith("-") and given[0] not in COMMANDS:
            raise unknown("command", given[0], COMMANDS)
        parsed = parser().parse_args(given)
        handler: Callable[[argparse.Namespace], int] = parsed.handler
        return handler(parsed)
    except UserError as error:
        print(f"bench: {hide(str(error))}", file=sys.stderr)
        return WRONG
    except RunsFailed as error:
        for reason in error.reasons:
            print(f"bench: failed: {hide(reason)}", file=sys.stderr)
        return FAILED
    except Stopped as error:
        print(f"bench: {error}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("bench: interrupted; the same command goes on where this stopped", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as error:  # how argparse and Hydra end after an answer or a complaint
        return DONE if error.code in (0, None) else WRONG
    except Exception as error:
        return _unforeseen(error)


def _unforeseen(error: Exception) -> int:
    """Say what happened: no room beside a run, or a fault of ours or of a method."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:  # a sweep's plan, its jobs' notes
        said = f"{error.filename or 'the disk'}: {error.strerror}; make room"
        print(f"bench: {hide(said)}, and the same command goes on", file=sys.stderr)
        return INTERRUPTED
    print(f"bench: failed: {_keep_trace(error)}", file=sys.stderr)
    return FAILED


def _keep_trace(error: Exception) -> str:
    """Leave the traceback in a file, without secrets, and say in one sentence what went wrong."""
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="bench-", suffix=".log", delete=False) as file:
        file.write(hide("".join(traceback.format_exception(error))))
    return hide(f"{sentence(error)} (details: {file.name})")


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
