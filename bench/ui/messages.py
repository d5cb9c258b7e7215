"""Messages to the user: one line each, on stderr, through the logger `bench`.

Texts may come from models, data sets and servers. They are cleaned here and nowhere else: control
characters are removed, secrets redacted, and no text is interpreted as markup.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Protocol, TextIO

from bench.security import redact

LEVEL_VARIABLE = "BENCH_LOG_LEVEL"
PROGRESS_LEVEL = 15
"""Level of the lines about phases, below INFO: who wants messages need not want these."""
COLOURS = {logging.WARNING: "33", logging.ERROR: "31"}
"""ANSI colours of levels: yellow and red."""

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


class MessageWriter(Protocol):
    """Where a message is written while a progress display is on the screen."""

    def write(self, line: str, level: int) -> None:
        """Write one clean line."""


def clean(text: str) -> str:
    """Return the text without control characters; tabs and line breaks stay."""
    return text.translate(_UNSAFE)


def progress_line(text: str, writer: MessageWriter) -> None:
    """Write how far a phase is, where no bar can show it."""
    _log.log(PROGRESS_LEVEL, "%s", text, extra={"writer": writer})


def note(text: str, writer: MessageWriter | None = None) -> None:
    """Tell the user something; `writer` is the display that the message belongs to."""
    _log.info("%s", text, extra={"writer": writer})


def warn(text: str, writer: MessageWriter | None = None) -> None:
    """Tell the user something that may change what the results mean."""
    _log.warning("%s", text, extra={"writer": writer})


def fail(text: str) -> None:
    """Tell the user why a command or a run failed."""
    _log.error("%s", text)


def is_terminal(stream: TextIO) -> bool:
    """Tell whether a person reads the stream on a terminal that understands ANSI sequences."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def write_line(stream: TextIO, line: str, level: int) -> None:
    """Write a line: coloured on a terminal, and elsewhere with the time of day if it is a note."""
    if is_terminal(stream):
        colour = None if "NO_COLOR" in os.environ else COLOURS.get(level)
        line = f"\x1b[{colour}m{line}\x1b[0m" if colour else line
    elif level < logging.WARNING:
        # In a log file nobody sees the lines appear, so each says when.
        line = f"{time.strftime('%H:%M:%S')} {line}"
    # A stream in another encoding than UTF-8 must not end the run at the first curly quote.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


class _Handler(logging.Handler):
    """Writes messages to stderr, or above the progress bars that are on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        # One line per message: a line break in a foreign text could imitate a message of ours.
        line = " ".join(part.strip() for part in clean(redact(record.getMessage())).splitlines())
        if record.levelno >= logging.WARNING:
            line = f"bench: {line}"
        writer: MessageWriter | None = getattr(record, "writer", None)
        try:
            if writer is None:
                # Looked up for each message: notebooks and tests replace sys.stderr.
                write_line(sys.stderr, line, record.levelno)
            else:
                writer.write(line, record.levelno)
        except (OSError, ValueError):
            # The reader of the pipe has gone, or the stream is closed: a message that nobody can
            # read must not end a run.
            return


def _configured_logger() -> logging.Logger:
    logger = logging.getLogger("bench")
    logger.addHandler(_Handler())
    # Not to the root logger: a host program that configured it would print everything twice.
    logger.propagate = False
    logging.addLevelName(PROGRESS_LEVEL, "PROGRESS")
    wanted = os.environ.get(LEVEL_VARIABLE, "PROGRESS").upper()
    logger.setLevel(logging.getLevelNamesMapping().get(wanted, PROGRESS_LEVEL))
    return logger


_log = _configured_logger()
