"""Messages to users: clean, without secrets, on stderr, and none at all when quiet."""

import io
import logging
import os
import subprocess
import sys

import pytest

from bench import ui
from bench.ui import messages

BELL_AND_COLOUR = "\x07\x1b[31mred\x1b[0m\x9b2J"


def test_foreign_text_is_neither_markup_nor_a_control_sequence(capsys):
    ui.warn(f"model [/x] says [bold]{BELL_AND_COLOUR}")
    assert capsys.readouterr().err == "bench: model [/x] says [bold][31mred[0m2J\n"


@pytest.mark.parametrize("text", ["a\rb", "a\u202eb", "a\u2066b", "a\x00b", "a\x7fb", "a\x85b"])
def test_characters_that_hide_or_reorder_text_are_removed(text):
    assert ui.clean(text) == "ab"


def test_what_can_be_read_stays():
    text = "größer, 模型\t[arc_easy] 'a' → b\nsecond line"
    assert ui.clean(text) == text
    assert ui.clean("a\ud800b") == "a\N{REPLACEMENT CHARACTER}b"


def test_a_line_break_cannot_imitate_another_message(capsys):
    ui.fail("failed: no such file\nbench: all done")
    assert capsys.readouterr().err == "bench: failed: no such file bench: all done\n"


def test_a_secret_is_not_said(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    ui.warn("key 0123456789abcdef refused")
    assert "0123456789abcdef" not in capsys.readouterr().err


def test_notes_have_the_time_off_a_terminal_and_warnings_their_origin(capsys):
    ui.note("a note")
    ui.warn("a warning")
    note, warning = capsys.readouterr().err.splitlines()
    assert note[2] == note[5] == ":" and note[8:] == " a note"
    assert warning == "bench: a warning"


def test_a_host_program_can_filter_and_receive_messages(capsys):
    logger = logging.getLogger("bench")
    received = _Received()
    logger.addHandler(received)
    try:
        ui.warn("a warning")
        logger.setLevel(logging.ERROR)
        ui.warn("another warning")
    finally:
        logger.removeHandler(received)
    assert [record.getMessage() for record in received.records] == ["a warning"]
    assert "another" not in capsys.readouterr().err


class _Received(logging.Handler):
    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record)


def test_the_level_is_an_environment_variable():
    script = "from bench import ui; ui.note('note'); ui.warn('warning'); ui.fail('failure')"

    def said(level):
        known = {**os.environ, messages.LEVEL_VARIABLE: level}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=known, capture_output=True, text=True, check=True)
        return [line.split()[-1] for line in done.stderr.splitlines()]

    assert said("INFO") == ["note", "warning", "failure"]
    assert said("warning") == ["warning", "failure"]
    assert said("ERROR") == ["failure"]
    assert said("nonsense") == ["note", "warning", "failure"]


def test_a_stream_of_another_encoding_or_without_a_reader_ends_nothing(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii"))
    ui.warn("größer")
    assert raw.getvalue() == b"bench: gr\\xf6\\xdfer\n"
    sys.stderr.close()
    ui.warn("nobody reads this")


def test_quiet_means_quiet(capsys):
    for progress in (ui.SILENT, ui.Progress(quiet=True)):
        progress.say("a note")
        progress.warn("a warning")
        assert list(progress.track([1, 2], "counting")) == [1, 2]
        with progress.phase("a phase", 3):
            progress.step(doing="a step")
            progress.warn("inside")
    assert capsys.readouterr() == ("", "")


def test_a_host_program_that_logs_itself_prints_nothing_twice(capsys):
    own = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(own)
    try:
        ui.warn("once")
    finally:
        logging.getLogger().removeHandler(own)
    assert capsys.readouterr().err.count("once") == 1


@pytest.mark.parametrize("stream", [None, "closed"])
def test_a_process_without_stderr_works_on(monkeypatch, stream):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed if stream else None)
    progress = ui.Progress()
    with progress.phase("loading", total=2):
        progress.warn("nobody reads this")
    ui.warn("nor this")
    assert progress.seconds.keys() == {"loading"}
