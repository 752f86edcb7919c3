"""What a text states of the E2E NLG slots with fixed values, found by regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Literal, NamedTuple

from irl_align.tasks import e2e_patterns as patterns
from irl_align.tasks.e2e_patterns import HIGH, LOW, MID, OFF_SCALE

Levels = frozenset[str]


class Statement(NamedTuple):
    """What one phrase of a text says of a slot."""

    levels: Levels
    """The meanings that the phrase leaves open."""
    firm: bool
    """Whether the phrase contradicts other meanings; if not, it only supports its own."""


_PLAIN = str.maketrans(
    "éèêëáàâíóöúüçñ`\u2019\u00b4\u2010\u2011\u2013\u2014", "eeeeaaaioouucn'''----"
)
_HYPHEN = re.compile(r"(?<=[a-z])- ?(?=[a-z0-9])|(?<=[0-9])-(?=[a-z])")
_BLANKS = re.compile(r"\s+")


def normalise(text: str) -> str:
    """The text in lower case, without accents, hyphens between words and repeated blanks."""
    plain = text.lower().translate(_PLAIN)
    return _BLANKS.sub(" ", _HYPHEN.sub(" ", plain)).strip()


def statements(masked: str) -> dict[str, list[Statement]]:
    """What a normalised text with masked venues says of each slot with fixed values."""
    ratings, prices = (
        list(pattern.finditer(masked)) for pattern in (patterns.RATING, patterns.PRICE)
    )
    # A phrase that names a rating or a price says nothing else: "average price" is no rating.
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
    pattern: re.Pattern[str], text: str, meaning: Mapping[str, Statement]
) -> Iterable[Statement]:
    """Statements of a pattern; `meaning` maps each of its groups to a statement."""
    return (meaning[match.lastgroup or ""] for match in pattern.finditer(text))


@lru_cache(maxsize=4096)
def _levels(word: str, kind: Literal["rating", "price"]) -> Levels:
    """Levels that an adjective of a rating or a price leaves open."""
    words = patterns.RATING_WORDS if kind == "rating" else patterns.PRICE_WORDS
    return next(levels for levels, pattern in words.items() if re.fullmatch(pattern, word))


_COUNTS = dict.fromkeys(("1", "one"), LOW) | dict.fromkeys(("3", "three"), MID)
_COUNTS |= dict.fromkeys(("5", "five"), HIGH)
_COUNTS |= dict.fromkeys(("2", "two", "4", "four"), OFF_SCALE)


def _ratings(matches: Iterable[re.Match[str]]) -> Iterable[Statement]:
    for match in matches:
        word = (
            match["count"] or match["stars"] or match["points"] or match["before"] or match["after"]
        )
        yield Statement(_COUNTS.get(word) or _levels(word, "rating"), True)


def _prices(matches: Iterable[re.Match[str]]) -> Iterable[Statement]:
    for match in matches:
        if word := match["before"] or match["after"] or match["alone"]:
            yield Statement(_levels(word, "price"), True)
        elif levels := _money_levels(match):
            yield Statement(levels, True)


def _money_levels(match: re.Match[str]) -> Levels | None:
    """Levels of an amount or a range of amounts; the limits of E2E are 20 and 30 pounds."""
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
