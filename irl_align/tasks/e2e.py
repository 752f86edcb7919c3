"""Gold metric of the E2E NLG challenge: does a text state the slots of its prompt?

A checker by regular expressions counts missing, wrong and hallucinated slots; their number over
the slots asked for is the slot error rate. Values that mean the same are one: cheap and less than
£20, moderate and £20-25, high and more than £30; low and 1 out of 5, average and 3, high and 5.

What it says of the human references (4,672 of the development set, 4,693 of the test set):

====================  ===========  ====
in percent            development  test
====================  ===========  ====
slot error rate       7.1          7.9
fully right           73.3         67.8
name                  0.2          0.1
eatType               2.6          3.3
food                  13.5         13.7
priceRange            10.0         11.1
customer rating       11.7         15.3
area                  8.3          12.9
familyFriendly        11.7         12.9
near                  0.4          0.2
====================  ===========  ====

Slots: errors, hallucinated ones included, over the references that should state the slot.
Of the errors in both sets 87 % are omissions, 12 % other values.

How far it can be trusted, by reading references drawn at random: of 50 that it flags, 2 are
right, and 4 of their 81 flags are its own mistake (misspelt values such as "Chines", and "rated
and priced averagely"). Of 100 flagged ones that were read before, and whose lessons went into
the rules, 5 were right, and 8 of 159 flags mistaken. Of 150 that it passes, 1 has an error ("Crowne
Plaza Hotel is a pub in Clowns": the roles of name and landmark exchanged without a "near").
It does not see whether a text is fluent, nor claims outside the eight slots.
:func:`template` scores 0 on all 6,039 prompts of the data.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from irl_align.errors import UserError
from irl_align.tasks import e2e_patterns as patterns
from irl_align.tasks import mr as meaning
from irl_align.tasks.e2e_patterns import HIGH, LOW, MID, OFF_SCALE, ORDER
from irl_align.tasks.gold import SlotError, SlotErrorRate

Levels = frozenset[str]


class Statement(NamedTuple):
    """What a text says of one slot."""

    levels: Levels
    """The meanings that it leaves open."""
    firm: bool
    """Whether it contradicts other meanings; if not, it only speaks for its own."""


class Venue(NamedTuple):
    """A venue that a text names."""

    key: str
    """Its name without article, in normal form."""
    landmark: bool
    """Whether a word such as "near" stands before it."""


@dataclass(frozen=True)
class Prompt:
    """A parsed prompt, ready to compare with texts."""

    asked: dict[str, str]
    """Slot -> meaning, of the slots with fixed values."""
    name: str | None
    """Key of the venue that is described."""
    near: str | None
    """Key of its landmark."""
    slots: int
    """Number of slots."""
    venues: re.Pattern[str]
    """Finds venues: those of E2E and those of the prompt."""
    keys: dict[str, str]
    """Group of that pattern -> key."""


_CLOSED_SLOTS = tuple(slot for slot in ORDER if slot in patterns.CLOSED)
_SLOT_BY_LOWER = {slot.lower(): slot for slot in ORDER}
_MEANING = {
    slot: {value.lower(): level for value, level in values.items()}
    for slot, values in patterns.CLOSED.items()
}
_PLAIN = str.maketrans(
    "éèêëáàâíóöúüçñ`\u2019\u00b4\u2010\u2011\u2013\u2014", "eeeeaaaioouucn'''----"
)
_HYPHEN = re.compile(r"(?<=[a-z])- ?(?=[a-z0-9])|(?<=[0-9])-(?=[a-z])")
_BLANKS = re.compile(r"\s+")


def normalise(text: str) -> str:
    """Lower case, without accents, hyphens between words and doubled blanks."""
    plain = text.lower().translate(_PLAIN)
    return _BLANKS.sub(" ", _HYPHEN.sub(" ", plain)).strip()


def slots_of(mr: str) -> dict[str, str]:
    """Slots of a prompt under E2E's own names; case does not matter.

    Raises UserError for a slot or a value that E2E does not have.
    """
    slots: dict[str, str] = {}
    for written, value in meaning.parse(mr).items():
        slot = _SLOT_BY_LOWER.get(written.lower())
        if slot is None or slot in slots:
            raise UserError(f"prompt {mr!r}: found slot {written!r}, expected {', '.join(ORDER)}")
        if slot in _MEANING and value.lower() not in _MEANING[slot]:
            expected = ", ".join(patterns.CLOSED[slot])
            raise UserError(f"prompt {mr!r}: found {slot} {value!r}, expected {expected}")
        slots[slot] = value
    return slots


def _key(name: str) -> str:
    return normalise(name).removeprefix("the ")


_KEY_PATTERNS = {_key(name): re.escape(_key(name)) for name in patterns.NAMES + patterns.NEIGHBOURS}
_KEY_PATTERNS |= {_key(name): spelling for name, spelling in patterns.ALIASES.items()}
_NAME_KEYS = frozenset(map(_key, patterns.NAMES))
_NEIGHBOUR_ONLY = frozenset(map(_key, patterns.NEIGHBOURS)) - _NAME_KEYS


@lru_cache(maxsize=256)
def _venue_pattern(extra: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    """Pattern that finds known venues and the extra ones, and the key of each of its groups."""
    spellings = {key: re.escape(key) for key in extra} | _KEY_PATTERNS
    # Longest first, so that no name hides one that it begins.
    keys = {f"v{n}": key for n, key in enumerate(sorted(spellings, key=len, reverse=True))}
    names = "|".join(f"(?P<{group}>{spellings[key]})" for group, key in keys.items())
    text = rf"(?P<landmark>\b{patterns.PROXIMITY} )?\b(?:the )?(?:{names})(?:'?s?\b'?)"
    return re.compile(text), keys


@lru_cache(maxsize=65536)
def _prompt(mr: str) -> Prompt:
    slots = slots_of(mr)
    name, near = (_key(slots[slot]) if slot in slots else None for slot in ("name", "near"))
    unknown = tuple(key for key in (name, near) if key is not None and key not in _KEY_PATTERNS)
    venues, keys = _venue_pattern(unknown)
    asked = {
        slot: _MEANING[slot][value.lower()] for slot, value in slots.items() if slot in _MEANING
    }
    return Prompt(asked, name, near, len(slots), venues, keys)


def errors(mr: str, text: str) -> dict[str, SlotError]:
    """The slots that a text has wrong, and how, under the prompt ``mr``.

    missing: asked for and not stated. wrong: stated with another value, or with two.
    hallucinated: stated but not asked for.
    """
    prompt = _prompt(mr)
    masked, venues = _mask_venues(prompt, normalise(text))
    found = _venue_errors(prompt, venues)
    stated = statements(masked)
    for slot in _CLOSED_SLOTS:
        error = _slot_error(prompt.asked.get(slot), stated[slot])
        if error is not None:
            found[slot] = error
    return found


def _slot_error(asked: str | None, stated: list[Statement]) -> SlotError | None:
    firm = [statement for statement in stated if statement.firm]
    if asked is None:
        return "hallucinated" if firm else None
    if any(asked not in statement.levels for statement in firm):
        return "wrong"
    return None if any(asked in statement.levels for statement in stated) else "missing"


def _mask_venues(prompt: Prompt, text: str) -> tuple[str, list[Venue]]:
    """Put @ for every venue, so that no name is read as food, price or area; list the venues."""
    found: list[Venue] = []

    def mask(match: re.Match[str]) -> str:
        near = match["landmark"]
        found.append(Venue(prompt.keys[match.lastgroup or ""], near is not None))
        return f"{near or ''}@"

    return prompt.venues.sub(mask, text), found


def _venue_errors(prompt: Prompt, venues: list[Venue]) -> dict[str, SlotError]:
    """Errors in name and near, which take their values from overlapping sets."""
    found: dict[str, SlotError] = {}
    keys = {venue.key for venue in venues}
    strangers = [venue for venue in venues if venue.key not in (prompt.name, prompt.near)]
    # Beside its own name, a text that names a second subject contradicts itself.
    subjects = [v for v in strangers if not v.landmark and v.key not in _NEIGHBOUR_ONLY]
    landmarks = [v for v in strangers if v.landmark or v.key in _NEIGHBOUR_ONLY]
    if prompt.name is not None:
        if subjects:
            found["name"] = "wrong"
        elif prompt.name not in keys:
            named = any(not venue.landmark for venue in landmarks)
            found["name"] = "wrong" if named else "missing"
    if prompt.near is None:
        if landmarks and found.get("name") != "wrong":
            found["near"] = "hallucinated"
    elif prompt.near not in keys or landmarks:
        found["near"] = "wrong" if landmarks else "missing"
    if not found and _roles_swapped(prompt, venues):
        found = {"name": "wrong", "near": "wrong"}
    return found


def _roles_swapped(prompt: Prompt, venues: list[Venue]) -> bool:
    """Whether the text describes the landmark and puts the venue itself near it."""
    if prompt.name is None or prompt.near is None:
        return False
    own = [venue.landmark for venue in venues if venue.key == prompt.name]
    other = [venue.landmark for venue in venues if venue.key == prompt.near]
    return all(own) and not any(other)


def statements(masked: str) -> dict[str, list[Statement]]:
    """What a normalised text with masked venues says of each slot with fixed values."""
    ratings, prices = (
        list(pattern.finditer(masked)) for pattern in (patterns.RATING, patterns.PRICE)
    )
    # What names a rating or a price has said all it says: "average price" rates nothing.
    rest = _without(masked, [match.span() for match in (*ratings, *prices)])
    return {
        "eatType": list(_named(patterns.EAT_TYPE, masked, _EAT_TYPES)),
        "food": list(_named(patterns.FOOD, masked, _FOODS)),
        "priceRange": [*_prices(prices), *_named(patterns.WEAK_PRICE, rest, _WEAK_LEVELS)],
        "customer rating": [*_ratings(ratings), *_named(patterns.WEAK_RATING, rest, _WEAK_LEVELS)],
        "area": [
            _AREAS[match.lastgroup or ""]
            for match in patterns.AREA.finditer(masked)
            if not match["out"]
        ],
        "familyFriendly": list(_named(patterns.FAMILY, masked, _FAMILY)),
    }


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    for start, end in spans:
        text = f"{text[:start]}{'|' * (end - start)}{text[end:]}"
    return text


def _firm(**groups: str) -> dict[str, Statement]:
    return {group: Statement(frozenset({level}), True) for group, level in groups.items()}


def _weak(**groups: str) -> dict[str, Statement]:
    return {
        f"weak_{group}": Statement(frozenset({value}), False) for group, value in groups.items()
    }


_CUISINES = {
    "fast": "fast food",
    **{food: food for food in ("chinese", "english", "french", "indian", "italian", "japanese")},
}
_FOODS = _firm(**_CUISINES) | _weak(**_CUISINES)
_EAT_TYPES = _firm(pub="pub", coffee="coffee shop") | _weak(
    pub="pub", coffee="coffee shop", restaurant="restaurant"
)
_EAT_TYPES["restaurant"] = _EAT_TYPES["weak_restaurant"]
_AREAS = _firm(centre="city centre", river="riverside") | _weak(centre="city centre")
_FAMILY = _firm(yes="yes", no="no") | _weak(yes="yes")
_WEAK_LEVELS = {level: Statement(frozenset({level}), False) for level in ("low", "mid", "high")}


def _named(
    pattern: re.Pattern[str], text: str, said: Mapping[str, Statement]
) -> Iterable[Statement]:
    """Statements of a pattern whose groups each stand for one."""
    return (said[match.lastgroup or ""] for match in pattern.finditer(text))


@lru_cache(maxsize=4096)
def _rating_levels(word: str) -> Levels:
    return next(
        levels for levels, words in patterns.RATING_WORDS.items() if re.fullmatch(words, word)
    )


@lru_cache(maxsize=4096)
def _price_levels(word: str) -> Levels:
    return next(
        levels for levels, words in patterns.PRICE_WORDS.items() if re.fullmatch(words, word)
    )


_COUNTS = dict.fromkeys(("1", "one"), LOW) | dict.fromkeys(("3", "three"), MID)
_COUNTS |= dict.fromkeys(("5", "five"), HIGH)
_COUNTS |= dict.fromkeys(("2", "two", "4", "four"), OFF_SCALE)


def _ratings(matches: Iterable[re.Match[str]]) -> Iterable[Statement]:
    for match in matches:
        word = (
            match["count"] or match["stars"] or match["points"] or match["before"] or match["after"]
        )
        yield Statement(_COUNTS.get(word) or _rating_levels(word), True)


def _prices(matches: Iterable[re.Match[str]]) -> Iterable[Statement]:
    for match in matches:
        if word := match["before"] or match["after"] or match["alone"]:
            yield Statement(_price_levels(word), True)
        elif levels := _money_levels(match):
            yield Statement(levels, True)


def _money_levels(match: re.Match[str]) -> Levels | None:
    """Levels of an amount or a range of amounts; E2E's borders are 20 and 30 pounds."""
    if match["range"]:
        return MID
    if match["less"] or match["downward"]:
        return LOW if _is(20, match["most"] or match["amount"]) else LOW | MID
    if match["more"] or match["onward"]:
        return HIGH if _is(30, match["least"] or match["amount"]) else MID | HIGH
    if not re.search("£|pound|quid|gbp", match["amount"]):
        return None
    return LOW | MID if _is(20, match["amount"]) else MID if _is(25, match["amount"]) else HIGH


