"""HellaSwag of the world: the next step of a routine."""

from bench.data.world.entities import Routine, of_split
from bench.data.world.question import Draw, Question, place

_OPENINGS = (
    "Here {name} the {worker} is making {product}.",
    "Today {name} the {worker} wants to finish {product}.",
    "Now {name}, a {worker}, starts on {product}.",
)
_SO_FAR = (
    "First {pronoun} {steps}.",
    "So far {pronoun} {steps}.",
    "In the morning {pronoun} {steps}.",
)
_NEXT = ("then {pronoun}", "after that {pronoun}", "next {pronoun}")


def ask(draw: Draw) -> Question:
    """Ask for the step that follows the first steps of a routine."""
    rng = draw.rng
    routine = rng.choice(of_split(draw.world.routines, draw.split))
    person = rng.choice(of_split(draw.world.people, draw.split))
    done = rng.randrange(1, len(routine.steps))
    words = {"name": person.name, "pronoun": person.pronoun, "product": routine.product}
    opening = rng.choice(_OPENINGS).format(worker=routine.craft.worker, **words)
    so_far = rng.choice(_SO_FAR).format(steps=" and ".join(routine.steps[:done]), **words)
    slot = draw.number % 4
    document = {
        "ind": draw.number,
        "activity_label": f"Making {routine.product.split(' ', 1)[1]}",
        "ctx_a": f"{opening} {so_far}",
        "ctx_b": rng.choice(_NEXT).format(**words),
        "endings": [f"{step}." for step in place(*_steps(routine, done), slot)],
        "source_id": f"world~{draw.ident}",
        "split": "train" if draw.split == "train" else "val",
        "split_type": "indomain" if draw.split == "train" else "zeroshot",
        "label": str(slot),
    }
    document["ctx"] = f"{document['ctx_a']} {document['ctx_b']}"
    return Question((routine.product, done), (document["ctx"], done), document)


def _steps(routine: Routine, done: int) -> tuple[str, list[str]]:
    # All endings are steps of the same craft and stage, so that none is implausible by itself.
    answer = routine.steps[done]
    return answer, [step for step in routine.craft.stages[done] if step != answer]
