"""Training conversations of the small vision-language model: questions about drawn scenes."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from bench.data.chat import Conversation
from bench.data.synthetic import Split
from bench.data.synthetic.scenes import tasks
from bench.data.synthetic.scenes.question_kinds import KINDS, SceneQuestion
from bench.data.synthetic.scenes.scene import Scene, draw_scene, generate_scene

# Conversation `number` of seed s starts from scene 10^7 * (s + 1) + number, beyond the scenes of
# all tasks (7 ranges of 10^5). Further candidates follow at steps of 10^12, so that two
# conversations never use the same scene.
_SCENES_PER_SEED = 10_000_000
_RETRY_STEP = 10**12


@dataclass(frozen=True)
class ConversationSpec:
    """Composition of a conversation about one image.

    - `turns`: number of questions, each of a different kind.
    - `extra_turns`: number of additional questions, each of a different kind in `extra_kinds`.
    - `letter_turns`: number of multiple-choice questions that name their own answer; they teach the
      option letters.
    - `choice_share`: fraction of multiple choice among the questions that are not yes/no.
    - `ocr_share`: fraction of open-ended number questions that include the OCR tokens.
    - `min_digits`: minimum number of digits in the scene; conversations cycle through the values.
    - `describe`: whether a description of all cells ends the conversation.
    """

    turns: int = 6
    extra_turns: int = 0
    extra_kinds: tuple[str, ...] = ()
    letter_turns: int = 0
    choice_share: float = 0.4
    ocr_share: float = 0.15
    min_digits: tuple[int, ...] = (0,)
    describe: bool = True


def draw_conversations(
    split: Split, count: int, seed: int = 0, spec: ConversationSpec = ConversationSpec()
) -> list[Conversation]:
    """Return conversations about `count` scenes, none of which appears in a task."""
    return [draw_conversation(split, seed, number, spec) for number in range(count)]


def draw_conversation(
    split: Split, seed: int, number: int, spec: ConversationSpec = ConversationSpec()
) -> Conversation:
    """Return one conversation, a pure function of its arguments."""
    scene = _scene_with_digits(
        split,
        _SCENES_PER_SEED * (seed + 1) + number,
        spec.min_digits[number % len(spec.min_digits)],
    )
    rng = random.Random(f"conversation {split} {scene.index}")
    questions = _choose_questions(scene, sorted(KINDS), spec.turns, rng)
    # One generator for the whole conversation: the order of these calls is part of the data that
    # the stored weights were trained on.
    if spec.extra_turns:
        questions += _choose_questions(scene, spec.extra_kinds, spec.extra_turns, rng)
    turns = [_question_turn(question, scene, spec, rng) for question in questions]
    turns += [_letter_turn(rng) for _ in range(spec.letter_turns)]
    # Last, because a description before the questions would contain their answers as text.
    if spec.describe:
        turns.append((tasks.DESCRIBE_PROMPT, describe_scene(scene)))
    return Conversation(draw_scene(scene), turns)


def describe_scene(scene: Scene) -> str:
    """Return the names of the things in all cells, in reading order."""
    return ", ".join(thing.name if thing else "empty" for thing in scene.cells)


def _scene_with_digits(split: Split, index: int, digits: int) -> Scene:
    """Return the first scene with at least `digits` digits."""
    found = (generate_scene(split, number) for number in itertools.count(index, _RETRY_STEP))
    return next(scene for scene in found if len(scene.digits) >= digits)


def _choose_questions(
    scene: Scene, kinds: Sequence[str], turns: int, rng: random.Random
) -> list[SceneQuestion]:
    """Draw up to `turns` questions of different kinds."""
    # The answer is drawn before the question: a uniform draw among questions would answer "no" most
    # of the time, since most objects are absent from a scene.
    found: list[SceneQuestion] = []
    for name in rng.sample(kinds, len(kinds)):
        by_answer = defaultdict(list)
        for question in KINDS[name].ask(scene):
            by_answer[question.answer].append(question)
        if by_answer and len(found) < turns:
            found.append(rng.choice(by_answer[rng.choice(sorted(by_answer))]))
    return found


def _question_turn(
    question: SceneQuestion, scene: Scene, spec: ConversationSpec, rng: random.Random
) -> tuple[str, str]:
    # Yes/no questions stay open, since no task offers them as options.
    if "yes" not in question.answers and rng.random() < spec.choice_share:
        return _multiple_choice_turn(question.text, question.answer, question.answers, rng)
    digits = [digit.value for digit in scene.digits]
    shown = digits if question.kind.startswith("number") and rng.random() < spec.ocr_share else []
    return tasks.short_answer_prompt(question.text, shown), question.answer


def _letter_turn(rng: random.Random) -> tuple[str, str]:
    # The letter of a word that the question itself names: learnable without the image.
    kind = KINDS[rng.choice([name for name, kind in KINDS.items() if "yes" not in kind.answers])]
    answer = rng.choice(kind.answers)
    return _multiple_choice_turn(f"Which one is {answer}?", answer, kind.answers, rng)


def _multiple_choice_turn(
    text: str, answer: str, answers: Sequence[str], rng: random.Random
) -> tuple[str, str]:
    # MMBench's format has always four options, ScienceQA's as many as there are.
    choices = tasks.choices_with_answer(answer, answers, rng.randrange(4), rng)
    letter = tasks.OPTION_LETTERS[choices.index(answer)]
    if rng.random() < 0.5 and len(choices) == 4:
        return tasks.mmbench_prompt(text, choices, rng.choice(("nan", tasks.HINT))), letter
    return tasks.scienceqa_prompt(text, choices, rng.choice(("", tasks.HINT))), letter
