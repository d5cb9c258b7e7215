"""Images of questions in the report: on request, checked by hash, never in place of others."""

import base64
import functools
import io

import numpy as np
import pytest
import torch
from PIL import Image

from bench.cli.main import main
from bench.config.composition import compose_run_config
from bench.data.image_catalogue import load_digit_images
from bench.data.synthetic.scenes import question_sets
from bench.evaluation import PlanCache
from bench.evaluation.multimodal.prompts import image_hash
from bench.records import Store
from bench.reporting.html import SampleShare, write_report
from bench.reporting.html.samples import THUMBNAIL_SIDE, _data_uri, sample_chunks, thumbnails
from bench.reporting.leaderboard import build_leaderboard
from tests.reporting.html.synthetic_records import metric, record


@functools.cache
def scenes():
    return {each["id"]: each["image"] for each in question_sets.scene_images("gqa")}


def asked(document):
    """The image of a document of the scenes' gqa as a run hashes it."""
    return scenes()[question_sets.documents("gqa")[document]["imageId"]]


def stored(root, hashes, **benchmark):
    """One run of gqa whose samples name these images."""
    composed = compose_run_config(
        ["model=micro_llava", "benchmark=mllm_seven_micro", "benchmark.tasks=[gqa]"]
    ).benchmark.model_dump(mode="json")
    made = record(0)
    made = made.model_copy(update={
        "config": made.config | {"benchmark": composed | benchmark},
        "metrics": (metric("gqa", 1.0, "exact_match", len(hashes)),),
    })  # fmt: skip
    rows = [
        {"task": "gqa", "filter": "none", "doc_id": at, "target": "yes", "prompt": f"Q{at}",
         "response": "yes", "exact_match": 1.0, "image_hash": name}
        for at, name in enumerate(hashes)
    ]  # fmt: skip
    Store(root).write(made, rows, "")
    return made


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictured")
    return root, stored(root, [image_hash([asked(at)]) for at in range(3)])


def opened(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def chunk_of(root, made, **share):
    (found,) = sample_chunks(build_leaderboard([made]), Store(root), SampleShare(**share))
    return found


def test_images_are_those_of_the_questions_and_only_on_request(pictured):
    root, made = pictured
    plain = chunk_of(root, made)
    assert (plain["images"], plain["no_images"]) == ([], None)
    chunk = chunk_of(root, made, images=True)
    for at, sample in enumerate(chunk["runs"][made.id]["samples"]):
        (place,) = sample["images"]
        # The scenes are smaller than a thumbnail, so nothing is lost.
        expected = asked(at).convert("RGB")
        assert max(expected.size) <= THUMBNAIL_SIDE
        assert np.array_equal(np.asarray(opened(chunk["images"][place])), np.asarray(expected))
    # Questions about one image share it.
    assert len(chunk["images"]) == len(set(chunk["images"]))


@pytest.mark.parametrize(
    ("benchmark", "said"),
    [
        ({}, "gqa document 1 differ"),
        ({"tasks": ["pope"], "metrics": {}}, "no document 0 of task gqa"),
        ({"unheard_of": 7}, "are damaged"),
    ],
)
def test_what_is_not_found_again_costs_the_images_and_says_why(tmp_path, benchmark, said):
    made = stored(tmp_path, [image_hash([asked(0)]), "1" * 64], **benchmark)
    chunk = chunk_of(tmp_path, made, images=True)
    assert said in chunk["no_images"]
    assert chunk["images"] == []
    assert len(chunk["runs"][made.id]["samples"]) == 2


def test_no_record_can_make_the_code_of_tasks_run(tmp_path):
    """A stranger's record that names task files with code, and says that they are trusted."""
    proof = tmp_path / "ran"
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "evil.py").write_text(f"open({str(proof)!r}, 'w')\ndef words(doc): return 'x'\n")
    (tasks / "evil.yaml").write_text(
        "task: evil\ndataset_path: json\noutput_type: generate_until\ntest_split: train\n"
        "doc_to_text: !function evil.words\ndoc_to_target: x\n"
    )
    made = stored(
        tmp_path, ["1" * 64], harness="lm_eval", tasks=["evil"], include=[str(tasks)],
        trust_code=True, metrics={}, suite="real",
    )  # fmt: skip
    found, reason = thumbnails(
        made, [{"image_hash": "1" * 64, "task": "evil", "doc_id": 0}], PlanCache()
    )
    assert found == {}
    assert "trust_code" in reason
    assert not proof.exists()


def classified(root, fingerprint):
    """One run of a classifier on the embedded digits."""
    benchmark = compose_run_config(["model=micro_resnet", "benchmark=images"]).benchmark
    made = record(0)
    made = made.model_copy(update={
        "config": made.config | {"benchmark": benchmark.model_dump(mode="json")},
        "metrics": (metric("digits", 1.0, "acc", 2),),
        "provenance": {"data": {"digits": {"fingerprint": fingerprint}}},
    })  # fmt: skip
    rows = [{"task": "digits", "doc_id": at, "target": "0", "prediction": "0", "acc": 1.0}
            for at in range(2)]  # fmt: skip
    Store(root).write(made, rows, "")
    return made


def test_images_of_a_classifier_are_checked_by_their_data_set(tmp_path):
    digits = load_digit_images().test
    made = classified(tmp_path, digits.fingerprint())
    chunk = chunk_of(tmp_path, made, images=True)
    assert chunk["no_images"] is None
    for at, sample in enumerate(chunk["runs"][made.id]["samples"]):
        (place,) = sample["images"]
        seen = digits.fetch(torch.tensor([at]), None)[0][0, 0]
        expected = (seen - seen.min()) / (seen.max() - seen.min()) * 255
        shown = np.asarray(opened(chunk["images"][place]).convert("L"), dtype=float)
        assert np.abs(shown - expected.numpy()).max() <= 0.5
    other = chunk_of(tmp_path, classified(tmp_path, "0" * 64), images=True)
    assert "digits document" in other["no_images"]
    assert other["images"] == []


def test_a_photograph_is_small_and_upright():
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (600, 900, 3), dtype=np.uint8))
    exif = photo.getexif()
    exif[274] = 6  # stored lying: to be turned by 90 degrees
    out = io.BytesIO()
    photo.save(out, "jpeg", exif=exif)
    uri = _data_uri(Image.open(out))
    assert uri.startswith("data:image/jpeg;base64,")
    assert opened(uri).size == (160, 240)


@pytest.mark.broad
def test_the_page_shows_them_with_a_name(visit, pictured, tmp_path, capsys):
    root, made = pictured
    out = tmp_path / "r.html"
    command = ["report", "--images", "--results-dir", str(root), "--out", str(out)]
    assert main(command) == 0
    page = visit(out).open(f"#/run/{made.id}")
    images = page.locator(".sample img")
    images.first.wait_for()
    assert images.count() == 3
    shown = page.get_by_role("img", name="image 1 of gqa #0")
    shown.scroll_into_view_if_needed()
    drawn = "() => [...document.querySelectorAll('.sample img')].every(one => one.naturalWidth)"
    page.wait_for_function(drawn)
    without = write_report(root, tmp_path / "plain.html").path
    page = visit(without).open(f"#/run/{made.id}")
    page.wait_for_selector(".sample")
    assert page.locator(".sample img").count() == 0
