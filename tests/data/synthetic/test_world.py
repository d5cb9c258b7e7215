"""The closed world: nine fair tasks, whose test questions are not in the training text."""

import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import lm_eval
import pytest
from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from bench.data.synthetic import Split
from bench.data.synthetic.world import entities, question_sets
from bench.data.synthetic.world.entities import build_world
from bench.data.synthetic.world.question_sets import write_parquet

FIELDS = {
    "boolq": {"question", "passage", "idx", "label"},
    "openbookqa": {"id", "question_stem", "choices", "answerKey"},
    "rte": {"sentence1", "sentence2", "label", "idx"},
    "arc_easy": {"id", "question", "choices", "answerKey"},
    "winogrande": {"sentence", "option1", "option2", "answer"},
    "hellaswag": {
        "ind",
        "activity_label",
        "ctx_a",
        "ctx_b",
        "ctx",
        "endings",
        "source_id",
        "split",
        "split_type",
        "label",
    },
    "arc_challenge": {"id", "question", "choices", "answerKey"},
    "piqa": {"goal", "sol1", "sol2", "label"},
    "mathqa": {
        "Problem",
        "Rationale",
        "options",
        "correct",
        "annotated_formula",
        "linear_formula",
        "category",
    },
}
TASK_FILES = {
    "boolq": "super_glue/boolq/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "rte": "glue/rte/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "piqa": "piqa/piqa.yaml",
    "mathqa": "mathqa/mathqa.yaml",
}
SIDES: tuple[Split, ...] = ("train", "test")
each_task = pytest.mark.parametrize("task", question_sets.TASKS)


@cache
def prompts(task: str, split: Split) -> list[entities.RenderedQuestion]:
    return [
        entities.render_question(task, document)
        for document in question_sets.documents(task, split)
    ]


@cache
def training_text() -> str:
    return "\n".join(question_sets.corpus())


def harness_task(task: str) -> ConfigurableTask:
    """Lm-eval's own task, reading the world instead of the hub."""
    file = Path(lm_eval.__file__).parent / "tasks" / TASK_FILES[task]
    config = load_yaml(file, resolve_func=True, recursive=True)
    splits = {
        name: Dataset.from_list(docs[-50:])
        for name, docs in question_sets.documents_by_split(task).items()
    }
    config["custom_dataset"] = lambda **_: DatasetDict(splits)
    return ConfigurableTask(config=config)


@each_task
def test_documents_have_the_real_schema(task: str) -> None:
    for split in SIDES:
        assert {frozenset(doc) for doc in question_sets.documents(task, split)} == {
            frozenset(FIELDS[task])
        }


@each_task
def test_harness_scores_the_test_side(task: str) -> None:
    harness = harness_task(task)
    scored = harness.test_docs() if harness.has_test_docs() else harness.validation_docs()
    expected = question_sets.documents(task, "test")[-50:]
    assert [{key: doc[key] for key in FIELDS[task]} for doc in scored] == expected


@pytest.mark.sample(3)
@each_task
def test_rendering_is_that_of_the_harness(task: str) -> None:
    harness = harness_task(task)
    docs = harness.test_docs() if harness.has_test_docs() else harness.validation_docs()
    for doc in docs:
        requests = harness.construct_requests(doc, harness.fewshot_context(doc, 0))
        choices = tuple(request.args for request in requests)
        prompt = entities.render_question(task, doc)
        assert prompt.choices == choices
        lengths = tuple(map(len, harness.doc_to_choice(doc)))
        assert prompt.lengths == lengths
        gold = harness.doc_to_text(doc) if harness.multiple_input else harness.doc_to_target(doc)
        assert prompt.gold == int(gold)


def test_same_seed_gives_the_same_world_and_another_seed_another() -> None:
    first = question_sets.fingerprint("boolq")
    other = question_sets.fingerprint("boolq", seed=question_sets.SEED + 1)
    # The last questions drawn are remembered: those of another seed have taken their place.
    assert question_sets.fingerprint("boolq") == first != other
    assert question_sets.fingerprint() != first


@pytest.mark.broad
def test_fingerprint_is_the_same_in_another_process() -> None:
    code = "from bench.data.synthetic import world; print(world.fingerprint())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert output.stdout.decode().strip() == question_sets.fingerprint()


@each_task
def test_questions_differ_from_each_other(task: str) -> None:
    texts = [prompt.text for prompt in prompts(task, "test")]
    assert len(set(texts)) == len(texts) == 400


@each_task
def test_what_the_test_asks_is_never_asked_in_training(task: str) -> None:
    train = {question.subject for question in question_sets.draw_questions(task, "train")}
    test = {question.subject for question in question_sets.draw_questions(task, "test")}
    assert train.isdisjoint(test)


@pytest.mark.sample(2)
@each_task
def test_no_test_question_is_in_the_corpus(task: str) -> None:
    text = training_text()
    for prompt in prompts(task, "test"):
        assert prompt.text not in text
        if task != "winogrande":
            assert prompt.choices[0][0] not in text


def test_entities_of_the_test_are_in_no_training_question() -> None:
    place = build_world(question_sets.SEED)
    held = {person.name for person in place.people if person.split == "test"}
    held |= {substance.name for substance in place.substances if substance.split == "test"}
    for task in question_sets.TASKS:
        for text in question_sets.question_texts(task):
            assert held.isdisjoint(re.findall(r"\w+", text)), text


