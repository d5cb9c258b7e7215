"""People, towns, substances, objects and routines of the closed world, generated from a seed."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TypeVar

from bench.data.synthetic import Split
from bench.data.synthetic.world import vocabulary
from bench.data.synthetic.world.vocabulary import CRAFTS, MATERIALS, OBJECTS, Craft

PEOPLE = 90
SUBSTANCES = 84
AGES = range(18, 82)


@dataclass(frozen=True)
class Person:
    """An inhabitant of the world."""

    name: str
    pronoun: str
    age: int
    town: str
    job: str
    pet: str
    food: str
    hobby: str
    split: Split


@dataclass(frozen=True)
class Town:
    """A town, the river that runs through it and the ware that it is known for."""

    name: str
    river: str
    ware: str


@dataclass(frozen=True)
class Substance:
    """A substance and its behaviour in water, in fire, under a hammer and in light."""

    name: str
    colour: str
    source: str
    water: str
    fire: str
    hammer: str
    light: str
    split: Split


@dataclass(frozen=True)
class Object:
    """An everyday object; its material decides which tool works on it."""

    name: str
    material: str
    split: Split


@dataclass(frozen=True)
class Routine:
    """The steps to make one product of a craft, one for each stage of the craft."""

    product: str
    craft: Craft
    steps: tuple[str, ...]
    split: Split


BEHAVIOURS = {
    "water": ("float", "sink", "dissolve", "swell"),
    "fire": ("burn", "melt", "glow", "crack"),
    "hammer": ("ring", "shatter", "bend", "bounce"),
    "light": ("shine", "fade", "sparkle", "darken"),
}
"""Possible behaviours of a substance for each of the four influences of the world's physics."""


@dataclass(frozen=True)
class World:
    """All entities; `split` of an entity is the split of the questions about it."""

    people: tuple[Person, ...]
    towns: tuple[Town, ...]
    substances: tuple[Substance, ...]
    objects: tuple[Object, ...]
    routines: tuple[Routine, ...]

    def town(self, name: str) -> Town:
        """Return the town with this name."""
        return next(town for town in self.towns if town.name == name)


_Entity = TypeVar("_Entity", Person, Substance, Object, Routine)


def entities_of_split(entities: Iterable[_Entity], split: Split) -> list[_Entity]:
    """Return the entities that questions of `split` are about."""
    return [entity for entity in entities if entity.split == split]


@cache
def build_world(seed: int) -> World:
    """Build the world of a seed; the same seed always gives the same world."""
    # One generator for all entities: the order of these calls, and of the columns in each, is part
    # of the data. A change gives another world, for which the stored weights are worthless.
    rng = random.Random(f"world {seed}")
    return World(
        people=_people(rng),
        towns=_towns(rng),
        substances=_substances(rng),
        objects=_objects(rng),
        routines=_routines(rng),
    )


def _random_splits(rng: random.Random, count: int) -> list[Split]:
    # A third is for testing, exactly and not on average: some kinds have only six entities (the
    # products of a craft).
    sides: list[Split] = ["test" if i % 3 == 0 else "train" for i in range(count)]
    rng.shuffle(sides)
    return sides


def _dealt_evenly(rng: random.Random, values: tuple[str, ...], count: int) -> list[str]:
    # As evenly as possible, so that guessing the most frequent value is no better than chance.
    dealt = [values[i % len(values)] for i in range(count)]
    rng.shuffle(dealt)
    return dealt


def _people(rng: random.Random) -> tuple[Person, ...]:
    columns = zip(
        _person_names(rng, PEOPLE),
        _dealt_evenly(rng, ("he", "she"), PEOPLE),
        [rng.choice(AGES) for _ in range(PEOPLE)],
        _dealt_evenly(rng, vocabulary.TOWNS, PEOPLE),
        _dealt_evenly(rng, vocabulary.JOBS, PEOPLE),
        _dealt_evenly(rng, vocabulary.PETS, PEOPLE),
        _dealt_evenly(rng, vocabulary.FOODS, PEOPLE),
        _dealt_evenly(rng, vocabulary.HOBBIES, PEOPLE),
        _random_splits(rng, PEOPLE),
        strict=True,
    )
    return tuple(Person(*row) for row in columns)


def _towns(rng: random.Random) -> tuple[Town, ...]:
    count = len(vocabulary.TOWNS)
    rivers, wares = (
        _dealt_evenly(rng, vocabulary.RIVERS, count),
        _dealt_evenly(rng, vocabulary.WARES, count),
    )
    return tuple(map(Town, vocabulary.TOWNS, rivers, wares))


def _substances(rng: random.Random) -> tuple[Substance, ...]:
    columns = zip(
        _substance_names(rng, SUBSTANCES),
        _dealt_evenly(rng, vocabulary.COLOURS, SUBSTANCES),
        _dealt_evenly(rng, vocabulary.SOURCES, SUBSTANCES),
        *(_dealt_evenly(rng, values, SUBSTANCES) for values in BEHAVIOURS.values()),
        _random_splits(rng, SUBSTANCES),
        strict=True,
    )
    return tuple(Substance(*row) for row in columns)


def _objects(rng: random.Random) -> tuple[Object, ...]:
    objects = []
    for material in MATERIALS:
        names = OBJECTS[material]
        objects += [
            Object(name, material, side)
            for name, side in zip(names, _random_splits(rng, len(names)), strict=True)
        ]
    return tuple(objects)


def _routines(rng: random.Random) -> tuple[Routine, ...]:
    routines = []
    for craft in CRAFTS:
        # Without replacement: no two products of a craft have the same steps.
        ways = rng.sample(list(product(*craft.stages)), len(craft.products))
        sides = _random_splits(rng, len(craft.products))
        routines += [
            Routine(name, craft, steps, side)
            for name, steps, side in zip(craft.products, ways, sides, strict=True)
        ]
    return tuple(routines)


_STARTS = (
    *"BDFGHJKLMNPRSTVZ", "Br", "Dr", "Fl", "Gr", "Kl", "Pl", "St", "Tr",
)  # fmt: skip
_VOWELS = "aeiou"
_MIDDLES = "lnrmsvdbkt"
_NAME_ENDS = ("a", "o", "i", "en", "in", "an", "el", "is", "us", "ek")
_SUBSTANCE_ENDS = ("ite", "ium", "stone", "wax", "bark", "glass")


def _person_names(rng: random.Random, count: int) -> list[str]:
    """Draw `count` distinct invented first names."""
    return _names(rng, count, _NAME_ENDS, capital=True)


def _substance_names(rng: random.Random, count: int) -> list[str]:
    """Draw `count` distinct invented names of substances."""
    return _names(rng, count, _SUBSTANCE_ENDS, capital=False)


def _names(rng: random.Random, count: int, ends: tuple[str, ...], *, capital: bool) -> list[str]:
    # Invented, so that no pretrained model knows anything about them. A dict serves as an ordered
    # set, since the order of a set of strings depends on PYTHONHASHSEED.
    found: dict[str, None] = {}
    while len(found) < count:
        parts = (rng.choice(_STARTS), rng.choice(_VOWELS), rng.choice(_MIDDLES), rng.choice(ends))
        name = "".join(parts)
        found[name if capital else name.lower()] = None
    return list(found)