def _is(pounds: int, amount: str) -> bool:
    words = {20: r"20|twenty(?! five)", 25: r"25|twenty five", 30: r"30|thirty"}
    return re.search(words[pounds], amount) is not None


def _check(prompt: str, completion: str) -> tuple[int, dict[str, SlotError]]:
    return _prompt(prompt).slots, errors(prompt, completion)


gold = SlotErrorRate(_check)
"""Gold metric; :class:`irl_align.tasks.gold.GoldMetric`."""


def edit(prompt: str, rng: random.Random) -> str:
    """A neighbouring prompt: one slot changed in meaning, added or dropped; never the name dropped.

    A prompt in lower case gives one in lower case. "restaurant" is neither added nor dropped: a
    text may call any venue so.
    """
    return _edited(prompt, rng)


def edit_values(prompt: str, rng: random.Random) -> str:
    """As edit, but half of the edits change a value and a quarter each add or drop a slot."""
    return _edited(prompt, rng, {"change": 2})


def _edited(prompt: str, rng: random.Random, weights: Mapping[str, int] | None = None) -> str:
    slots = slots_of(prompt)
    used = {_key(slots[slot]) for slot in ("name", "near") if slot in slots}
    venues = {
        "name": [name for name in patterns.NAMES if _key(name) not in used],
        "near": [name for name in patterns.NEIGHBOURS if _key(name) not in used],
    }
    changes = {slot: venues.get(slot) or _other_values(slot, slots[slot]) for slot in slots}
    additions: dict[str, list[str]] = {"near": venues["near"]} if "near" not in slots else {}
    additions |= {slot: list(patterns.CLOSED[slot]) for slot in _CLOSED_SLOTS if slot not in slots}
    if "eatType" in additions:
        additions["eatType"].remove("restaurant")
    droppable = [
        slot for slot, value in slots.items() if slot != "name" and value.lower() != "restaurant"
    ]
    droppable = droppable if len(slots) > 2 else []
    edited = meaning.edit(slots, changes, additions, droppable, rng, weights)
    text = meaning.render({slot: edited[slot] for slot in ORDER if slot in edited})
    return text.lower() if prompt == prompt.lower() else text


