"""Questions whose images or logits give no answer are named, before scoring where that is cheap."""

import copy
import io
import json
import math
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from bench.data.synthetic.scenes import documents, scene_images
from bench.errors import UserError
from bench.evaluation import BenchmarkConfig, evaluate, plan
from bench.evaluation.multimodal import planned_tasks

BACKENDS = ("prefix_sharing", "padded")


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def pope(count=6):
    """Questions of which the first ones share an image."""
    return [dict(row) for row in documents("pope")[:count]]


def write(path, rows, image_type=True):
    rows = [
        row | {"image": png(row["image"])} if isinstance(row.get("image"), Image.Image) else row
        for row in rows
    ]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(str(path))
    return path


def config(path, task="pope", **options):
    options = {"metrics": {task: "pope_accuracy"} if task == "pope" else {}} | options
    return BenchmarkConfig(
        name="b", harness="lmms_eval", tasks=(task,), data={task: str(path)}, **options
    )


def planned(path, task="pope", **options):
    return plan(config(path, task, **options), offline=True)


TRUNCATED = {"bytes": png(Image.effect_noise((64, 64), 9))["bytes"][:600], "path": None}
UNFIT = {
    "missing": (None, "it has no image in column 'image'"),
    "truncated": (TRUNCATED, "its image cannot be opened"),
    "400 megapixels": (png(Image.new("1", (20000, 20000))), "DecompressionBombError"),
    "16-bit grey": (
        png(Image.fromarray(np.full((8, 8), 9000, dtype=np.uint16))), "would be clipped at 255"
    ),
    "no image": ({"bytes": b"text", "path": None}, "UnidentifiedImageError"),
}  # fmt: skip


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", UNFIT)
def test_an_unfit_image_is_named_before_scoring_and_counted_if_allowed(llava, tmp_path, kind):
    rows, (image, reason) = pope(), UNFIT[kind]
    rows[2]["image"] = image
    path = write(tmp_path / "pope.parquet", rows)
    with pytest.raises(UserError) as refused:
        planned(path)
    message = str(refused.value)
    assert "1 of 6 rows have no answer" in message and "(row 2)" in message and reason in message
    assert message.endswith("by benchmark.allow_missing, now 0")
    found = evaluate(llava, planned(path, allow_missing=0.5))
    assert reason in found.samples[2]["missing"] and found.samples[2]["pope_accuracy"] is None
    assert found.samples[2]["image_hash"] is None


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("task", "column", "absent"),
    [("pope", "answer", None), ("pope", "answer", ""), ("scienceqa_img", "answer", -1),
     ("scienceqa_img", "answer", 9), ("textvqa_val", "answers", []), ("pope", "answer", " "),
     ("textvqa_val", "answers", ["", " "]), ("pope", "answer", "-1")],
)  # fmt: skip
def test_a_question_without_its_answer_is_named(tmp_path, task, column, absent):
    """As in the test splits of the hub."""
    rows = [dict(row) for row in documents(task.removesuffix("_val"))[:4]]
    rows[1][column] = absent
    path = write(tmp_path / "rows.parquet", rows)
    with pytest.raises(
        UserError, match=r"1 of 4 rows have no answer: the row has no label \(row 1"
    ):
        planned(path, task, allow_missing=0.9)


@pytest.mark.sample(2)
@pytest.mark.parametrize("absent", [math.nan, -1.0, 5.0, 0.5])
def test_an_index_of_a_choice_may_be_a_whole_float_and_no_other(tmp_path, absent):
    rows = [dict(row) for row in documents("scienceqa_img")[:4]]
    right = [row["answer"] for row in rows]
    for row in rows:
        row["answer"] = float(row["answer"])
    task = planned(write(tmp_path / "whole.parquet", rows), "scienceqa_img").harness.tasks[0]
    assert task.task.dataset[task.split]["answer"][:] == right
    rows[2]["answer"] = absent
    with pytest.raises(UserError, match=r"1 of 4 rows .* the row has no label \(row 2\)"):
        planned(write(tmp_path / "rows.parquet", rows), "scienceqa_img", allow_missing=0.9)


def test_an_answer_to_yes_or_no_that_is_neither_is_named(tmp_path):
    rows = pope()
    rows[3]["answer"] = "maybe"
    with pytest.raises(UserError, match=r"its answer 'maybe' is neither 'yes' nor 'no' \(row 3\)"):
        planned(write(tmp_path / "rows.parquet", rows))


def test_ten_empty_answers_are_no_label():
    answers = [{"answer": "", "answer_id": number} for number in range(10)]
    assert planned_tasks._label_fault("vqav2_val", {"answers": answers})
    answers[4]["answer"] = "red"
    assert not planned_tasks._label_fault("vqav2_val", {"answers": answers})


