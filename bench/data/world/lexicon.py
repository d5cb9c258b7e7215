"""Words of the closed world: names of things, and values of properties."""

import random

TOWNS = (
    "Aldmere", "Brackton", "Corvale", "Dunmoor", "Elsford", "Fennick", "Garwick", "Holloway",
    "Inverby", "Kestrow", "Larkhill", "Marwood",
)  # fmt: skip
RIVERS = ("Arrow", "Bourne", "Clyde", "Derwent", "Esk", "Fleet", "Greta", "Humber")
WARES = ("glass", "honey", "paper", "bells", "rugs", "cheese", "salt", "clocks")

JOB_TOOLS = {
    "baker": "rolling pin", "barber": "razor", "farmer": "hoe", "painter": "palette",
    "tailor": "thimble", "miner": "pickaxe", "doctor": "thermometer", "teacher": "blackboard",
    "sailor": "compass", "cook": "ladle", "fisher": "net", "postman": "satchel",
}  # fmt: skip
JOBS = tuple(JOB_TOOLS)
PETS = (
    "parrot", "goat", "kitten", "turtle", "rabbit", "pony", "goose", "lizard", "puppy", "owl",
    "hamster", "donkey",
)  # fmt: skip
FOODS = (
    "soup", "pancakes", "noodles", "plums", "olives", "porridge", "dumplings", "cherries",
    "mushrooms", "pickles", "almonds", "pumpkin",
)  # fmt: skip
HOBBIES = (
    "chess", "juggling", "swimming", "knitting", "archery", "dancing", "painting", "climbing",
    "skating", "singing", "fencing", "gardening",
)  # fmt: skip

COLOURS = ("red", "blue", "green", "white", "black", "yellow", "grey", "violet")
SOURCES = ("caves", "deserts", "swamps", "forests", "riverbeds", "volcanoes", "glaciers", "islands")

PLACES = (
    "harbour", "kitchen", "garden", "market", "library", "attic", "barn", "chapel", "cellar",
    "bridge", "orchard", "mill", "school", "tower", "stable", "theatre",
)  # fmt: skip
THINGS = (
    "drum", "kite", "lantern", "ladder", "basket", "mirror", "flute", "blanket", "bucket",
    "hammer", "map", "clock", "candle", "parasol", "suitcase", "telescope",
)  # fmt: skip
GOODS = (
    "apples", "marbles", "stamps", "coins", "shells", "buttons", "pencils", "candles", "eggs",
    "tickets", "bricks", "roses",
)  # fmt: skip

_STARTS = (
    *"BDFGHJKLMNPRSTVZ", "Br", "Dr", "Fl", "Gr", "Kl", "Pl", "St", "Tr",
)  # fmt: skip
_VOWELS = "aeiou"
_MIDDLES = "lnrmsvdbkt"
_NAME_ENDS = ("a", "o", "i", "en", "in", "an", "el", "is", "us", "ek")
_SUBSTANCE_ENDS = ("ite", "ium", "stone", "wax", "bark", "glass")


def person_names(rng: random.Random, count: int) -> list[str]:
    """Draw `count` distinct invented first names."""
    return _names(rng, count, _NAME_ENDS, capital=True)


def substance_names(rng: random.Random, count: int) -> list[str]:
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
