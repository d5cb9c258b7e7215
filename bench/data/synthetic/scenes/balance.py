"""Balanced question sets: the text of a question does not predict its answer.

Every wording of a kind occurs equally often with each answer of the kind. The best text-only
accuracy is therefore known exactly: one over the number of answers.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

from bench.data.synthetic import Split
from bench.data.synthetic.scenes.question_kinds import KINDS, SceneQuestion, Subject
from bench.data.synthetic.scenes.scene import Scene, generate_scene

MAX_QUESTIONS_PER_IMAGE = 4  # a limit, so that a set of questions covers many images
_MAX_SCENES_SEARCHED = 10_000


@dataclass(frozen=True)
class PlacedQuestion:
    """A question about a scene, with the scene."""

    scene: Scene
    question: SceneQuestion


def balanced_questions(kinds: Mapping[str, int], split: Split, start: int) -> list[PlacedQuestion]:
    """Return each wording of each kind `kinds[name]` times with each answer.

    Scenes are searched in order from index `start`; `MAX_QUESTIONS_PER_IMAGE` share one at most.
    """
    # Greedy: each scene fills the open quotas that it can, and the search ends when all are filled.
    quotas = Counter(
        {
            (name, subject, answer): times
            for name, times in kinds.items()
            for subject in KINDS[name].subjects
            for answer in KINDS[name].answers
        }
    )
    found: list[PlacedQuestion] = []
    for scene in _scenes_from(split, start):
        found += [
            PlacedQuestion(scene, question) for question in _fill_quotas(scene, kinds, quotas)
        ]
        if not quotas.total():
            return found
    raise AssertionError("unreachable")


def _fill_quotas(
    scene: Scene, kinds: Mapping[str, int], quotas: Counter[tuple[str, Subject, str]]
) -> Iterator[SceneQuestion]:
    """Yield the wanted questions that one scene answers, with distinct texts; update `quotas`."""
    questions = [question for name in kinds for question in KINDS[name].ask(scene)]
    # Shuffled, or the kinds that come first would take all places of a scene. The seed is a string:
    # `random` hashes it with SHA-512, so the order does not depend on PYTHONHASHSEED.
    random.Random(f"questions {scene.split} {scene.index}").shuffle(questions)
    texts: set[str] = set()
    for question in questions:
        key = (question.kind, question.subject, question.answer)
        # Two kinds can share a template (POPE's three do): asking one text twice about an image
        # would weight its answer double.
        if quotas[key] and question.text not in texts and len(texts) < MAX_QUESTIONS_PER_IMAGE:
            quotas[key] -= 1
            texts.add(question.text)
            yield question


def question_pairs(
    kind: str, times: int, split: Split, start: int
) -> list[tuple[PlacedQuestion, PlacedQuestion]]:
    """Return pairs of questions about one scene, the first answered yes and the second no.

    Every wording is `times` times the first and `times` times the second of a pair.
    """
    subjects = KINDS[kind].subjects
    # A cyclic shift pairs each subject with a different one and uses each once on either side; the
    # shift varies with the round, so that repeated rounds give new pairs as long as there are any.
    plan = [
        (subject, subjects[(i + 1 + shift % (len(subjects) - 1)) % len(subjects)])
        for shift in range(times)
        for i, subject in enumerate(subjects)
    ]
    found: list[tuple[PlacedQuestion, PlacedQuestion]] = []
    for scene in _scenes_from(split, start):
        questions = {question.subject: question for question in KINDS[kind].ask(scene)}
        answers = {subject: question.answer for subject, question in questions.items()}
        for pair in plan:
            if [answers.get(subject) for subject in pair] == ["yes", "no"]:
                # Changing the list while iterating is safe because the loop ends here: one pair
                # per scene, as MME has two questions per image.
                plan.remove(pair)
                first, second = (PlacedQuestion(scene, questions[subject]) for subject in pair)
                found.append((first, second))
                break
        if not plan:
            return found
    raise AssertionError("unreachable")


def _scenes_from(split: Split, start: int) -> Iterator[Scene]:
    # Without the bound, a kind whose `find` never gives one of its answers would loop forever.
    for index in count(start):
        if index - start > _MAX_SCENES_SEARCHED:
            raise ValueError(
                f"no scene among {_MAX_SCENES_SEARCHED} answers the questions still wanted"
            )
        yield generate_scene(split, index)
