"""Conversations from a file, where the file system refuses."""

from pathlib import Path

import pytest

from bench.data.conversations import conversations_from_file
from bench.errors import MissingData


def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "talks.json").write_text("[]")

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    # Not `chmod`, which does not stop the superuser, as whom containers often run.
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(MissingData, match=r"talks\.json cannot be read: Permission denied"):
        conversations_from_file(str(tmp_path / "talks.json"), str(tmp_path))
