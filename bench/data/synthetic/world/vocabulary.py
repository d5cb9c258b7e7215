"""Words, materials, tools and crafts of the closed world, as data."""

from typing import NamedTuple

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


class Craft(NamedTuple):
    """A trade: its products, and the alternative steps at each stage of the work."""

    worker: str
    products: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]


CRAFTS = (
    Craft(
        "potter",
        ("a water jug", "a soup bowl", "a flower pot", "a roof tile", "an oil lamp",
         "a butter dish"),
        (("digs red clay from the bank", "buys white clay at the market",
          "scrapes grey clay from a pit", "carries brown clay from the cellar"),
         ("kneads it with sand", "soaks it in rain water",
          "beats it with a paddle", "mixes it with straw"),
         ("shapes it on the wheel", "presses it into a mould",
          "rolls it into long coils", "pinches it with both thumbs"),
         ("dries it in the sun", "dries it beside the stove",
          "leaves it on a windy shelf", "wraps it in a damp cloth"),
         ("fires it in the kiln", "bakes it under hot ash",
          "glazes it with blue glass", "polishes it with a pebble")),
    ),
    Craft(
        "baker",
        ("a plum cake", "a rye loaf", "a cheese pie", "a honey roll", "a nut tart",
         "a ginger biscuit"),
        (("sifts the flour twice", "grinds the grain by hand",
          "warms the milk slowly", "weighs the butter first"),
         ("stirs in three eggs", "adds a pinch of salt",
          "folds in the yeast", "pours in some oil"),
         ("lets the dough rest", "rolls the dough flat",
          "braids the dough tightly", "cuts the dough in squares"),
         ("brushes the top with cream", "sprinkles sugar over it",
          "scores it with a knife", "fills it with fruit"),
         ("bakes it until golden", "steams it in a pot",
          "fries it on both sides", "cools it by the window")),
    ),
    Craft(
        "carpenter",
        ("a stool", "a bookshelf", "a cradle", "a rowing boat", "a birdhouse",
         "a garden gate"),
        (("fells a young oak", "picks old planks from the yard",
          "orders beech boards", "splits a pine log"),
         ("measures it with a rule", "marks it with chalk",
          "draws a plan on paper", "counts the knots in it"),
         ("saws it into strips", "planes it smooth",
          "drills holes in the ends", "carves a deep groove"),
         ("glues the joints", "hammers in some nails",
          "ties it with cord", "pegs the corners"),
         ("paints it green", "rubs it with oil",
          "varnishes it at night", "sands the edges")),
    ),
    Craft(
        "weaver",
        ("a wool scarf", "a carpet", "a linen shirt", "a fishing net", "a flag",
         "a bed sheet"),
        (("shears the sheep", "picks the cotton",
          "cuts the flax", "unravels an old rope"),
         ("washes the fibre in the stream", "combs the fibre straight",
          "beats the fibre on a stone", "sorts the fibre by length"),
         ("spins it into yarn", "twists it into thread",
          "winds it on a reel", "braids it into cord"),
         ("dyes it in a copper pot", "bleaches it in the sun",
          "waxes it lightly", "smokes it over a fire"),
         ("weaves it on the loom", "knots it by hand",
          "knits it with needles", "stitches the hem")),
    ),
    Craft(
        "gardener",
        ("a rose bed", "a pumpkin patch", "a bean row", "an herb corner", "an apple hedge",
         "a vine arch"),
        (("clears the weeds", "turns the soil with a fork",
          "burns the dry leaves", "moves the big stones"),
         ("spreads some manure", "scatters wood ash",
          "mixes in coarse sand", "lays down rotten straw"),
         ("sows the seeds in lines", "plants the young shoots",
          "buries the bulbs deep", "sets the cuttings in rows"),
         ("waters them at dawn", "covers them with a mat",
          "builds a low fence", "puts a stake by each one"),
         ("prunes them in autumn", "picks the first fruit",
          "thins out the weak ones", "chases the birds away")),
    ),
    Craft(
        "smith",
        ("a horseshoe", "a door hinge", "a bread knife", "a ship anchor", "a garden rake",
         "a plough blade"),
        (("melts the scrap in a pot", "lights the forge with coal",
          "chooses a long iron bar", "breaks the ore with a maul"),
         ("heats it until it glows", "pours it into sand",
          "pulls it out with tongs", "folds it over twice"),
         ("hammers it on the anvil", "bends it round a post",
          "punches a row of holes", "twists it in the vice"),
         ("dips it in cold water", "cools it in a tub of oil",
          "lets it stand overnight", "quenches it in wet clay"),
         ("files the rough edge", "grinds it on the wheel",
          "scrubs it with a brush", "stamps a mark on it")),
    ),
)  # fmt: skip
MATERIALS = ("cloth", "wooden", "metal")
"""Materials of everyday objects; the columns of `TOOLS`."""
OBJECTS = {
    "cloth": (
        "scarf", "curtain", "sail", "shirt", "flag", "tent", "pillow", "glove", "apron", "towel",
        "jacket", "quilt", "banner", "napkin", "robe",
    ),
    "wooden": (
        "oar", "stool", "door", "ladder", "fence", "bench", "mast", "cradle", "shelf", "cart",
        "spoon", "gate", "raft", "desk", "sledge",
    ),
    "metal": (
        "kettle", "anchor", "bell", "gear", "hinge", "helmet", "sword", "pipe", "lock", "key",
        "stove", "shield", "trumpet", "plough", "pan",
    ),
}  # fmt: skip
TOOLS = {
    "cut": ("scissors", "saw", "hacksaw"),
    "smooth": ("iron", "sandpaper", "file"),
    "clean": ("soap", "broom", "vinegar"),
    "pierce": ("awl", "auger", "drill"),
    "colour": ("dye", "paint", "enamel"),
    "coat": ("wax", "varnish", "grease"),
    "measure": ("tape", "ruler", "calipers"),
    "hold": ("pins", "clamp", "vice"),
    "mend": ("patch", "glue", "rivets"),
    "mark": ("chalk", "pencil", "stamp"),
}
"""The tool for a job by the material of the object, in the order of `MATERIALS`."""
