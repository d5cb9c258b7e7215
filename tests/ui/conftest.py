"""Messages as users get them: progress included."""

import logging

import pytest

from bench.ui import messages


@pytest.fixture(autouse=True)
def everything_is_said():
    """The other tests hear nothing of progress."""
    logger = logging.getLogger("bench")
    before = logger.level
    logger.setLevel(messages.PROGRESS_LEVEL)
    yield
    logger.setLevel(before)
