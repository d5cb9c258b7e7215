""""""

import gzip
import json
import random

import pytest
import torch
from pydantic import ValidationError

from bench.data import calibration as calibrations
from bench.data import hub
from bench.data.calibration import CalibrationSource, TextShare, resolve_calibration
from bench.data.synthetic.world import question_sets
from bench.errors import MissingData, UserError
from bench.schema import CalibrationConfig


class Numbers:
    """A tokenizer of texts that are numbers, with a beginning-of-text token."""

    def __call__(self, text, **_):
        return {"input_ids": [0, *(int(word) for word in text.split())]}


def numbers(first, count):
    return " ".join(str(first + i) for i in range(count))


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(numbers(1, 999))
    return file


def config(**more):
    return CalibrationConfig(**({"name": "mine", "source": "text", "rows": 4, "length": 50} | more))


def test_windows_start_where_the_official_code_starts_them(text):
    found = resolve_calibration(config(path=str(text), seed=7), offline=True).tokenize(Numbers())
    rng = random.Random(7)
    expected = [list(range(s, s + 50)) for s in (rng.randint(0, 1000 - 51) for _ in range(4))]
    assert found.tokens.dtype == torch.int64
    assert found.tokens.tolist() == expected


def test_fingerprints_change_with_text_and_settings_and_nothing_else(text, tmp_path):
    def marks(**more):
        source = resolve_calibration(config(**({"path": str(text)} | more)), offline=True)
        return source.fingerprint, source.tokenize(Numbers()).fingerprint

    base = marks()
    copy = tmp_path / "copy.txt"
    copy.write_text(text.read_text())
    assert marks(path=str(copy), name="other") == base
    copy.write_text(numbers(2, 999))
    changed = [marks(path=str(copy)), marks(rows=5), marks(length=49), marks(seed=1)]
    assert len({base[0], *(mark[0] for mark in changed)}) == 5
    assert len({base[1], *(mark[1] for mark in changed)}) == 5


def test_a_text_that_is_too_short_is_one_sentence_with_counts(text):
    source = resolve_calibration(config(path=str(text), rows=30), offline=True)
    for refusing in (source.tokenize, source.check):
        with pytest.raises(UserError, match=r"has 1000 tokens, but 30 rows of 50 need 1500"):
            refusing(Numbers())
    resolve_calibration(config(path=str(text), rows=20), offline=True).check(Numbers())


def test_a_text_that_is_surely_long_enough_is_not_tokenised_for_a_check(text):
    def tokenizer(*_, **__):
        raise AssertionError

    resolve_calibration(config(path=str(text), rows=4), offline=True).check(tokenizer)


def test_documents_longer_than_the_window_only_and_never_across_two():
    documents = [numbers(100 * i, 10 + 10 * i) for i in range(1, 6)]
    part = TextShare("c4", documents, rows=20, joined=False)
    source = CalibrationSource(config(source="c4", rows=20, length=45), (part,), "")
    for row in source.tokenize(Numbers()).tokens.tolist():
        body = row[1:]
        assert body == list(range(body[0], body[0] + 44))
        assert body[0] // 100 >= 4

    short = CalibrationSource(config(source="c4", length=100), (part,), "")
    with pytest.raises(UserError, match="none of its 5 documents is longer than 100"):
        short.tokenize(Numbers())


@pytest.mark.parametrize(("rows", "parts"), [(5, [3, 2]), (1, [1])])
def test_embedded_takes_half_of_each(rows, parts):
    source = resolve_calibration(config(source="embedded", rows=rows), offline=True)
    assert [part.rows for part in source.parts] == parts
    assert [part.origin for part in source.parts] == ["world", "english"][: len(parts)]
    words = type(
        "Words", (), {"__call__": lambda _, t, **__: {"input_ids": list(map(len, t.split()))}}
    )
    assert source.tokenize(words()).tokens.shape == (rows, 50)


