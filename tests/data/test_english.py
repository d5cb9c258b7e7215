"""The English text: two sides that share no page, and stay as they are."""

from pydoc_data.topics import topics

import pytest

from bench.data import calibration

SIDES = {"if": True, "numbers": True, "while": False, "lambda": False}


def test_every_page_is_on_one_side() -> None:
    for name, text in topics.items():
        page = text.strip()
        assert (page in calibration.train_text()) != (page in calibration.test_text()), name


def test_side_follows_from_the_name_alone() -> None:
    sides = {name: calibration.is_test_page(name) for name in SIDES}
    assert sides == SIDES
    share = sum(map(calibration.is_test_page, topics)) / len(topics)
    assert 0.1 < share < 0.35


def test_both_sides_are_long_enough() -> None:
    assert len(calibration.train_text()) > 200_000
    assert len(calibration.test_text()) > 40_000


def test_fingerprint_is_of_the_test_text(monkeypatch: pytest.MonkeyPatch) -> None:
    before = calibration.fingerprint()
    assert len(before) == 64
    monkeypatch.setattr(calibration, "train_text", str)
    assert calibration.fingerprint() == before
    monkeypatch.setattr(calibration, "test_text", calibration.test_text().upper)
    assert calibration.fingerprint() != before
