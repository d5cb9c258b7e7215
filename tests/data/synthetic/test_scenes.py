"""The drawn scenes: fair tasks in the very schemas that lmms-eval's own task files read."""

import importlib
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import lmms_eval
import numpy as np
import pytest
import yaml

from bench.data.synthetic.scenes import (
    balance,
    question_kinds,
    question_sets,
    scene,
    tasks,
    training_conversations,
)
from bench.data.synthetic.scenes.balance import MAX_QUESTIONS_PER_IMAGE
from bench.data.synthetic.scenes.scene import DrawnDigit, DrawnShape, generate_scene
from bench.data.synthetic.scenes.scene import draw_scene as draw
from bench.data.synthetic.scenes.training_conversations import draw_conversation
from bench.errors import UserError

TASK_FILES = {
    "gqa": "gqa/gqa.yaml",
    "vqav2": "vqav2/vqav2_val.yaml",
    "scienceqa_img": "scienceqa/scienceqa_img.yaml",
    "textvqa": "textvqa/textvqa_val.yaml",
    "pope": "pope/pope.yaml",
    "mme": "mme/mme.yaml",
    "mmbench_en": "mmbench/mmbench_en_dev_static.yaml",
}
FINGERPRINTS = {
    "gqa": "4920e161b53685677a845d15f0782b79384fb8f7f7b8896307c90a09014a8c7d",
    "vqav2": "689f81ba229dc44d7b4819d493b0fc826c4f635231e6826b257e31fe5f7f1cee",
    "scienceqa_img": "5a602cba2837a6d5f028a62ee4b15422cd945967b22c467ef55b4935199e7917",
    "textvqa": "8b13708146b764515585044d9d62a4d7d080af9cd933ea70d0e24d470e30406e",
    "pope": "24c30a372c73b83df082534c2edf0a2e4ee1c903c889d53764e166558ec17d6a",
    "mme": "fb44850759228ca954277baa4da4b731be1100bae93d1fc07ac505c7a1fc181d",
    "mmbench_en": "011c6739d8067149184132417d3006a5d21e911e879b32c99f7db8b2bf91928c",
}
each_task = pytest.mark.parametrize("task", question_sets.TASKS)
Document = dict[str, Any]


class _Names(yaml.SafeLoader):
    """Reads `!function module.name` as its name."""


_Names.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@cache
def harness(task: str) -> tuple[dict[str, Any], Callable[[str], Any]]:
    """Lmms-eval's own task file, and the functions that it names."""
    file = Path(lmms_eval.__file__).parent / "tasks" / TASK_FILES[task]
    config: dict[str, Any] = yaml.load(file.read_text(), _Names)
    if "include" in config:
        included = (file.parent / config["include"]).read_text()
        config = yaml.load(included, _Names) | config

    def function(key: str) -> Any:
        module, name = config[key].split(".")
        return getattr(
            importlib.import_module(f"lmms_eval.tasks.{file.parent.name}.{module}"), name
        )

    return config, function


@cache
def rows(task: str) -> tuple[Document, ...]:
    return tuple(question_sets.documents(task))


@cache
def placed(task: str) -> tuple[balance.PlacedQuestion, ...]:
    made = tasks.SCENE_TASKS[task]
    return tuple(made.placed("test", 100_000 * question_sets.TASKS.index(task)))


def score(task: str, document: Document, said: str) -> float:
    """Score one answer with the task's own process_results; GQA has none, it matches words."""
    if task == "gqa":
        return float(said.lower() == document["answer"].lower())
    if task == "mmbench_en":
        row = harness(task)[1]("process_results")(document, [said])["submission"]
        return float(row["prediction"] == row["answer"])
    result = harness(task)[1]("process_results")(document, [said])
    key = {"pope": "pope_accuracy", "mme": next(iter(result))}.get(task, "exact_match")
    return float(result[key]["score"] if isinstance(result[key], dict) else result[key])


@each_task
def test_prompts_are_those_of_the_harness(task: str) -> None:
    config, function = harness(task)
    settings = config["lmms_eval_specific_kwargs"]["default"]
    for document in question_sets.documents(task):
        assert tasks.render_task_prompt(task, document)[0] == function("doc_to_text")(
            document, settings
        )


def test_ocr_tokens_are_given_as_the_harness_gives_them() -> None:
    config, function = harness("textvqa")
    settings = config["lmms_eval_specific_kwargs"]["default"] | {"ocr": True}
    for document in question_sets.documents("textvqa")[:50]:
        prompt, _ = tasks.render_task_prompt("textvqa", document, ocr=True)
        assert prompt == function("doc_to_text")(document, settings)


