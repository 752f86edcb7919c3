"""The built-in demonstration task: restaurants from a grammar, with an exact gold metric.

A prompt asks for 3 to 7 slots, ``name[...]`` first; a completion is one or two sentences that
state them. Every value has its own phrases, which a text of the grammar cannot contain by chance,
so that the gold metric is exact. The task needs no download.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from irl_align.errors import UserError
from irl_align.tasks import mr as meaning
from irl_align.tasks.gold import SlotError, SlotErrorRate

_NAMES = (
    "amber lantern, blue heron, brass kettle, copper fox, corner house, crooked oak, dancing bear, "
    "empty barrel, fat pigeon, flying carpet, gilded swan, green door, grey goose, half moon, "
    "happy miller, hidden pearl, hungry monk, ivory tower, jolly sailor, lazy cat, little star, "
    "lucky seven, magic bean, merry widow, noble stag, open hearth, paper crane, proud peacock, "
    "quiet man, red lion, rusty anchor, silver spoon, sleepy owl, stone bridge, tipsy toad, "
    "velvet glove, wandering bee, white rabbit, wild rose, yellow wagon"
)
_LANDMARKS = (
    "the bus station, the cathedral, the library, the market hall, the old mill, the opera, "
    "the town museum, the university, the war memorial, the zoo"
)


class Phrases(NamedTuple):
    """Ways to state one value."""

    before: tuple[str, ...] = ()
    """Before the word "restaurant"."""
    after: tuple[str, ...] = ()
    """After the word "restaurant"."""
    clause: tuple[str, ...] = ()
    """A verb phrase, with the restaurant as its subject."""


def _food(food: str, dish: str) -> Phrases:
    return Phrases((food,), (f"for {food} food",), (f"serves {food} dishes", f"offers {dish}"))


def _area(place: str, *others: str) -> Phrases:
    return Phrases((), (f"in {place}", *others), (f"can be found in {place}",))


def _near(landmark: str) -> Phrases:
    after = (f"near {landmark}", f"close to {landmark}", f"next to {landmark}")
    return Phrases((), after, (f"stands opposite {landmark}",))


PHRASES: dict[str, dict[str, Phrases]] = {
    "name": {f"the {name}": Phrases() for name in _NAMES.split(", ")},
    "food": {
        "thai": _food("thai", "pad thai"),
        "french": _food("french", "onion soup"),
        "indian": _food("indian", "curries"),
        "italian": _food("italian", "fresh pasta"),
        "japanese": _food("japanese", "sushi"),
        "mexican": _food("mexican", "tacos"),
        "greek": _food("greek", "moussaka"),
        "vegan": _food("vegan", "food without meat or milk"),
    },
    "price": {
        "cheap": Phrases(("cheap", "inexpensive"), ("with low prices",), ("costs little",)),
        "moderate": Phrases(
            ("moderately priced", "mid-range"), ("with average prices",), ("asks fair prices",)
        ),
        "expensive": Phrases(("expensive", "pricey"), ("with high prices",), ("costs a lot",)),
    },
    "rating": {
        "low": Phrases(("poorly rated",), ("with a low rating",), ("gets one star out of five",)),
        "medium": Phrases(
            ("averagely rated",), ("with a middling rating",), ("gets three stars out of five",)
        ),
        "high": Phrases(
            ("highly rated", "popular"), ("with a high rating",), ("gets five stars out of five",)
        ),
    },
    "area": {
        "riverside": _area("the riverside area", "by the river"),
        "city centre": _area("the city centre", "in the heart of the city"),
        "suburbs": _area("the suburbs", "outside the town"),
        "harbour": _area("the harbour district", "on the waterfront"),
        "old town": _area("the old town", "in the medieval quarter"),
    },
    "family": {
        "yes": Phrases(
            ("family friendly", "child friendly"), ("for the whole family",), ("welcomes children",)
        ),
        "no": Phrases(("adults only",), ("without a children's menu",), ("turns children away",)),
    },
    "near": {landmark: _near(landmark) for landmark in _LANDMARKS.split(", ")},
}
"""Slot -> value -> its phrases. The name has none: a text states it directly."""

SLOTS = tuple(PHRASES)
_OPTIONAL = SLOTS[1:]
_SHARES = {"test": range(10), "validation": range(10, 20), "train": range(20, 100)}


# Phrase -> the slot and the value that it states.
_STATED = {
    phrase: (slot, value)
    for slot, values in PHRASES.items()
    for value, phrases in values.items()
    for phrase in ((value,) if slot == "name" else sum(phrases, ()))
}
_PHRASE = re.compile(
    r"\b(?:" + "|".join(map(re.escape, sorted(_STATED, key=len, reverse=True))) + r")\b"
)


@lru_cache(maxsize=65536)
def _slots(prompt: str) -> Mapping[str, str]:
    """Slots of a prompt. Raises UserError: the task has no such slot or value."""
    slots = meaning.parse(prompt)
    for slot, value in slots.items():
        if value not in PHRASES.get(slot, ()):
            raise UserError(
                f"prompt {prompt!r}: found {slot}[{value}], expected slots "
                f"{', '.join(SLOTS)} with the values of the restaurant task"
            )
    return slots


def errors(prompt: str, text: str) -> dict[str, SlotError]:
    """The slots that a text has wrong, with the kind of error; exact for texts of the grammar.

    missing: asked for and not stated. wrong: stated with another value, or with two.
    hallucinated: stated but not asked for. Phrases outside the grammar state nothing.
    """
    asked = _slots(prompt)
    stated: dict[str, set[str]] = {}
    for phrase in _PHRASE.findall(" ".join(text.lower().split())):
        slot, value = _STATED[phrase]
        stated.setdefault(slot, set()).add(value)
    wrong: dict[str, SlotError] = {}
    for slot in SLOTS:
        values = stated.get(slot, set())
        if slot not in asked:
            if values:
                wrong[slot] = "hallucinated"
        elif values != {asked[slot]}:
            wrong[slot] = "wrong" if values else "missing"
    return wrong


def _check(prompt: str, completion: str) -> tuple[int, dict[str, SlotError]]:
    return len(_slots(prompt)), errors(prompt, completion)


gold = SlotErrorRate(_check)
"""Gold metric; :class:`irl_align.tasks.gold.GoldMetric`."""


def edit(prompt: str, rng: random.Random) -> str:
    """A neighbouring prompt of 3 to 7 slots, with one slot changed, added or dropped."""
    return meaning.render(_in_order(_edit_slots(_slots(prompt), rng, fewest=3)))


def _edit_slots(slots: Mapping[str, str], rng: random.Random, fewest: int) -> dict[str, str]:
    changes = {
        slot: [other for other in PHRASES[slot] if other != value] for slot, value in slots.items()
    }
    additions = {slot: list(PHRASES[slot]) for slot in _OPTIONAL if slot not in slots}
    droppable = [slot for slot in slots if slot != "name"] if len(slots) > fewest else []
    return meaning.edit(slots, changes, additions, droppable, rng)


def _in_order(slots: Mapping[str, str]) -> dict[str, str]:
    return {slot: slots[slot] for slot in SLOTS if slot in slots}


def demonstrations(split: str, size: int, seed: int, noise: float = 0.0) -> list[dict[str, str]]:
    """``size`` rows with prompt and completion, from the split train, validation or test.

    A prompt belongs to the same split for every seed, so splits are disjoint. noise: share of the
    demonstrations in which the expert omits, changes or adds one slot; the prompts and the other
    demonstrations do not depend on it.
    """
    if split not in _SHARES:
        raise UserError(f"restaurant task: split is {split!r}, expected {', '.join(_SHARES)}")
    if size < 1:
        raise UserError(f"restaurant task: size is {size}, expected 1 or more")
    if not 0.0 <= noise <= 1.0:
        raise UserError(f"restaurant task: noise is {noise}, expected a share between 0 and 1")
    return [_demonstration(split, f"{split}/{seed}/{row}", noise) for row in range(size)]


def _demonstration(split: str, key: str, noise: float) -> dict[str, str]:
    prompt_rng, text_rng, noise_rng = (
        random.Random(f"{part}/{key}") for part in ("prompt", "text", "noise")
    )
    slots = _draw_slots(prompt_rng)
    while _bucket(meaning.render(slots)) not in _SHARES[split]:
        slots = _draw_slots(prompt_rng)
    said = slots
    if noise_rng.random() < noise:
        said = _in_order(_edit_slots(slots, noise_rng, fewest=2))
    return {"prompt": meaning.render(slots), "completion": realise(said, text_rng)}


def _draw_slots(rng: random.Random) -> dict[str, str]:
    chosen = {"name", *rng.sample(_OPTIONAL, rng.randint(2, len(_OPTIONAL)))}
    return {slot: rng.choice(list(PHRASES[slot])) for slot in SLOTS if slot in chosen}


def _bucket(prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 100


def realise(slots: Mapping[str, str], rng: random.Random) -> str:
    """One or two lower-case sentences that state the slots in a random order and wording."""
    parts: dict[str, list[str]] = {place: [] for place in Phrases._fields}
    stated = [slot for slot in slots if slot != "name"]
    for slot in rng.sample(stated, len(stated)):
        ways = PHRASES[slot][slots[slot]]._asdict()
        place = rng.choice([place for place, phrases in ways.items() if phrases])
        parts[place].append(rng.choice(ways[place]))
    noun = " ".join([*parts["before"], rng.choice(("restaurant", "place"))])
    article = "an" if noun[0] in "aeiou" else "a"
    return _sentences(slots["name"], f"{article} {noun}", parts["after"], parts["clause"], rng)


def _sentences(
    name: str, noun: str, after: list[str], clauses: list[str], rng: random.Random
) -> str:
    """Join name, noun phrase, the phrases after the noun, and verb phrases."""
    main = [
        " ".join((name, "is", noun, *after)),
        " ".join(("there is", noun, "called", name, *after)),
    ]
    if after:
        main.append(" ".join((after[0], "you find", noun, "called", name, *after[1:])))
    sentence = rng.choice(main)
    if not clauses:
        return f"{sentence}."
    *first, last = clauses
    does = f"{', '.join(first)} and {last}" if first else last
    return rng.choice((f"{sentence}. it {does}.", f"{sentence}, which {does}."))