@pytest.mark.sample(1)
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_the_check_before_scoring_it_is_a_gap(llava, tmp_path, monkeypatch, backend):
    """As for images of the hub, which are not all decoded beforehand."""
    monkeypatch.setattr(planned_tasks, "_refuse_unfit_rows", lambda *_: None)
    rows = pope()
    plain = evaluate(llava, planned(write(tmp_path / "a.parquet", rows), backend=backend))
    rows[1]["image"] = TRUNCATED
    path = write(tmp_path / "b.parquet", rows)
    found = evaluate(llava, planned(path, backend=backend))
    assert {m.value for m in found.metrics} == {None} and found.missing[0].scope == "pope"
    answers = [row["response"] for row in plain.samples]
    assert [row["response"] for row in found.samples] == [answers[0], "", *answers[2:]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_placeholder_in_a_question_places_the_image_or_is_counted(llava, tmp_path, backend):
    rows = pope()
    rows[0]["question"] = "Is there an <image> tag in the image?"
    rows[3]["question"] = "<image> and <image>?"
    path = write(tmp_path / "pope.parquet", rows)
    found = evaluate(llava, planned(path, backend=backend, allow_missing=0.9))
    assert found.samples[0]["prompt"].count("<image>") == 1
    assert not found.samples[0]["missing"] or "empty" in found.samples[0]["missing"]
    assert "contains <image> 2 times" in found.samples[3]["missing"]


def with_network(model, change):
    network = copy.deepcopy(model.network)
    with torch.no_grad():
        change(network)
    return replace(model, network=network)


@pytest.mark.sample(1)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_that_are_not_finite_are_no_answer(llava, tmp_path, backend):
    rows = pope()
    rows[1]["question"] = "Is there a ~ in the image?"
    path = write(tmp_path / "pope.parquet", rows)
    before = evaluate(llava, planned(path, backend=backend)).samples
    token = llava.tokenizer.convert_tokens_to_ids("~")

    def hole(network):
        network.get_input_embeddings().weight[token].fill_(math.nan)

    found = evaluate(with_network(llava, hole), planned(path, backend=backend))
    reasons = [row["missing"] for row in found.samples]
    assert reasons[1] == "the logits are not finite"
    # The token may also come up in an answer; every other answer is as before.
    for old, new in zip(before, found.samples, strict=True):
        if new["missing"] != "the logits are not finite":
            assert (new["response"], new["missing"]) == (old["response"], old["missing"])
    ruined = with_network(llava, lambda network: network.lm_head.weight.fill_(math.nan))
    gone = evaluate(ruined, planned(path, backend=backend))
    assert {m.value for m in gone.metrics} == {None}
    assert "6 of 6 rows have no answer: the logits are not finite" in gone.missing[0].reason


def test_an_empty_answer_is_counted(llava, tmp_path):
    path = write(tmp_path / "pope.parquet", pope())

    def silent(network):
        # Every logit but that of the end token is low.
        network.lm_head.weight.fill_(0)
        network.lm_head.bias = torch.nn.Parameter(torch.zeros(network.lm_head.out_features))
        network.lm_head.bias[2] = 5

    found = evaluate(with_network(llava, silent), planned(path))
    assert "6 of 6 rows have no answer: the generated text is empty" in found.missing[0].reason


def test_questions_scored_together_are_missing_together(llava, tmp_path):
    rows = [dict(row) for row in documents("mme")[:8]]
    rows[2]["image"] = TRUNCATED
    path = write(tmp_path / "mme.parquet", rows)
    unit = (rows[2]["category"], rows[2]["question_id"])
    together = [i for i, r in enumerate(rows) if (r["category"], r["question_id"]) == unit]
    assert len(together) == 2
    found = evaluate(llava, planned(path, "mme", allow_missing=0.9))
    lost = {row["doc_id"]: row["missing"] for row in found.samples if row["missing"]}
    assert set(together) <= lost.keys()
    assert "scored together" in lost[(set(together) - {2}).pop()]


def test_a_document_that_names_no_image_of_the_file_is_named(llava, tmp_path):
    documents_of = [dict(row) for row in documents("gqa")[:4]]
    write(tmp_path / "testdev_balanced_instructions.parquet", documents_of)
    images = [dict(row) for row in scene_images("gqa")]
    images = [row for row in images if row["id"] != documents_of[0]["imageId"]]
    write(tmp_path / "testdev_balanced_images.parquet", images)
    with pytest.raises(UserError, match=f"no image is named {documents_of[0]['imageId']!r}"):
        planned(tmp_path, "gqa")


def test_answers_read_from_a_journal_keep_their_reason(llava):
    from bench.evaluation.evidence import Seen
    from bench.evaluation.multimodal.adapter import _answer_fields, _answer_of
    from bench.evaluation.multimodal.generation import Answer

    class Fixed:
        def run(self, _):
            return [
                Answer(None, "", None, Seen(0, 0, unanswered="why")),
                Answer("a", "b", "c", Seen(9, 1)),
            ]

    fields = json.loads(json.dumps(_answer_fields(Fixed(), [None, None])))
    assert [_answer_of(each) for each in fields] == Fixed().run(None)
