"""Prompts with images: three sources, one hash, and what a processor makes of them."""

import io

import numpy as np
import pytest
from PIL import Image

from bench.data.prompts import resolve_prompts
from bench.errors import MissingData, UserError
from bench.schema import PromptsConfig


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.full((4, 5, 3), number, dtype=np.uint8))


def parquet_file(folder, rows):
    import pyarrow
    from pyarrow import parquet

    file = folder / "prompts.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return str(file)


def stored(number: int) -> dict:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return {"image": {"bytes": buffer.getvalue(), "path": None}, "question": f"q{number}?"}


def config(**options) -> PromptsConfig:
    return PromptsConfig(**{"name": "p", "source": "file", "count": 3} | options)


class Words:
    """Enough of a processor to see what it is asked: one call a batch, padding on the left."""

    def __init__(self):
        self.tokenizer, self.asked = self, []
        self.padding_side, self.bos_token, self.chat_template = "right", None, "own"

    def apply_chat_template(self, turns, *, chat_template, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize and chat_template == "own"
        kinds = [part["type"] for part in turns[0]["content"]]
        assert kinds == ["image", "text"]
        return "<image>" + turns[0]["content"][1]["text"]

    def __call__(self, images, text, padding, return_tensors):
        import torch

        assert padding and return_tensors == "pt" and self.padding_side == "left"
        self.asked.append((text, [one[0].getpixel((0, 0))[0] for one in images]))
        return {"input_ids": torch.arange(len(text))[:, None]}


def test_a_file_gives_rows_drawn_by_seed(tmp_path):
    file = parquet_file(tmp_path, [stored(n) for n in range(9)])
    first, again = (
        resolve_prompts(config(path=file), offline=True),
        resolve_prompts(config(path=file), offline=True),
    )
    other = resolve_prompts(config(path=file, seed=5), offline=True)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert [q for _, q in first.prompts] == [q for _, q in again.prompts]
    for image, question in first.prompts:
        assert question == f"q{image.getpixel((0, 0))[0]}?"


def test_another_image_is_another_fingerprint(tmp_path):
    rows = [stored(n) for n in range(3)]
    before = resolve_prompts(config(path=parquet_file(tmp_path, rows)), offline=True).fingerprint
    rows[1]["image"] = stored(77)["image"]
    after = resolve_prompts(config(path=parquet_file(tmp_path, rows)), offline=True).fingerprint
    assert before != after


def test_a_processor_sees_batches_and_keeps_its_side(tmp_path):
    file = parquet_file(tmp_path, [stored(n) for n in range(3)])
    words = Words()
    samples = resolve_prompts(config(path=file, batch=2), offline=True).process(words)
    assert [len(text) for text, _ in words.asked] == [2, 1]
    assert words.padding_side == "right"
    for texts, pixels in words.asked:
        assert texts == [f"<image>q{pixel}?" for pixel in pixels]
    assert len(samples.inputs) == 2


@pytest.mark.parametrize(
    ("options", "rows", "said"),
    [
        ({"count": 4}, 3, "has 3 rows, but prompts.count=4"),
        ({"question_column": "ask"}, 3, "no column 'ask'"),
        ({"image_column": "question"}, 3, "is not an image"),
    ],
)
def test_a_file_that_does_not_fit_is_one_sentence(tmp_path, options, rows, said):
    file = parquet_file(tmp_path, [stored(n) for n in range(rows)])
    with pytest.raises(UserError, match=said):
        resolve_prompts(config(path=file, **options), offline=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": "  "}, "row 1 has no text in 'question'"),
        ({"question": None}, "row 1 has no column 'question'"),
        ({"image": {"bytes": stored(1)["image"]["bytes"][:-40]}}, "row 1 is not a prompt: its"),
        ({"image": {"bytes": b"no image"}}, "row 1 is not a prompt: its image cannot be opened"),
    ],
)
def test_a_row_that_is_no_prompt_is_named(tmp_path, change, said):
    rows = [stored(n) for n in range(3)]
    rows[1] |= change
    with pytest.raises(UserError, match=said):
        resolve_prompts(config(path=parquet_file(tmp_path, rows)), offline=True)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        resolve_prompts(config(path=str(tmp_path / "none.parquet")), offline=True)
    (tmp_path / "bad.parquet").write_text("no table")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        resolve_prompts(config(path=str(tmp_path / "bad.parquet")), offline=True)
    hub = PromptsConfig(name="h", source="hub", dataset="nobody/nothing")
    with pytest.raises(MissingData, match="nobody/nothing"):
        resolve_prompts(hub, offline=True)


def test_a_source_needs_its_own_keys_only():
    with pytest.raises(ValueError, match=r"prompts\.path"):
        PromptsConfig(name="p", source="file")
    with pytest.raises(ValueError, match=r"prompts\.dataset"):
        PromptsConfig(name="p", source="embedded", dataset="x/y")


def test_embedded_scenes_are_prompts():
    source = resolve_prompts(PromptsConfig(name="e", source="embedded", count=4), offline=True)
    assert len(source.prompts) == 4
    assert all(image.mode == "RGB" and question for image, question in source.prompts)
