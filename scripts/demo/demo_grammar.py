"""The words of make_demo_data.py: restaurants (private), and hotels, museums, cinemas, trains, parks, shops, concerts
and libraries (public). All of it was written for this repository.

The public domain never mentions eating or drinking. It shares no name and no phrase of a few words with the private one
(test_demo_data.py checks this), so a model learns about restaurants only under privacy. The two share everyday words,
and the task: say each field once, and copy names that were never seen before. For copying, the public names are many
and made of syllables, and a made-up word is sometimes the type or a value.

Notation. A field's phrases are in roles: pre (before the noun), post (behind it), front (first in the sentence), verb
(after a subject). `@` is the value. A key `field=value` is for that value alone. In openers <pre>, <post>, <front>,
<verb>, <name> and <type> are filled; `a(n)` becomes a or an.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
Phrases = dict[str, dict[str, tuple[str, ...]]]


class Draw:
    """Choices from random.Random(seed).random() alone, the one sequence that Python promises never to change."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def below(self, count: int) -> int:
        """A number in [0, count)."""
        return int(self._random() * count)

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def pick(self, items: Sequence[Item]) -> Item:
        """One item of a sequence."""
        return items[self.below(len(items))]

    def shuffled(self, items: list[Item]) -> list[Item]:
        """A new list (Fisher-Yates)."""
        items = list(items)
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]
        return items


@dataclass(frozen=True)
class Kind:
    """A kind of thing: its fields, and the phrases for them."""

    type: Callable[[Draw], str]
    name: Callable[[Draw], str]
    values: dict[str, Callable[[Draw], str]]  # field -> chooser of a value, in the order of the context
    phrases: Phrases
    openers: tuple[str, ...]
    subjects: tuple[tuple[str, ...], tuple[str, ...]]  # of the second sentence, and of the third
    sizes: tuple[int, ...] = (1, 2, 2, 3, 3)  # fields beside name and Type, to choose from


def one_of(*values: str) -> Callable[[Draw], str]:
    return lambda draw: draw.pick(values)