def test_prose_states_every_fact() -> None:
    place = build_world(question_sets.SEED)
    texts = question_sets.prose_texts(repeats=1)
    for entity in (*place.people, *place.towns, *place.substances):
        name, *facts = (str(v) for k, v in vars(entity).items() if k not in ("split", "pronoun"))
        told = [text for text in texts if re.search(rf"\b{name}\b", text, re.IGNORECASE)]
        assert any(all(fact in text for fact in facts) for text in told), entity
    for routine in place.routines:
        assert any(", then ".join(routine.steps) in text for text in texts)


def test_sums_of_the_prose_are_over_pairs_the_test_does_not_have() -> None:
    asked = {question.subject for question in question_sets.draw_questions("mathqa", "test")}
    worked = re.findall(r"(\d+) [-+*] (\d+) =", "\n".join(question_sets.prose_texts(repeats=4)))
    assert len(worked) > 1000
    assert asked.isdisjoint(tuple(sorted(map(int, pair))) for pair in worked)


@each_task
def test_positions_of_the_answer_are_balanced(task: str) -> None:
    counts = Counter(prompt.gold for prompt in prompts(task, "test"))
    assert max(counts.values()) - min(counts.values()) <= 1


def longest(prompt: entities.RenderedQuestion) -> int:
    return max(range(len(prompt.lengths)), key=prompt.lengths.__getitem__)


def shortest(prompt: entities.RenderedQuestion) -> int:
    return min(range(len(prompt.lengths)), key=prompt.lengths.__getitem__)


@pytest.mark.parametrize("chooser", [longest, shortest])
@each_task
def test_length_does_not_give_the_answer_away(
    task: str, chooser: Callable[[entities.RenderedQuestion], int]
) -> None:
    questions = prompts(task, "test")
    uneven = [prompt for prompt in questions if len(set(prompt.lengths)) > 1]
    right = sum(chooser(prompt) == prompt.gold for prompt in uneven)
    chance = sum(1 / len(prompt.choices) for prompt in uneven)
    assert abs(right - chance) < 0.08 * len(questions)


@each_task
def test_prior_of_the_answers_does_not_give_them_away(task: str) -> None:
    """Choosing whatever was right most often in training, given the choices alone."""
    right, offered = Counter[str](), Counter[str]()
    for prompt in prompts(task, "train"):
        right[_choice(prompt, prompt.gold)] += 1
        offered.update(_choice(prompt, i) for i in range(len(prompt.choices)))
    hits, chance = 0.0, 0.0
    for prompt in prompts(task, "test"):
        priors = [
            (right[choice] + 1) / (offered[choice] + len(prompt.choices))
            for choice in (_choice(prompt, i) for i in range(len(prompt.choices)))
        ]
        best = [i for i, prior in enumerate(priors) if prior == max(priors)]
        hits += (prompt.gold in best) / len(best)
        chance += 1 / len(prompt.choices)
    assert hits - chance < 0.1 * 400


def _choice(prompt: entities.RenderedQuestion, index: int) -> str:
    context, continuation = prompt.choices[index]
    return continuation if len(set(prompt.choices)) > 1 else context


def test_twins_have_opposite_answers() -> None:
    documents = question_sets.documents("winogrande", "test")
    for first, second in zip(documents[::2], documents[1::2], strict=True):
        start = first["sentence"].split("_")[0]
        assert second["sentence"].startswith(start)
        assert first["sentence"] != second["sentence"]
        assert (first["answer"], second["answer"]) == ("1", "2")
        assert (first["option1"], first["option2"]) == (second["option1"], second["option2"])


def test_arithmetic_is_right() -> None:
    signs: dict[str, Callable[[int, int], int]] = {
        "add": lambda x, y: x + y,
        "subtract": lambda x, y: x - y,
        "multiply": lambda x, y: x * y,
    }
    for document in question_sets.documents("mathqa", "test"):
        name, x, y = re.findall(r"\w+", document["annotated_formula"])
        prompt = entities.render_question("mathqa", document)
        assert int(prompt.choices[prompt.gold][1]) == signs[name](int(x), int(y))
        assert len({choice for _, choice in prompt.choices}) == 5


@pytest.mark.broad
def test_data_set_can_be_written(tmp_path: Path) -> None:
    write_parquet(tmp_path, question_sets.SEED)
    for task in question_sets.TASKS:
        for split, documents in question_sets.documents_by_split(task).items():
            path = tmp_path / task / f"{split}.parquet"
            assert Dataset.from_parquet(str(path)).to_list() == documents


@pytest.mark.parametrize("side", SIDES)
def test_a_story_is_about_people_of_its_side(side: Split) -> None:
    place = build_world(question_sets.SEED)
    names = {person.name for person in place.people if person.split == side}
    others = {person.name for person in place.people if person.split != side}
    for seed in range(20):
        words = set(re.findall(r"\w+", question_sets.tell_story(random.Random(seed), place, side)))
        assert words & names
        assert not words & others


def test_documents_and_their_fingerprint_are_one_drawing(monkeypatch):
    drawn, collect = [], question_sets.collect_questions
    monkeypatch.setattr(
        question_sets, "collect_questions", lambda *a: drawn.append(a) or collect(*a)
    )
    question_sets.draw_questions.cache_clear()
    question_sets.documents("piqa", "test")
    question_sets.fingerprint("piqa")
    assert len(drawn) == 1
