"""PIQA of the world: the right one of two tools for a goal."""

from bench.data.world.crafts import MATERIALS, TOOLS
from bench.data.world.entities import of_split
from bench.data.world.question import Draw, Question

_GOALS = (
    "To {job} the {thing},",
    "How do you {job} the {thing}?",
    "Someone wants to {job} the old {thing}.",
    "What is the way to {job} this {thing}?",
)
_SOLUTIONS = ("use the {tool}.", "reach for the {tool}.", "work with the {tool}.")


def ask(draw: Draw) -> Question:
    """Ask for the tool for a job on an object."""
    # The wrong tool does the same job on a different material: the job alone does not decide.
    rng = draw.rng
    thing = rng.choice(of_split(draw.world.objects, draw.split))
    job = rng.choice(list(TOOLS))
    right = MATERIALS.index(thing.material)
    wrong = rng.choice([i for i in range(len(MATERIALS)) if i != right])
    goal = rng.choice(_GOALS).format(job=job, thing=thing.name)
    form, label = rng.choice(_SOLUTIONS), draw.number % 2
    solutions = [form.format(tool=TOOLS[job][material]) for material in (right, wrong)]
    if label == 1:
        solutions.reverse()
    document = {"goal": goal, "sol1": solutions[0], "sol2": solutions[1], "label": label}
    return Question((thing.name, job), goal, document)
