"""MathQA of the world: small word problems over pairs of numbers that training never has."""

import random
from functools import cache
from typing import NamedTuple

from bench.data.synthetic import Split
from bench.data.synthetic.world.entities import entities_of_split
from bench.data.synthetic.world.questions import DrawContext, WorldQuestion, insert_answer
from bench.data.synthetic.world.vocabulary import GOODS

_TEST_BUCKETS = 4
_OPTION_OFFSETS = (-21, -16, -12, -9, -6, -4, 4, 6, 9, 12, 16, 21)


class Operation(NamedTuple):
    """An arithmetic operation, the ranges of its operands, and its wordings."""

    name: str
    sign: str
    category: str
    numbers: tuple[range, range]
    forms: tuple[str, ...]


OPERATIONS = (
    Operation(
        "add", "+", "gain", (range(2, 26), range(2, 26)),
        ("now {name} has {x} {goods} and gets {y} more . how many {goods} does {name} have now ?",
         "there are {x} {goods} in one box and {y} in another . how many {goods} in all ?",
         "today {name} found {x} {goods} and bought {y} {goods} . what is the total ?"),
    ),
    Operation(
        "subtract", "-", "loss", (range(2, 26), range(2, 26)),
        ("once {name} had {x} {goods} and gave away {y} . how many {goods} are left ?",
         "of {x} {goods} in the shop , {y} were sold . how many {goods} remain ?",
         "today {name} counted {x} {goods} but lost {y} . how many does {name} still have ?"),
    ),
    Operation(
        "multiply", "*", "general", (range(2, 7), range(2, 11)),
        ("there are {x} boxes with {y} {goods} in each . how many {goods} are there ?",
         "each time {name} buys {y} {goods} on each of {x} days . how many {goods} is that ?",
         "each of {x} people has {y} {goods} . how many {goods} do they have together ?"),
    ),
)  # fmt: skip


@cache
def is_test_pair(x: int, y: int) -> bool:
    """Tell whether an unordered pair of numbers is held out for the test."""
    # Drawn from the text of the sorted pair, so that 3 + 7, 7 - 3 and 7 * 3 are in the same split,
    # whatever the order of generation. A model that learned 3 + 7 in training would otherwise know
    # the test's 7 + 3.
    low, high = sorted((x, y))
    return random.Random(f"pair {low} {high}").randrange(_TEST_BUCKETS) == 0


def apply_operation(operation: str, x: int, y: int) -> int:
    """Return the result of an operation on two numbers."""
    return {"add": x + y, "subtract": x - y, "multiply": x * y}[operation]


def draw_operands(rng: random.Random, operation: Operation, split: Split) -> tuple[int, int]:
    """Draw two operands of a split; a difference is always positive."""
    # Rejection leaves the operands of a split uniformly distributed.
    while True:
        x, y = (rng.choice(values) for values in operation.numbers)
        if is_test_pair(x, y) != (split == "test"):
            continue
        if operation.name != "subtract" or x != y:
            return (max(x, y), min(x, y)) if operation.name == "subtract" else (x, y)


def ask_mathqa(draw: DrawContext) -> WorldQuestion:
    """Ask a word problem of one operation."""
    rng = draw.rng
    operation = rng.choice(OPERATIONS)
    x, y = draw_operands(rng, operation, draw.split)
    name = rng.choice(entities_of_split(draw.world.people, draw.split)).name
    problem = rng.choice(operation.forms).format(x=x, y=y, name=name, goods=rng.choice(GOODS))
    answer, slot = apply_operation(operation.name, x, y), draw.number % 5
    options = insert_answer(str(answer), [str(n) for n in _wrong_options(rng, x, y, answer)], slot)
    document = {
        "Problem": problem,
        "Rationale": f"{x} {operation.sign} {y} = {answer} . answer {'abcde'[slot]}",
        "options": " , ".join(f"{c} ) {n}" for c, n in zip("abcde", options, strict=True)),
        "correct": "abcde"[slot],
        "annotated_formula": f"{operation.name}({x}, {y})",
        "linear_formula": f"{operation.name}(n0,n1)|",
        "category": operation.category,
    }
    return WorldQuestion(tuple(sorted((x, y))), problem, document)


def _wrong_options(rng: random.Random, x: int, y: int, answer: int) -> list[int]:
    # Wrong options are results of the remaining operations and numbers near the correct one. All
    # have as many digits as the correct one, and the number of options below it is drawn first, so
    # that neither length nor rank gives the answer away.
    same_length = range(1, 10) if answer < 10 else range(10, 100)
    mistakes = {abs(x - y), x + y, x * y} | {answer + step for step in _OPTION_OFFSETS}
    pool = sorted((mistakes & set(same_length) if answer >= 10 else set(same_length)) - {answer})
    below, above = [n for n in pool if n < answer], [n for n in pool if n > answer]
    count = rng.randint(max(0, 4 - len(above)), min(4, len(below)))
    return rng.sample(below, count) + rng.sample(above, 4 - count)
