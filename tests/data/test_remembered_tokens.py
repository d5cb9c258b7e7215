"""Ids of long texts are remembered, and never returned for another text or tokenizer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bench.data import calibration
from bench.data.calibration import token_ids

WORDS = {"[BOS]": 0, "[UNK]": 1, "one": 2, "two": 3, "three": 4}
TEXT = "one two three two " * 20


def make_tokenizer(words=WORDS, *, bos=False):
    backend = Tokenizer(models.WordLevel(dict(words), unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        backend.post_processor = processors.TemplateProcessing("[BOS] $A", None, [("[BOS]", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


@pytest.fixture
def memory(monkeypatch, tmp_path):
    """Remember every text in a folder of its own, and nothing in the process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "_LONG_TEXT", 10)
    calibration._long_token_ids.cache_clear()
    yield tmp_path / "slimbench" / "tokens"
    calibration._long_token_ids.cache_clear()


def ask(text, tokenizer):
    calibration._long_token_ids.cache_clear()
    return token_ids(text, tokenizer).tolist()


class Counting(PreTrainedTokenizerFast):
    """Looks like a tokenizer of transformers and counts its calls."""

    __module__ = "transformers.counting"
    calls = 0

    def __call__(self, *args, **kwargs):
        type(self).calls += 1
        return super().__call__(*args, **kwargs)


def test_a_long_text_is_tokenized_once(memory):
    tokenizer = Counting(tokenizer_object=make_tokenizer().backend_tokenizer)
    Counting.calls = 0
    first = ask(TEXT, tokenizer)
    assert first == make_tokenizer()(TEXT)["input_ids"]
    assert ask(TEXT, tokenizer) == first
    assert Counting.calls == 1


def test_texts_and_tokenizers_are_told_apart(memory):
    plain, other = make_tokenizer(), make_tokenizer({**WORDS, "two": 4, "three": 3})
    with_bos = make_tokenizer(bos=True)
    for tokenizer in (plain, other, with_bos, plain):
        for text in (TEXT, TEXT + "one", TEXT):
            assert ask(text, tokenizer) == tokenizer(text)["input_ids"]
    assert len(list(memory.iterdir())) == 6


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_ids_that_are_not_what_was_written_are_made_again(memory, damage):
    tokenizer = make_tokenizer()
    first = ask(TEXT, tokenizer)
    (file,) = memory.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\1\0\0\0" if damage is None else damage)
    assert ask(TEXT, tokenizer) == first
    assert file.read_bytes() == whole


def test_python_of_a_tokenizers_own_is_run_every_time(memory):
    class Mine(PreTrainedTokenizerFast):
        pass

    tokenizer = Mine(tokenizer_object=make_tokenizer().backend_tokenizer)
    assert ask(TEXT, tokenizer) == tokenizer(TEXT)["input_ids"]
    assert not memory.exists()


def test_a_cache_that_cannot_be_written_costs_only_time(memory, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert ask(TEXT, make_tokenizer()) == make_tokenizer()(TEXT)["input_ids"]


@given(st.lists(st.sampled_from(["one", "two", "three", "four", "\n\n"]), max_size=60))
def test_remembered_or_not_the_ids_are_the_tokenizers(words):
    text, tokenizer = " ".join(words), make_tokenizer(bos=True)
    assert token_ids(text, tokenizer).tolist() == tokenizer(text)["input_ids"]