@pytest.mark.sample(3)
@each_task
def test_right_answers_score_one_and_others_nothing(task: str) -> None:
    for document, again in list(zip(question_sets.documents(task), rows(task), strict=True))[:60]:
        right = tasks.render_task_prompt(task, again)[1]
        wrong = next(said for said in ("no", "A", "B") if said.lower() != right.lower())
        assert score(task, document, right) == 1.0
        assert score(task, document, wrong) == 0.0


@each_task
def test_images_are_those_of_the_harness(task: str) -> None:
    documents = question_sets.documents(task)[:3]
    if task == "gqa":
        by_id = {row["id"]: row["image"] for row in question_sets.scene_images("gqa")}
        documents = [document | {"image": by_id[document["imageId"]]} for document in documents]
    for document in documents:
        (image,) = harness(task)[1]("doc_to_visual")(document)
        assert image.size == (scene.IMAGE_SIZE, scene.IMAGE_SIZE)
        assert image.mode == "RGB"


def test_every_image_of_gqa_is_there_once() -> None:
    names = [row["id"] for row in question_sets.scene_images("gqa")]
    assert len(set(names)) == len(names)
    assert set(names) == {document["imageId"] for document in rows("gqa")}


def test_mme_asks_two_questions_an_image_one_of_each_answer() -> None:
    module = importlib.import_module("lmms_eval.tasks.mme.utils")
    groups = defaultdict(list)
    for document in rows("mme"):
        groups[document["question_id"]].append(document)
    for pair in groups.values():
        assert [document["answer"] for document in pair] == ["Yes", "No"]
        assert pair[0]["image"].tobytes() == pair[1]["image"].tobytes()
    results = [
        result
        for document in rows("mme")
        for key, result in module.mme_process_results(document, [document["answer"]]).items()
        if key == "mme_perception_score"
    ]
    assert module.mme_aggregate_results(results) == 5 * 200


def test_mmbench_turns_its_options_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = defaultdict(list)
    for document in rows("mmbench_en"):
        groups[document["index"] % tasks.ROTATION_OFFSET].append(document)
    for turns in groups.values():
        assert [turn["answer"] for turn in turns] != ["A"] * 4
        assert Counter(turn["answer"] for turn in turns) == Counter("ABCD")
        assert len({turn[turn["answer"]] for turn in turns}) == 1
    module = importlib.import_module("lmms_eval.tasks.mmbench.en_utils")
    said = [dict(document) for document in question_sets.documents("mmbench_en")]
    results = [module.mmbench_process_results(d, [d["answer"]])["gpt_eval_score"] for d in said]
    overall, *_ = module.mmbench_evaluator.eval_result(results, eval_method="static")
    assert overall == 1.0
    results[0] = module.mmbench_process_results(said[0], ["E"])["gpt_eval_score"]
    overall, *_ = module.mmbench_evaluator.eval_result(results, eval_method="static")
    assert overall == pytest.approx(1 - 4 / len(said))


def test_pope_has_its_three_categories_each_half_yes() -> None:
    counts = Counter((document["category"], document["answer"]) for document in rows("pope"))
    assert set(counts) == {
        (c, a) for c in ("random", "popular", "adversarial") for a in ("yes", "no")
    }
    assert set(counts.values()) == {60}


def test_an_adversarial_object_has_both_its_parts_in_the_image() -> None:
    for each in placed("pope"):
        color, shape = each.question.subject
        there = [(thing.color, thing.shape) for thing in each.scene.shapes]
        assert ((color, shape) in there) == (each.question.answer == "yes")
        if each.question.kind == "adversarial":
            assert color in {c for c, _ in there}
            assert shape in {s for _, s in there}


@each_task
def test_text_tells_nothing_about_the_answer(task: str) -> None:
    """The oracle: the best constant answer to each text, counted, is the stated chance."""
    counts = defaultdict(Counter)
    for each in placed(task):
        question = each.question
        counts[question.kind, question.text][question.answer] += 1
    for (kind, _), answers in counts.items():
        assert set(answers) == set(question_kinds.KINDS[kind].answers)
        assert len(set(answers.values())) == 1
    if tasks.SCENE_TASKS[task].max_choices is None:
        best = sum(max(answers.values()) for answers in counts.values())
        assert best / len(placed(task)) == pytest.approx(question_sets.chance_accuracy(task))
    assert 0.1 <= question_sets.chance_accuracy(task) <= 0.5


def test_places_of_right_choices_are_balanced() -> None:
    by_length = defaultdict(Counter)
    for document in rows("scienceqa_img"):
        by_length[len(document["choices"])][document["answer"]] += 1
    for length, counts in by_length.items():
        assert len(counts) == length
        assert max(counts.values()) < 1.4 * min(counts.values())


