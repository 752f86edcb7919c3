"""Gold metric of the E2E NLG challenge: does a text state the slots of its prompt?

A checker by regular expressions counts missing, wrong and hallucinated slots. Their number over
the number of slots asked for is the slot error rate. Values with the same meaning are one: cheap
and less than £20, moderate and £20-25, high and more than £30; low and 1 out of 5, average and 3,
high and 5.

Results on the human references (4,672 of the development set, 4,693 of the test set):

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

The rows of slots are errors, hallucinated ones included, over the references that should state
the slot. Of the errors in both sets, 87 % are omissions and 12 % are other values.

To measure the checker's accuracy, references drawn at random were read. Of 50 that the checker
flags, 2 are right, and 4 of their 81 flags are mistakes of the checker (misspelt values such as
"Chines", and "rated and priced averagely"). Of 100 flagged references that were read earlier to
improve the rules, 5 were right, and 8 of 159 flags were mistakes. Of 150 that the checker passes, 1
has an error ("Crowne Plaza Hotel is a pub in Clowns" exchanges name and landmark without a "near").
The checker judges neither fluency nor claims outside the eight slots.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from irl_align.errors import UserError
from irl_align.tasks import e2e_patterns as patterns
from irl_align.tasks import mr as meaning
from irl_align.tasks.e2e_patterns import ORDER
from irl_align.tasks.e2e_statements import Statement, normalise, statements
from irl_align.tasks.gold import SlotError, SlotErrorRate


class Venue(NamedTuple):
    """A venue that a text names."""

    key: str
    """The venue's name without article, normalised."""
    landmark: bool
    """Whether a word such as "near" precedes the name."""


@dataclass(frozen=True)
class Prompt:
    """A parsed prompt, ready to compare with texts."""

    asked: dict[str, str]
    """Slot -> meaning, for the slots with fixed values."""
    name: str | None
    """Key of the venue to describe."""
    near: str | None
    """Key of the landmark."""
    slots: int
    """Number of slots."""
    venues: re.Pattern[str]
    """Finds the venues of E2E and those of the prompt."""
    keys: dict[str, str]
    """Group of the pattern `venues` -> key."""


_CLOSED_SLOTS = tuple(slot for slot in ORDER if slot in patterns.CLOSED)
_SLOT_BY_LOWER = {slot.lower(): slot for slot in ORDER}
_MEANING = {
    slot: {value.lower(): level for value, level in values.items()}
    for slot, values in patterns.CLOSED.items()
}


def slots_of(mr: str) -> dict[str, str]:
    """Slots of a prompt under the names of E2E; case does not matter.

    Raises UserError: E2E has no such slot or value.
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
    """A pattern that finds known and extra venues, and the key of each of its groups."""
    spellings = {key: re.escape(key) for key in extra} | _KEY_PATTERNS
    # Longest first, so that a name does not hide a longer one that begins with it.
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
    """The slots of the prompt ``mr`` that a text has wrong, with the kind of error.

    missing: asked for and not stated. wrong: stated with another value, or with two.
    hallucinated: stated but not asked for.
    """
    prompt = _prompt(mr)
    masked, venues = _mask_venues(prompt, normalise(text))
    wrong = _venue_errors(prompt, venues)
    stated = statements(masked)
    for slot in _CLOSED_SLOTS:
        error = _slot_error(prompt.asked.get(slot), stated[slot])
        if error is not None:
            wrong[slot] = error
    return wrong


def _slot_error(asked: str | None, stated: list[Statement]) -> SlotError | None:
    firm = [statement for statement in stated if statement.firm]
    if asked is None:
        return "hallucinated" if firm else None
    if any(asked not in statement.levels for statement in firm):
        return "wrong"
    return None if any(asked in statement.levels for statement in stated) else "missing"


def _mask_venues(prompt: Prompt, text: str) -> tuple[str, list[Venue]]:
    """Replace every venue by @, so that no name is read as food, price or area; list the venues."""
    venues: list[Venue] = []

    def mask(match: re.Match[str]) -> str:
        near = match["landmark"]
        venues.append(Venue(prompt.keys[match.lastgroup or ""], near is not None))
        return f"{near or ''}@"

    return prompt.venues.sub(mask, text), venues


def _venue_errors(prompt: Prompt, venues: list[Venue]) -> dict[str, SlotError]:
    """Errors in name and near, whose sets of values overlap."""
    wrong: dict[str, SlotError] = {}
    keys = {venue.key for venue in venues}
    strangers = [venue for venue in venues if venue.key not in (prompt.name, prompt.near)]
    # A text that names a second subject next to the right one contradicts itself.
    subjects = [v for v in strangers if not v.landmark and v.key not in _NEIGHBOUR_ONLY]
    landmarks = [v for v in strangers if v.landmark or v.key in _NEIGHBOUR_ONLY]
    if prompt.name is not None:
        if subjects:
            wrong["name"] = "wrong"
        elif prompt.name not in keys:
            named = any(not venue.landmark for venue in landmarks)
            wrong["name"] = "wrong" if named else "missing"
    if prompt.near is None:
        if landmarks and wrong.get("name") != "wrong":
            wrong["near"] = "hallucinated"
    elif prompt.near not in keys or landmarks:
        wrong["near"] = "wrong" if landmarks else "missing"
    if not wrong and _roles_swapped(prompt, venues):
        wrong = {"name": "wrong", "near": "wrong"}
    return wrong


def _roles_swapped(prompt: Prompt, venues: list[Venue]) -> bool:
    """Whether the text describes the landmark and puts the venue itself near it."""
    if prompt.name is None or prompt.near is None:
        return False
    own = [venue.landmark for venue in venues if venue.key == prompt.name]
    other = [venue.landmark for venue in venues if venue.key == prompt.near]
    return all(own) and not any(other)


def _check(prompt: str, completion: str) -> tuple[int, dict[str, SlotError]]:
    return _prompt(prompt).slots, errors(prompt, completion)


gold = SlotErrorRate(_check)
"""Gold metric; :class:`irl_align.tasks.gold.GoldMetric`."""


def edit(prompt: str, rng: random.Random, weights: Mapping[str, int] | None = None) -> str:
    """A neighbouring prompt with one slot added, dropped or changed in meaning.

    The name is never dropped. A prompt in lower case gives one in lower case. "restaurant" is
    neither added nor dropped, since a text may call any venue a restaurant. weights: relative
    frequencies of change, add and drop; the default of each is 1.
    """
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


def edit_values(prompt: str, rng: random.Random) -> str:
    """Like edit, but half of the edits change a value and a quarter each add or drop a slot."""
    return edit(prompt, rng, {"change": 2})


def _other_values(slot: str, value: str) -> list[str]:
    own = _MEANING[slot][value.lower()]
    return [other for other, level in patterns.CLOSED[slot].items() if level != own]