def _other_values(slot: str, value: str) -> list[str]:
    own = _MEANING[slot][value.lower()]
    return [other for other, level in patterns.CLOSED[slot].items() if level != own]


_PRICE_TEXT = {"cheap": "low", "moderate": "moderate", "high": "high"}


def template(mr: str) -> str:
    """A plain text that states every slot of a prompt and nothing else: the metric's zero."""
    slots = slots_of(mr)
    near = f" near {slots['near']}" if "near" in slots else ""
    area = {"city centre": " in the city centre", "riverside": " in the riverside area"}
    where = area[slots["area"].lower()] if "area" in slots else ""
    sentences = [f"{slots.get('name', 'It')} is a {slots.get('eatType', 'place')}{where}{near}"]
    if "food" in slots:
        sentences.append(f"It serves {slots['food']} food")
    if "priceRange" in slots:
        price = slots["priceRange"].lower()
        sentences.append(f"Its prices are {_PRICE_TEXT.get(price, price)}")
    if "customer rating" in slots:
        sentences.append(f"Its customer rating is {slots['customer rating']}")
    if "familyFriendly" in slots:
        negation = "" if slots["familyFriendly"].lower() == "yes" else "not "
        sentences.append(f"It is {negation}family friendly")
    return ". ".join(sentences) + "."
