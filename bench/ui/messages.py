"""Messages on stderr: one line each, through the logger `bench`.

Texts may come from models, data sets and servers. They are cleaned only here: control characters
are removed, secrets are redacted, and no text is interpreted as markup.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Protocol, TextIO

from bench.security import clean, redact

LEVEL_VARIABLE = "BENCH_LOG_LEVEL"
PROGRESS_LEVEL = 15
"""Level of the lines about phases, below INFO, so that they can be disabled separately."""
COLOURS = {logging.WARNING: "33", logging.ERROR: "31"}
"""ANSI colours of levels: yellow and red."""


class MessageWriter(Protocol):
    """Receiver of messages while a progress display is on the screen."""

    def write(self, line: str, level: int) -> None:
        """Write one clean line."""


def progress_line(text: str, writer: MessageWriter) -> None:
    """Write the progress of a phase, if no bar can show it."""
    _log.log(PROGRESS_LEVEL, "%s", text, extra={"writer": writer})


def note(text: str, writer: MessageWriter | None = None) -> None:
    """Show a note to the user; `writer` is the display to which the message belongs."""
    _log.info("%s", text, extra={"writer": writer})


def warn(text: str, writer: MessageWriter | None = None) -> None:
    """Warn the user about something that may affect what the results mean."""
    _log.warning("%s", text, extra={"writer": writer})


def says_notes() -> bool:
    """Return whether notes are shown, so that their content is worth computing."""
    return _log.isEnabledFor(logging.INFO)


def fail(text: str) -> None:
    """Show the user why a command or a run failed."""
    _log.error("%s", text)


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether the stream is a terminal that supports ANSI sequences."""
    # A process may have no streams, or closed ones.
    if stream is None or getattr(stream, "closed", False):
        return False
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def write_line(stream: TextIO | None, line: str, level: int) -> None:
    """Write a line: coloured on a terminal, elsewhere with the time of day if it is a note."""
    if stream is None:
        return
    if is_terminal(stream):
        colour = None if "NO_COLOR" in os.environ else COLOURS.get(level)
        line = f"\x1b[{colour}m{line}\x1b[0m" if colour else line
    elif level < logging.WARNING:
        # Lines of a log file are read later, so each has its time.
        line = f"{time.strftime('%H:%M:%S')} {line}"
    # A stream with an encoding other than UTF-8 must not end the run at a curly quote.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


class _Handler(logging.Handler):
    """Writes messages to stderr, or above the progress bars that are on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        # One line per message, because a line break in untrusted text could imitate a message.
        line = " ".join(part.strip() for part in clean(redact(record.getMessage())).splitlines())
        if record.levelno >= logging.WARNING:
            line = f"bench: {line}"
        # stderr by default, looked up for each message because notebooks and tests replace it.
        writer: MessageWriter | None = getattr(record, "writer", None)
        try:
            if writer is None:
                write_line(sys.stderr, line, record.levelno)
            else:
                writer.write(line, record.levelno)
        except (OSError, ValueError):
            # The reader of the pipe has ended, or the stream is closed. A message that cannot be
            # written must not end a run.
            return


def _configured_logger() -> logging.Logger:
    logger = logging.getLogger("bench")
    logger.addHandler(_Handler())
    # Not to the root logger, because a host program that configured it would print twice.
    logger.propagate = False
    logging.addLevelName(PROGRESS_LEVEL, "PROGRESS")
    wanted = logging.getLevelNamesMapping().get(os.environ.get(LEVEL_VARIABLE, "").upper())
    logger.setLevel(wanted or logger.level or PROGRESS_LEVEL)  # A level set by the host is kept.
    return logger


_log = _configured_logger()
