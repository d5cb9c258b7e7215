"""Flips of questions about images come with the images, and never with others."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from bench.cli.main import main
from bench.config.composition import compose_run_config
from bench.data.synthetic.scenes import question_sets
from bench.evaluation.multimodal.prompts import image_hash
from bench.records import Store
from bench.reporting.comparison.flips import write_flip_images
from tests.reporting.comparison.synthetic_runs import metric, record, rows


def asked(document):
    """The image of a document of the scenes' gqa as a run would have hashed it."""
    row = question_sets.documents("gqa")[document]
    return {each["id"]: each["image"] for each in question_sets.scene_images("gqa")}[row["imageId"]]


@pytest.fixture
def runs(tmp_path):
    """Two runs that differ on document 1 of gqa; return the folder and a way to store them."""
    benchmark = compose_run_config(
        ["model=micro_llava", "benchmark=mllm_seven_micro", "benchmark.tasks=[gqa]"]
    ).benchmark

    def store(hashes):
        for name, method, scores in (("a", None, [1.0, 1.0]), ("b", "prune", [1.0, 0.0])):
            made = record(name, [metric("gqa", np.mean(scores), 2, "exact_match")], method)
            config = made.config | {"benchmark": benchmark.model_dump(mode="json")}
            scored = rows("gqa", scores, "exact_match", image_hash=hashes)
            Store(tmp_path).write(made.model_copy(update={"config": config}), scored, "")
        return tmp_path

    return store


def test_flips_of_texts_need_no_image_library(monkeypatch, tmp_path):
    """It imports transformers, which takes longer than the comparison."""
    monkeypatch.setitem(sys.modules, "bench.evaluation.multimodal.prompts", None)
    assert write_flip_images([], record("a", [], None), tmp_path) == {}


def test_the_image_of_a_flip_is_written_and_named(runs, capsys):
    folder = runs([image_hash([asked(0)]), image_hash([asked(1)])])
    command = ["compare", "a", "b", "--flips", "2", "--results-dir", str(folder)]
    assert main([*command, "--json"]) == 0
    (flip,) = json.loads(capsys.readouterr().out)["flips"]
    (written,) = flip["pictures"]
    assert np.array_equal(np.asarray(Image.open(written)), np.asarray(asked(1)))
    assert main(command) == 0
    assert f"image  {written}" in capsys.readouterr().out


def test_an_image_that_changed_is_not_shown(runs, capsys):
    folder = runs(["0" * 64, "1" * 64])
    assert main(["compare", "a", "b", "--flips", "2", "--results-dir", str(folder)]) == 0
    said = capsys.readouterr()
    assert f"image  SHA-256 {'1' * 64}" in said.out
    assert "gqa document 1" in said.err and "changed since the run" in said.err
    assert not (folder / "pictures").exists()
