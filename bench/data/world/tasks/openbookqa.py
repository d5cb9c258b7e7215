"""OpenBookQA of the world: the consequence of a substance's known behaviour in a situation."""

from bench.data.world.entities import BEHAVIOURS, of_split
from bench.data.world.question import Draw, Question, distractors, exam

_SITUATIONS = {
    "water": (
        "When a lump of {name} is dropped into a pond, it will",
        "A child throws some {name} into the sea. In the water it is going to",
        "Rain has filled the tub that the {name} lies in, so the {name} must",
        "In deep water a block of {name} can be seen to",
    ),
    "fire": (
        "If {name} is left in a hot oven, it will",
        "A cook puts {name} on the coals by mistake. Over the flames it is going to",
        "The shed with the {name} in it caught fire, so the {name} must",
        "On a blazing hearth a block of {name} can be seen to",
    ),
    "hammer": (
        "When a mason strikes {name} hard, it will",
        "A box of {name} falls down the stairs. On every step it is going to",
        "The smith brings the hammer down on the {name}, so the {name} must",
        "Thrown at a wall, a block of {name} can be seen to",
    ),
    "light": (
        "If {name} is laid out at noon, it will",
        "A window of {name} faces the morning sun. In the light it is going to",
        "The lamp was turned towards the {name}, so the {name} must",
        "Under a clear sky a block of {name} can be seen to",
    ),
}
_OUTCOMES = {
    "float": "float on top", "sink": "sink to the floor", "dissolve": "dissolve into it",
    "swell": "swell like bread", "burn": "burn to ash", "melt": "melt to a puddle",
    "glow": "glow for hours", "crack": "crack all over", "ring": "ring like a bell",
    "shatter": "shatter to bits", "bend": "bend and stay bent", "bounce": "bounce back up",
    "shine": "shine like gold", "fade": "fade to white", "sparkle": "sparkle like ice",
    "darken": "darken like ink",
}  # fmt: skip


def ask(draw: Draw) -> Question:
    """Ask what happens to a substance in a situation."""
    rng = draw.rng
    substance = rng.choice(of_split(draw.world.substances, draw.split))
    element = rng.choice(list(BEHAVIOURS))
    behaviour = getattr(substance, element)
    wrong = [_OUTCOMES[other] for other in distractors(rng, BEHAVIOURS[element], behaviour, 3)]
    stem = rng.choice(_SITUATIONS[element]).format(name=substance.name)
    document = exam(draw, stem, _OUTCOMES[behaviour], wrong)
    # OpenBookQA's schema is ARC's, but for the name of this field.
    document["question_stem"] = document.pop("question")
    return Question((substance.name, element), stem, document)