@pytest.mark.parametrize("source", ["wikitext2", "c4"])
def test_a_data_set_that_is_not_there_says_the_cure(source, monkeypatch):
    def gone(*_, **__):
        raise hub.DatasetUnreachable("no network")

    monkeypatch.setattr(hub, "load_dataset", gone)
    monkeypatch.setattr(hub, "download_file", gone)
    monkeypatch.setattr(hub, "go_offline", lambda: None)
    with pytest.raises(MissingData, match=r"bench prefetch calibration=mine.*calibration=embedded"):
        resolve_calibration(config(source=source), offline=True)


TEXTS = [numbers(1, 400), "", numbers(401, 100)]


def test_wikitext2_is_read_by_its_published_columns(monkeypatch):
    def load(repository, name):
        assert (repository, name) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
        return {"train": {"text": TEXTS}}

    monkeypatch.setattr(hub, "load_dataset", load)
    monkeypatch.setattr(hub, "go_offline", lambda: None)
    drawn = resolve_calibration(config(source="wikitext2"), offline=True).tokenize(Numbers())
    assert drawn.tokens.shape == (4, 50)


def test_c4_is_read_from_its_first_shard(monkeypatch, tmp_path):
    shard = tmp_path / "shard.json.gz"
    with gzip.open(shard, "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)

    def download(repository, file):
        assert (repository, file) == ("allenai/c4", "en/c4-train.00000-of-01024.json.gz")
        return shard

    monkeypatch.setattr(hub, "download_file", download)
    monkeypatch.setattr(hub, "go_offline", lambda: None)
    drawn = resolve_calibration(config(source="c4"), offline=True).tokenize(Numbers())
    assert drawn.tokens.shape == (4, 50)


def test_files_that_cannot_be_read_are_one_sentence(tmp_path):
    with pytest.raises(MissingData, match=r"calibration\.path=.*gone: No such file"):
        resolve_calibration(config(path=str(tmp_path / "gone")), offline=True)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a UTF-8 text file"):
        resolve_calibration(config(path=str(tmp_path / "binary")), offline=True)


@pytest.mark.parametrize(
    "wrong", [{}, {"source": "english", "path": "x"}, {"rows": 0, "path": "x"}, {"source": "web"}]
)
def test_refuses_wrong_settings(wrong):
    with pytest.raises(ValidationError):
        config(**wrong)


def test_prefetch_says_what_is_there(text):
    assert calibrations.prefetch_calibration(config(path=str(text))).startswith(
        "calibration mine: text, "
    )


def test_a_text_of_nothing_a_folder_and_a_wrong_byte_are_named_before_a_model_is_loaded(tmp_path):
    blank, marked, wrong = tmp_path / "blank", tmp_path / "marked", tmp_path / "wrong"
    blank.write_text(" \n\n")
    with pytest.raises(UserError, match="blank contains no text"):
        resolve_calibration(config(path=str(blank)), offline=True)
    for path in (tmp_path, "/dev/zero"):
        with pytest.raises(UserError, match="is not a file"):
            resolve_calibration(config(path=str(path)), offline=True)
    wrong.write_bytes(b"one\ntwo\nthr\xffee\n")
    with pytest.raises(UserError, match="see line 3"):
        resolve_calibration(config(path=str(wrong)), offline=True)
    marked.write_bytes(b"\xef\xbb\xbfThe text.")
    assert resolve_calibration(config(path=str(marked)), offline=True).parts[0].documents == [
        "The text."
    ]


def test_the_world_is_drawn_once_for_its_code_and_again_when_its_file_is_damaged(
    monkeypatch, tmp_path
):
    drawn = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(question_sets, "corpus", lambda: drawn.append(1) or ["a ü", "b\n"])
    # Past the memory of this process, which other tests share.
    corpus = calibrations._world_corpus.__wrapped__
    assert [corpus(), corpus(), len(drawn)] == [["a ü", "b\n"], ["a ü", "b\n"], 1]
    (kept,) = (tmp_path / "cache" / "slimbench" / "world").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert [corpus(), len(drawn)] == [["a ü", "b\n"], 2]
    (tmp_path / "code.py").write_text("other = True")
    monkeypatch.setattr(calibrations, "_WORLD_FOLDER", tmp_path)
    assert [corpus(), len(drawn)] == [["a ü", "b\n"], 3]
