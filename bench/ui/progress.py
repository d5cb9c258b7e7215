"""Progress of a run on stderr: the current phase, its steps and its remaining time.

A terminal shows bars, and a notebook shows its own bars. Elsewhere (Slurm logs, nohup, pipes) a
phase is one line, and a long phase is another line per tenth.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TextIO, TypeVar, cast

from bench.security import clean
from bench.ui.messages import is_terminal, note, progress_line, warn, write_line

if TYPE_CHECKING:
    from rich.progress import TaskID
    from tqdm.std import tqdm

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10.0
"""Minimum time between two lines about a phase; most phases end before their second line."""


@dataclass(eq=False)
class Phase:
    """One phase on the display; `total` is None while the number of steps is unknown.

    `expected` is its estimated duration in seconds, None if there is no estimate. Of the `done`
    steps, `resumed` were done by an earlier process.
    """

    name: str
    total: int | None
    started: float
    done: int = 0
    expected: float | None = None
    resumed: int = 0


class Display(Protocol):
    """One way to show phases; phases are closed in reverse order."""

    def open(self, phase: Phase) -> None:
        """Show a phase that starts."""

    def update(self, phase: Phase) -> None:
        """Show the changed name, total or number of finished steps of the innermost phase."""

    def close(self, phase: Phase) -> None:
        """Remove a phase that has ended."""

    def write(self, line: str, level: int) -> None:
        """Write a message without disturbing the phases."""


class Watcher(Protocol):
    """Follows a run in addition to the display; for example, a tracker."""

    def phase(self, name: str, share: float | None, seconds: float) -> None:
        """Receive the current phase: the share that is done, and seconds since the start."""

    def result(self, task: str, value: float, stderr: float | None) -> None:
        """Receive the headline number of a finished task."""


class Progress:
    """Nested named phases; `seconds` is the wall time per phase.

    Everything that takes long receives a `Progress` and calls `track` or `step`.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        """Write to `stream`, by default stderr; with `quiet` write nothing, not even warnings."""
        self.seconds: dict[str, float] = {}
        self._expected: dict[str, float] = {}
        self._quiet = quiet
        self._stream = stream
        self._phases: list[Phase] = []
        self._display: Display | None = None
        self._started = time.perf_counter()
        self.watcher: Watcher | None = None

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Set the expected seconds of phases by name, which long ones show at their start."""
        self._expected = dict(seconds)

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        """Show a phase while the block runs and add its wall time to `seconds[name]`."""
        phase = Phase(clean(name), total, started=time.perf_counter())
        phase.expected = self._expected.get(name)
        if not self._phases and not self._quiet:
            self._display = _choose_display(self._stream)
        self._phases.append(phase)
        if self._display:
            self._display.open(phase)
        self._tell_watcher()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - phase.started
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
            self._phases.remove(phase)
            if self._display:
                self._display.close(phase)
            if not self._phases:
                self._display = None

    def total(self, total: int) -> None:
        """Set the number of steps of the current phase, once it is known."""
        if self._phases:
            self._phases[-1].total = total
            self._phases[-1].done = self._phases[-1].resumed = 0
            self._update()

    def resume(self, done: int) -> None:
        """Count steps that an earlier process did, which say nothing about the time of the rest."""
        if self._phases:
            self._phases[-1].resumed += done
            self.step(done)

    def step(self, count: int = 1, doing: str | None = None) -> None:
        """Advance the current phase, optionally with a new description."""
        if self._phases:
            self._phases[-1].done += count
            if doing is not None:
                self._phases[-1].name = clean(doing)
            self._update()

    def result(self, task: str, value: float, stderr: float | None) -> None:
        """Pass the headline number of a finished task to the watcher."""
        if self.watcher is not None:
            self.watcher.result(task, value, stderr)

    def say(self, text: str) -> None:
        """Write a message above the bars."""
        if not self._quiet:
            note(text, self._writer())

    def warn(self, text: str) -> None:
        """Write a warning."""
        if not self._quiet:
            warn(text, self._writer())

    def track(self, items: Iterable[Item], doing: str, total: int | None = None) -> Iterator[Item]:
        """Yield `items` as one phase named `doing`, one step each."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        with self.phase(doing, total):
            for item in items:
                yield item
                self.step()

    def _update(self) -> None:
        if self._display:
            self._display.update(self._phases[-1])
        self._tell_watcher()

    def _tell_watcher(self) -> None:
        if self.watcher is not None:
            phase = self._phases[-1]
            share = phase.done / phase.total if phase.total else None
            self.watcher.phase(phase.name, share, time.perf_counter() - self._started)

    def _writer(self) -> Display | _Lines | None:
        if self._display is None and self._stream is not None:
            return _Lines(self._stream)
        return self._display


