"""Phases on a log file, a terminal and a notebook."""

import errno
import io
import os
import pty
import select
import sys
import time
import types

import pytest

from bench import ui
from bench.ui import progress as display


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = types.SimpleNamespace(seconds=0.0)
    fake = types.SimpleNamespace(perf_counter=lambda: now.seconds, strftime=time.strftime)
    monkeypatch.setattr(display, "time", fake)
    return now


def lines(stream):
    """The lines of a log without their times."""
    said = stream.getvalue().splitlines()
    assert all(line[2] == line[5] == ":" for line in said)
    return [line.partition(" ")[2] for line in said]


class Closed(io.StringIO):
    """A terminal that is closed in the middle of a run."""

    closes = False

    def isatty(self):
        return True

    def write(self, text):
        if self.closes:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)


def test_a_terminal_that_is_closed_does_not_end_the_run(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Closed()
    progress = ui.Progress(terminal)
    with progress.phase("scoring", 2):
        progress.step()
        assert "scoring" in terminal.getvalue()
        terminal.closes = True
        with progress.phase("counting"):
            progress.warn("nobody hears this")
        progress.step()
    with progress.phase("writing"):
        pass
    assert set(progress.seconds) == {"scoring", "counting", "writing"}


def test_a_phase_is_one_line_in_a_log_file():
    log = io.StringIO()
    progress = ui.Progress(log)
    with progress.phase("loading the model"):
        pass
    assert list(progress.track(range(1000), "scoring")) == list(range(1000))
    assert lines(log) == ["loading the model", "scoring"]
    assert set(progress.seconds) == {"loading the model", "scoring"}


def test_a_long_phase_is_one_line_per_tenth(clock):
    log = io.StringIO()
    progress = ui.Progress(log)
    with progress.phase("scoring", 40):
        for _ in range(40):
            clock.seconds += 6
            progress.step()
    said = lines(log)
    assert len(said) == 11
    assert said[:2] == ["scoring", "scoring: 10 % (4 of 40), about 4 min left"]
    assert said[-1] == "scoring: 100 % (40 of 40)"


def test_lines_about_a_phase_are_ten_seconds_apart(clock):
    log = io.StringIO()
    progress = ui.Progress(log)
    with progress.phase("scoring", 100):
        for _ in range(100):
            clock.seconds += 0.5
            progress.step()
    assert len(lines(log)) == 1 + 5


def test_a_total_that_is_known_late_and_a_new_description_count(clock):
    log = io.StringIO()
    progress = ui.Progress(log)
    with progress.phase("scoring"):
        progress.total(4)
        clock.seconds = 20
        progress.step(2, doing="scoring the rest")
        clock.seconds = 40
        progress.step(doing="measuring")
    assert lines(log)[1:] == [
        "scoring the rest: 50 % (2 of 4), about 20 s left",
        "measuring: 75 % (3 of 4), about 13 s left",
    ]


def test_steps_of_an_earlier_process_do_not_shorten_the_time_left(clock):
    log = io.StringIO()
    progress = ui.Progress(log)
    with progress.phase("training", 16):
        progress.resume(4)
        clock.seconds += 240
        progress.step()
    assert lines(log)[-1] == "training: 31 % (5 of 16), about 44 min left"


def test_a_resumed_phase_tells_no_time_before_its_first_step(clock):
    log = io.StringIO()
    progress = ui.Progress(log)
    with progress.phase("training", 16):
        clock.seconds += 60
        progress.resume(4)
    assert lines(log)[-1] == "training: 25 % (4 of 16)"


def test_phases_nest_and_an_error_closes_them():
    log = io.StringIO()
    progress = ui.Progress(log)
    with pytest.raises(KeyError), progress.phase("outer"), progress.phase("inner"):
        raise KeyError
    with progress.phase("next"):
        progress.step()
    assert lines(log) == ["outer", "inner", "next"]


def test_messages_of_a_progress_go_to_its_stream(capsys):
    log = io.StringIO()
    progress = ui.Progress(log)
    progress.warn("before [/x]")
    with progress.phase("phase \x1b[2J"):
        progress.warn("during")
    assert log.getvalue().startswith("bench: before [/x]\n")
    assert log.getvalue().endswith(" phase [2J\nbench: during\n")
    assert capsys.readouterr() == ("", "")


def test_a_quiet_progress_writes_nothing_and_keeps_the_times(capsys):
    log = io.StringIO()
    quiet = ui.Progress(log, quiet=True)
    for progress in (quiet, ui.SILENT):
        progress.say("said")
        with progress.phase("phase", 2):
            progress.warn("careful")
            progress.step()
    assert log.getvalue() == ""
    assert capsys.readouterr() == ("", "")
    assert quiet.seconds["phase"] > 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.4, "12 s"), (600, "10 min"), (9000, "2 h 30 min")]
)
def test_durations_are_short(seconds, text):
    assert display._duration(seconds) == text


def everything(terminal):
    """Return what was written to a terminal so far, and close it."""
    said = b""
    while select.select([terminal], [], [], 0)[0]:
        said += os.read(terminal, 4096)
    os.close(terminal)
    return said.decode()


def test_a_terminal_shows_a_bar_and_messages_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    main, secondary = pty.openpty()
    with os.fdopen(secondary, "w") as terminal:
        progress = ui.Progress(terminal)
        with progress.phase("scoring [bold]", 3):
            progress.step()
            with progress.phase("inner"):
                progress.warn("careful [/x] \x1b[2J")
            progress.step(2, doing="the rest")
            progress.say("a message draws the bars again")
        progress.warn("afterwards")
        said = everything(main)
    for part in ("scoring [bold]", "inner", "bench: careful [/x] [2J", "the rest", "3/3"):
        assert part in said
    assert "\x1b[33mbench: afterwards\x1b[0m" in said
    assert "\x1b[?25h" in said  # the cursor is back


def test_a_terminal_that_understands_nothing_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    main, secondary = pty.openpty()
    with os.fdopen(secondary, "w") as terminal:
        with ui.Progress(terminal).phase("scoring", 3):
            pass
        said = everything(main)
    assert said.endswith(" scoring\r\n") and "\x1b" not in said


@pytest.fixture
def notebook(monkeypatch):
    """Make this process look like a kernel, as far as the detection goes."""
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))


def test_a_notebook_shows_a_bar(notebook, capsys):
    progress = ui.Progress()
    with progress.phase("scoring"):
        progress.total(4)
        progress.step(2)
        progress.warn("careful")
        progress.step(2, doing="the rest")
    err = capsys.readouterr().err
    assert "scoring: " in err and "\r" in err
    assert "bench: careful\n" in err


def test_a_quiet_notebook_shows_nothing(notebook, capsys):
    progress = ui.Progress(quiet=True)
    assert list(progress.track([1], "scoring")) == [1]
    progress.warn("careful")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_with_ipython_is_no_notebook(monkeypatch):
    shell = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert not display.in_notebook()
