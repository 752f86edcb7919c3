"""Meaning representations: ``name[Blue Spice], eatType[coffee shop], area[riverside]``."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from irl_align.errors import UserError

_SLOT = re.compile(r"\s*([^\[\],]+?)\s*\[\s*([^\[\]]*?)\s*\]\s*(?:,|$)")


def parse(mr: str) -> dict[str, str]:
    """Slots of a meaning representation, in its order.

    Raises UserError: the text is not a list of ``slot[value]``, or a slot is repeated.
    """
    slots: dict[str, str] = {}
    position = 0
    while position < len(mr):
        match = _SLOT.match(mr, position)
        if match is None or match[1] in slots:
            raise UserError(
                f"prompt {mr!r}: found {mr[position:]!r}, expected slot[value], each slot once"
            )
        slots[match[1]] = match[2]
        position = match.end()
    if not slots:
        raise UserError(f"prompt {mr!r}: found no slot, expected slot[value], slot[value], ...")
    return slots


def render(slots: Mapping[str, str]) -> str:
    """Write slots as a meaning representation, in the mapping's order."""
    return ", ".join(f"{slot}[{value}]" for slot, value in slots.items())


def edit(
    slots: Mapping[str, str],
    changes: Mapping[str, Sequence[str]],
    additions: Mapping[str, Sequence[str]],
    droppable: Sequence[str],
    rng: random.Random,
    weights: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """Slots with one of them changed, added or dropped, so that they ask for something else.

    changes: slot -> values that differ in meaning from the present one. additions: missing slot
    -> values. droppable: slots that may be dropped. weights: relative frequencies of change, add
    and drop; the default of each is 1. The order is kept; an added slot comes last.
    """
    changes, additions = (
        {slot: values for slot, values in options.items() if values}
        for options in (changes, additions)
    )
    actions = {"change": list(changes), "add": list(additions), "drop": list(droppable)}
    possible = [name for name, candidates in actions.items() if candidates]
    action = rng.choice([name for name in possible for _ in range((weights or {}).get(name, 1))])
    slot = rng.choice(actions[action])
    if action == "drop":
        return {kept: value for kept, value in slots.items() if kept != slot}
    values = changes[slot] if action == "change" else additions[slot]
    return {**slots, slot: rng.choice(values)}