class _Lines:
    """One line per phase, and one per tenth of a long phase."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._tenths: dict[Phase, int] = {}
        self._names: dict[Phase, str] = {}
        self._last_line = 0.0

    def open(self, phase: Phase) -> None:
        self._tenths[phase], self._names[phase] = 0, phase.name
        self._log(_expected_text(phase))

    def update(self, phase: Phase) -> None:
        tenth = 10 * phase.done // phase.total if phase.total else 0
        if tenth <= self._tenths[phase] and phase.name == self._names[phase]:
            return
        if time.perf_counter() - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._tenths[phase], self._names[phase] = tenth, phase.name
        self._log(_progress_text(phase))

    def close(self, phase: Phase) -> None:
        del self._tenths[phase], self._names[phase]

    def write(self, line: str, level: int) -> None:
        write_line(self._stream or sys.stderr, line, level)

    def _log(self, text: str) -> None:
        self._last_line = time.perf_counter()
        progress_line(text, self)


class _LenientStream:
    """A stream that drops what it cannot write: progress that nobody sees must not end a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        # The terminal was closed, as at the end of an ssh connection.
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


class _TerminalBars:
    """One rich bar per phase; finished bars disappear."""

    def __init__(self, stream: TextIO | None) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bars = Progress(
            SpinnerColumn(),
            # Without markup, because names of tasks and models may contain square brackets.
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(
                file=cast("TextIO", _LenientStream(stream or sys.stderr)), force_terminal=True
            ),
            transient=True,
        )
        self._tasks: dict[Phase, TaskID] = {}

    def open(self, phase: Phase) -> None:
        if not self._tasks:
            self._bars.start()
        self._tasks[phase] = self._bars.add_task(_expected_text(phase), total=phase.total)

    def update(self, phase: Phase) -> None:
        self._bars.update(
            self._tasks[phase],
            description=_expected_text(phase),
            total=phase.total,
            completed=phase.done,
        )

    def close(self, phase: Phase) -> None:
        self._bars.remove_task(self._tasks.pop(phase))
        if not self._tasks:
            self._bars.stop()

    def write(self, line: str, level: int) -> None:
        from rich.text import Text

        self._bars.refresh()
        style = {logging.WARNING: "yellow", logging.ERROR: "red"}.get(level, "")
        # A styled Text, because `print(style=...)` would also colour the bars below. soft_wrap,
        # because a path that is folded at the edge of the terminal cannot be copied.
        self._bars.console.print(Text(line, style), soft_wrap=True)


class _NotebookBars:
    """A tqdm bar per phase: a widget if ipywidgets is installed, else a line of text."""

    # Not rich, whose live display shows nothing in a notebook without ipywidgets.

    def __init__(self) -> None:
        self._bars: dict[Phase, tqdm[object]] = {}

    def open(self, phase: Phase) -> None:
        from tqdm import TqdmWarning
        from tqdm.auto import tqdm

        with warnings.catch_warnings():
            # "IProgress not found": the text bar suffices.
            warnings.simplefilter("ignore", TqdmWarning)
            self._bars[phase] = tqdm(total=phase.total, desc=phase.name, leave=False)

    def update(self, phase: Phase) -> None:
        bar = self._bars[phase]
        if bar.total != phase.total:
            bar.reset(phase.total)
        if bar.desc != f"{phase.name}: ":
            bar.set_description(phase.name)
        bar.update(phase.done - bar.n)

    def close(self, phase: Phase) -> None:
        self._bars.pop(phase).close()

    def write(self, line: str, level: int) -> None:
        from tqdm.auto import tqdm

        tqdm.write(line, file=sys.stderr)


def _choose_display(stream: TextIO | None) -> Display:
    if stream is None and in_notebook():
        return _NotebookBars()
    return _TerminalBars(stream) if is_terminal(stream or sys.stderr) else _Lines(stream)


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook (Jupyter, Colab)."""
    # IPython in a terminal also has a shell, but no kernel.
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def _expected_text(phase: Phase) -> str:
    """Return the phase's name and, until the first step is done, its expected duration."""
    if phase.done or (phase.expected or 0.0) < SECONDS_BETWEEN_LINES:
        return phase.name
    return f"{phase.name} (about {_duration(phase.expected or 0.0)})"


def _progress_text(phase: Phase) -> str:
    if not phase.total:
        return phase.name
    text = f"{phase.name}: {100 * phase.done // phase.total} % ({phase.done} of {phase.total})"
    done_here, left = phase.done - phase.resumed, phase.total - phase.done
    if not done_here or not left:
        return text
    elapsed = time.perf_counter() - phase.started
    return f"{text}, about {_duration(elapsed / done_here * left)} left"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


SILENT = Progress(quiet=True)