@each_task
def test_sizes(task: str) -> None:
    assert 280 <= len(rows(task)) <= 400
    asked = Counter(each.scene.index for each in placed(task))
    assert max(asked.values()) <= MAX_QUESTIONS_PER_IMAGE


@each_task
def test_answers_are_true(task: str) -> None:
    """A second, plain reading of the scene agrees for the kinds that one line can check."""
    for each in placed(task):
        question, cells = each.question, each.scene.cells
        shapes = [thing for thing in cells if isinstance(thing, DrawnShape)]
        digits = [thing.value for thing in cells if isinstance(thing, DrawnDigit)]
        subject = question.subject
        if question.kind == "color":
            assert [t.color for t in shapes if t.shape == subject[0]] == [question.answer]
        elif question.kind.startswith("count"):
            named = [t for t in shapes if subject[0] in (t.shape, t.color)]
            assert len(named) == int(question.answer)
        elif question.kind == "number":
            assert digits == [question.answer]
        elif question.kind == "number_at":
            assert question.answer in digits
        elif question.kind in ("sideways", "upright"):
            places = [
                next(i for i, t in enumerate(cells) if t and name in t.name.split())
                for name in subject
            ]
            (row, column), (other_row, other_column) = (divmod(i, 3) for i in places)
            first = column < other_column if question.kind == "sideways" else row < other_row
            assert question.answer in (("left", "above") if first else ("right", "below"))


def test_splits_are_disjoint() -> None:
    train = [draw_conversation("train", 0, number).image.tobytes() for number in range(50)]
    test = [draw_conversation("test", 0, number).image.tobytes() for number in range(50)]
    assert not set(train) & set(test)
    for split, allowed in (("train", range(1200)), ("test", range(1200, 1797))):
        samples = {d.sample for i in range(500) for d in generate_scene(split, i).digits}  # type: ignore[arg-type]
        assert samples <= set(allowed)
        assert len(samples) > 100


def test_a_task_has_other_images_than_another() -> None:
    seen = [{each.scene.index for each in placed(task)} for task in question_sets.TASKS]
    assert len(set.union(*seen)) == sum(map(len, seen))


def test_pixels_show_what_the_scene_says() -> None:
    for index in range(30):
        place = generate_scene("test", index)
        pixels = np.asarray(draw(place)).astype(int)
        for number, thing in enumerate(place.cells):
            row, column = divmod(number, 3)
            cell = pixels[8 + 16 * row : 24 + 16 * row, 8 + 16 * column : 24 + 16 * column]
            colored = ((cell.max(axis=-1) - cell.min(axis=-1)) > 40).mean()
            assert (colored > 0.08) == isinstance(thing, DrawnShape)
            if isinstance(thing, DrawnShape):
                assert (colored > 0.28) or thing.size == "small" or thing.shape == "cross"


@each_task
def test_fingerprint_is_pinned_and_covers_pixels(task: str) -> None:
    assert question_sets.fingerprint(task) == FINGERPRINTS[task]


@pytest.mark.broad
def test_fingerprint_is_the_same_in_another_process() -> None:
    code = "from bench.data.synthetic import scenes; print(scenes.fingerprint('mmbench_en'))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert output.stdout.decode().strip() == FINGERPRINTS["mmbench_en"]


def test_rows_are_new_each_time() -> None:
    first = question_sets.documents("vqav2")[0]
    first["answers"][0]["answer"] = "something else"
    assert question_sets.documents("vqav2")[0]["answers"][0]["answer"] != "something else"


def test_conversations_follow_from_their_seed() -> None:
    once, again = (training_conversations.draw_conversations("train", 3, seed=5) for _ in range(2))
    other = training_conversations.draw_conversations("train", 3, seed=6)
    assert [each.turns for each in once] == [each.turns for each in again]
    assert [each.turns for each in once] != [each.turns for each in other]
    image, turns = once[0]
    assert image.size == (64, 64)
    assert len(turns) == 7
    assert turns[-1][1].count(",") == 8


def test_a_lesson_about_digits_has_them_in_its_scenes() -> None:
    spec = training_conversations.ConversationSpec(
        turns=1, extra_turns=1, extra_kinds=("number_at",), min_digits=(0, 2)
    )
    said = [
        training_conversations.draw_conversation("train", 0, number, spec) for number in range(40)
    ]
    described = [conversation.turns[-1][1].count("number") for conversation in said]
    assert min(described[0::2]) < 2 <= min(described[1::2])
    assert said[0] == training_conversations.draw_conversation(
        "train", 0, 0, replace(spec, min_digits=(0,))
    )


def test_wrong_names_are_one_sentence() -> None:
    with pytest.raises(UserError, match="none of the scene tasks"):
        question_sets.documents("vqa")
    with pytest.raises(UserError, match="only gqa has"):
        question_sets.scene_images("pope")