def number(low: int, high: int, step: int, form: str) -> Callable[[Draw], str]:
    """low, low + step, ..., below high, put into form at @."""
    return lambda draw: form.replace("@", str(low + step * draw.below((high - low) // step)))


# -------------------------------------------------- private: restaurants

TAVERN_FIRST = "Red Old Tin Gold Black Green Iron Lazy Fat Sweet Happy Stone".split()
TAVERN_LAST = "Hen Pot Crab Lamb Pan Hare Mill Oven Corn Spoon Bell Pear".split()


def tavern_name(draw: Draw) -> str:
    return f"{draw.pick(('The ', ''))}{draw.pick(TAVERN_FIRST)} {draw.pick(TAVERN_LAST)}"


RESTAURANT_PHRASES: Phrases = {
    "food": {
        "pre": ("@",),
        "post": ("that serves @ food", "serving @ food"),
        "verb": ("serves @ food", "serves @ food", "offers @ food"),
    },
    "price": {"post": ("with prices @",), "verb": ("has prices @", "has a price range @")},
    "price=cheap": {
        "pre": ("cheap", "low priced"),
        "post": ("with cheap prices",),
        "verb": ("is cheap", "has cheap prices"),
    },
    "price=moderate": {
        "pre": ("moderately priced",),
        "post": ("with moderate prices",),
        "verb": ("is moderately priced", "has moderate prices"),
    },
    "price=high": {
        "pre": ("high priced", "expensive"),
        "post": ("with high prices",),
        "verb": ("is expensive", "has high prices"),
    },
    "customer rating": {
        "post": ("with a customer rating of @",),
        "verb": ("has a customer rating of @", "is rated @ by customers"),
    },
    "customer rating=low": {
        "pre": ("low rated", "poorly rated"),
        "post": ("with a low customer rating",),
        "verb": ("has a low customer rating", "is rated low by customers"),
    },
    "customer rating=average": {
        "pre": ("average rated",),
        "post": ("with an average customer rating",),
        "verb": ("has an average customer rating",),
    },
    "customer rating=high": {
        "pre": ("highly rated",),
        "post": ("with a high customer rating",),
        "verb": ("has a high customer rating", "is highly rated by customers"),
    },
    "area": {
        "post": ("in the @", "in the @ area"),
        "front": ("in the @", "in the @ area"),
        "verb": ("is located in the @", "is in the @ area"),
    },
    "family friendly=yes": {
        "pre": ("family friendly", "child friendly"),
        "post": ("that welcomes families",),
        "verb": ("is family friendly", "is child friendly", "welcomes families"),
    },
    "family friendly=no": {
        "post": ("that is not family friendly",),
        "verb": ("is not family friendly", "is not child friendly"),
    },
    "near": {"post": ("near @",), "front": ("near @",), "verb": ("is near @", "is located near @")},
}


def restaurants(draw: Draw) -> Kind:
    """The private kind. Its town is drawn first: 60 places that can be described, 20 that others are near to."""
    names = list(dict.fromkeys(tavern_name(draw) for _ in range(400)))
    return Kind(
        type=one_of("restaurant", "pub", "diner", "inn"),
        name=one_of(*names[:60]),
        values={
            "food": one_of("Italian", "Indian", "Greek", "Thai", "French"),
            "price": one_of("cheap", "moderate", "high", "under £ 20", "over £ 30"),
            "customer rating": one_of("low", "average", "high", "1 out of 5", "3 out of 5", "5 out of 5"),
            "area": one_of("riverside", "city centre", "harbour"),
            "family friendly": one_of("yes", "no"),
            "near": one_of(*names[60:80]),
        },
        phrases=RESTAURANT_PHRASES,
        openers=(
            "<name> is a(n) <pre><type><post>",
            "<name> is a(n) <pre><type><post>",
            "<name> is a(n) <pre><type><post>",
            "there is a(n) <pre><type><post> called <name>",
            "<front> , there is a(n) <pre><type> called <name><post>",
            "<front> , <name> is a(n) <pre><type><post>",
            "<name> , a(n) <pre><type><post> , <verb>",
        ),
        subjects=(("it", "it", "the <type>"), ("the place", "it")),
        sizes=(2, 2, 3, 3),
    )


# ------------------------------------------------------ public: the rest

# Parts of a made-up word; "" stands in the lists as often as it is to be drawn.
LETTERS = (
    "b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p pl pr qu r s sh sk sl sp st str sw t th tr tw v w wh y z"
)
ONSETS = [*LETTERS.split(), "", ""]
VOWELS = "a e i o u a e i o u ai ea ee oo ou ie ar er or".split()
CODAS = ["", "", "", "", *"n l r s t m d ck nd rt st x b p g ng ll lk mp rn sh ss tch ve ne le ty".split()]
FEWEST, MOST = 3, 8  # letters of a made-up word
# Offensive words that chance would spell now and then.
UNFIT = """
    tit shit fag twat pis jew nig poo peni kike rape slut nazi porn fuc fuk cun cock dick sex cum ass arse whor
    spic coon wank crap anus kill die pric boob tard hore
""".split()
PRIVATE = {made.lower() for made in TAVERN_FIRST + TAVERN_LAST} | set(
    "pub inn diner bar cafe tea eat eats meal food dish dine menu cook chef wine beer coffee bread supper dinner "
    "bistro lunch drink".split()
)


def word(draw: Draw) -> str:
    """A made-up word of one to three syllables, none of those that the private domain speaks of."""
    while True:
        count = draw.pick((1, 1, 2, 2, 3))
        made = "".join(draw.pick(ONSETS) + draw.pick(VOWELS) + draw.pick(CODAS) for _ in range(count))
        if FEWEST <= len(made) <= MOST and made not in PRIVATE and not any(part in made for part in UNFIT):
            return made


def syllables(draw: Draw) -> str:
    """A made-up word with a capital."""
    return word(draw).capitalize()


def or_made_up(*values: str) -> Callable[[Draw], str]:
    """One of the values, or now and then a made-up word: a model must copy what stands there, whatever it is."""
    return lambda draw: word(draw) if draw.chance(0.35) else draw.pick(values)


def public_name(draw: Draw) -> str:
    """Of one to three words: many shapes, so that a model must learn to copy rather than to recall."""
    shape = draw.below(6)
    if shape == 0:
        return syllables(draw)
    if shape == 1:
        return f"The {syllables(draw)}"
    if shape in (2, 3):
        return f"The {syllables(draw)} {syllables(draw)}"
    return f"{syllables(draw)} {syllables(draw)}"


def place(draw: Draw) -> str:
    return f"{syllables(draw)} {draw.pick(('Street', 'Bridge', 'Tower', 'Gate', 'Castle', 'Hill', 'Lane', 'Station'))}"


def spot(draw: Draw) -> str:
    """What something is close to: a street, or another named thing."""
    return place(draw) if draw.chance(0.4) else public_name(draw)


QUARTER = or_made_up(
    "north harbour", "lake shore", "west hill", "city walls", "town centre", "east side", "riverside walk"
)
PRICE = number(4, 60, 2, "£ @")

PLACE_PHRASES: Phrases = {
    "area": {
        "post": ("by the @", "down by the @"),
        "front": ("by the @", "down by the @"),
        "verb": ("stands by the @", "can be found by the @", "is to be located by the @"),
    },
    "near": {
        "post": ("beside @", "close to @"),
        "front": ("beside @", "close to @"),
        "verb": ("lies close to @", "sits beside @", "stands near @"),
    },
    "ticket": {"post": ("for @", "at @ a ticket"), "verb": ("charges @ a ticket", "costs under @ to enter")},
    "rating": {"pre": ("@ rated",), "verb": ("gets a rating that is @", "is thought to rate as @")},
    "step free=yes": {"pre": ("step free",), "verb": ("can be entered without steps", "has step free doors")},
    "step free=no": {"verb": ("can only be entered by stairs", "has no step free doors")},
    "dogs=yes": {"post": ("open to dogs",), "verb": ("welcomes dogs", "allows dogs")},
    "dogs=no": {"post": ("closed to dogs",), "verb": ("keeps dogs out", "does not allow dogs")},
    "opens": {"post": ("open from @",), "verb": ("opens at @", "unlocks its doors at @")},
    "closes": {"post": ("open until @",), "verb": ("closes at @", "shuts its doors at @")},
}

RATING = one_of("poor", "low", "average", "fine", "great", "high")
MORNING = number(6, 12, 1, "@ am")
EVENING = number(1, 12, 1, "@ pm")
YES_NO = one_of("yes", "no")

PLACE_OPENERS = (
    "<name> is a(n) <pre><type><post>",
    "<name> , a(n) <pre><type><post> , <verb>",
    "there is also <name> , a(n) <pre><type><post>",
    "people speak highly of <name> , the <pre><type><post>",
    "the name <name> belongs to a(n) <pre><type><post>",
    "of all towns , ours has <name> , a(n) <pre><type><post>",
    "visit <name> , a(n) <pre><type><post>",
    "come and see the <pre><type> <name><post>",
    "look for <name> , our <pre><type><post>",
    "visitors know <name> as a(n) <pre><type><post>",
    "<front> stands <name> , a(n) <pre><type><post>",
    "<front> you will find the <pre><type> <name><post>",
    "<front> there is the <pre><type> <name><post>",
    "the <pre><type> <name> <verb>",
)
PLACE_SUBJECTS = (("this <type>", "this place", "it"), ("besides , it", "this <type> also"))


def public_place(types: tuple[str, ...], values: dict[str, Callable[[Draw], str]], own: Phrases) -> Kind:
    """A kind of place: its own fields and phrases, and those that all places share."""
    shared = {"area": QUARTER, "near": spot, "rating": RATING, "step free": YES_NO}
    phrases = {**PLACE_PHRASES, **own}
    return Kind(or_made_up(*types), public_name, {**values, **shared}, phrases, PLACE_OPENERS, PLACE_SUBJECTS)


def public_kinds() -> list[Kind]:
    hotel = public_place(
        ("hotel", "guest house", "hostel", "lodge"),
        {"rooms": number(8, 240, 4, "@"), "night": number(30, 200, 5, "£ @"), "dogs": YES_NO, "pool": YES_NO},
        {
            "rooms": {"post": ("of @ rooms",), "verb": ("lets @ rooms", "keeps @ quiet rooms")},
            "night": {"post": ("at @ a night",), "verb": ("asks @ for a night", "gives a price of @")},
            "pool=yes": {"post": ("with its own pool",), "verb": ("keeps a warm pool", "has a pool for guests")},
            "pool=no": {"post": ("without a pool",), "verb": ("lacks a pool", "has no pool")},
        },
    )
    museum = public_place(
        ("museum", "gallery", "science centre"),
        {
            "shows": or_made_up(
                "old ships", "clocks", "glass", "portraits", "fossils", "model planes", "coins", "maps"
            ),
            "ticket": PRICE,
            "opens": MORNING,
            "family ticket": YES_NO,
        },
        {
            "shows": {"post": ("of @", "full of @"), "verb": ("shows @", "collects @")},
            "family ticket=yes": {"verb": ("sells a family ticket", "lets a family in on one ticket")},
            "family ticket=no": {"verb": ("sells no family ticket", "does without a family ticket")},
        },
    )
    cinema = public_place(
        ("cinema", "film theatre", "picture house"),
        {
            "film": public_name,
            "screens": number(1, 14, 1, "@"),
            "ticket": PRICE,
            "starts": EVENING,
            "language": or_made_up("Italian", "Indian", "Greek", "Thai", "French", "Polish", "Danish"),
        },
        {
            "film": {"post": ("showing @",), "verb": ("is now showing @", "runs the film @")},
            "screens": {"pre": ("@ screen",), "verb": ("counts @ screens", "is fitted with @ screens")},
            "starts": {"verb": ("starts the film at @", "dims the lights at @")},
            "language": {"pre": ("@",), "verb": ("plays @ films", "chooses @ films")},
        },
    )
    park = public_place(
        ("park", "garden", "nature reserve"),
        {
            "acres": number(3, 200, 3, "@"),
            "known for": or_made_up("roses", "tall oaks", "ponds", "owls", "statues", "wild deer"),
            "dogs": YES_NO,
            "closes": EVENING,
            "playground": YES_NO,
        },
        {
            "acres": {"pre": ("@ acre",), "post": ("of @ acres",), "verb": ("covers @ acres", "spreads over @ acres")},
            "known for": {"post": ("known for its @",), "verb": ("is loved for its @", "boasts @")},
            "playground=yes": {"post": ("with a playground",), "verb": ("has swings for a child", "suits families")},
            "playground=no": {
                "post": ("without a playground",),
                "verb": ("has no swings for a child", "bores families"),
            },
        },
    )
    shop = public_place(
        ("market", "craft shop", "gift shop", "corner shop", "street stall"),
        {
            "sells": or_made_up(
                "used books", "kites", "boots", "rare records", "lamps", "tulips", "board games", "hats"
            ),
            "opens": MORNING,
            "closes": EVENING,
            "staff": one_of("friendly", "busy", "helpful", "slow"),
            "price": one_of("cheap", "moderate", "expensive"),
            "card": YES_NO,
        },
        {
            "sells": {"post": ("for @", "selling @"), "verb": ("sells @", "stocks a range of @")},
            "staff": {"post": ("run by @ staff",), "verb": ("employs @ staff", "greets customers with @ staff")},
            "price": {"pre": ("@",), "verb": ("sets prices that are @", "is @ to its customers")},
            "price=moderate": {"verb": ("is moderately priced for its customers", "sets moderate prices")},
            "card=yes": {"verb": ("takes cards", "lets a customer pay by card")},
            "card=no": {"verb": ("takes cash only", "refuses cards")},
        },
    )
    library = public_place(
        ("library", "archive", "reading room"),
        {
            "books": number(2000, 90000, 500, "@"),
            "closes": EVENING,
            "study rooms": YES_NO,
            "loan": number(2, 9, 1, "@ weeks"),
        },
        {
            "books": {"post": ("of @ books",), "verb": ("holds @ books", "keeps @ books on its shelves")},
            "study rooms=yes": {"verb": ("has rooms to study in", "lends out study rooms")},
            "study rooms=no": {"verb": ("has no rooms to study in", "lends out no study rooms")},
            "loan": {"verb": ("lends for @", "wants its books back after @")},
        },
    )
    train = Kind(
        or_made_up("express", "night train", "local train", "ferry", "coach"),
        public_name,
        {
            "from": spot,
            "to": spot,
            "leaves": MORNING,
            "fare": PRICE,
            "platform": number(1, 20, 1, "@"),
            "bikes": YES_NO,
        },
        {
            "from": {"post": ("from @",), "front": ("from @",), "verb": ("sets out from @", "begins its run at @")},
            "to": {"post": ("to @", "bound for @", "serving @"), "verb": ("serves @", "ends its run at @")},
            "leaves": {"pre": ("@",), "post": ("at @",), "verb": ("leaves at @", "moves off at @")},
            "fare": {"post": ("for @",), "verb": ("costs @ one way", "asks a fare of @")},
            "platform": {"post": ("on platform @",), "verb": ("waits on platform @", "uses platform @")},
            "bikes=yes": {"post": ("with room for bikes",), "verb": ("carries bikes", "has room for bikes")},
            "bikes=no": {"post": ("without room for bikes",), "verb": ("carries no bikes", "leaves bikes behind")},
        },
        (
            "take the <pre><type> called <name><post>",
            "<name> is the <pre><type><post>",
            "there is room on the <pre><type> <name><post>",
            "<name> , the <pre><type><post> , <verb>",
            "passengers ride the <pre><type> <name><post>",
            "<front> runs the <pre><type> <name><post>",
            "board <name> , a(n) <pre><type><post>",
        ),
        (("this <type>", "the service", "it"), ("besides , it", "the service also")),
    )
    concert = Kind(
        or_made_up("concert", "festival", "recital", "dance show"),
        public_name,
        {
            "played by": public_name,
            "hall": spot,
            "day": one_of("Monday", "Tuesday", "Thursday", "Friday", "Sunday"),
            "starts": EVENING,
            "seat": PRICE,
            "music": or_made_up("jazz", "folk", "choral", "organ", "rock", "brass"),
        },
        {
            "played by": {"post": ("by @", "played by @"), "verb": ("brings @ to the stage", "presents @")},
            "hall": {"post": ("at @",), "front": ("at @",), "verb": ("fills the hall of @", "takes place at @")},
            "day": {"pre": ("@",), "post": ("on @",), "front": ("on @",), "verb": ("is held on @", "comes on @")},
            "starts": {"post": ("at @",), "verb": ("begins at @", "starts at @ sharp")},
            "seat": {"verb": ("sells seats for @", "asks @ for a seat")},
            "music": {"pre": ("@",), "post": ("of @ music",), "verb": ("is all @ music", "offers @ music")},
        },
        (
            "hear <name> , a(n) <pre><type><post>",
            "<name> is a(n) <pre><type><post>",
            "there is the <pre><type> called <name><post>",
            "book a seat for the <pre><type> <name><post>",
            "<front> you can hear <name> , a(n) <pre><type><post>",
            "listen to the <pre><type> <name><post>",
            "the <pre><type> <name> <verb>",
        ),
        (("this <type>", "the evening", "it"), ("besides , it", "the evening also")),
    )
    return [hotel, museum, cinema, park, shop, library, train, concert]
