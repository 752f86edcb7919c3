"""Does a reward check E2E's slots? Scores the same text under two prompts that differ in one slot.

    python tests/benchmarks/slot_contrast.py DATA SPLIT REWARD_MODEL [REWARD_MODEL ...]

The first line has for each slot: how often the reward of a demonstration is higher under its own
prompt than under the prompt with another value of that slot (ties count half); how often the reward
of a demonstration with the other value is higher under the changed prompt; and the mean of both
gaps in the reward's units. A reward that only recognises prompts that nobody demonstrated gets the
first right and the second wrong. The second line has the same for prompts with one slot more than
the text answers, instead of another value.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable

from irl_align.data.cards import load_card
from irl_align.data.contrast import contrast_pairs
from irl_align.data.loading import load_demonstrations
from irl_align.data.rows import prompt_key
from irl_align.reward.model import RewardModel
from irl_align.tasks import e2e
from irl_align.tasks import e2e_patterns as patterns
from irl_align.tasks import mr as meaning

TEXTS = 600  # demonstrations; a slot uses those whose prompt asks for it
SLOTS = [slot for slot in patterns.ORDER if slot != "eatType"]

Edit = Callable[[str, random.Random], str]
Pair = tuple[str, str, str]  # preferred prompt, rejected prompt, the text of both


def changing(slot: str) -> Edit:
    """An edit that gives a slot another value, if the prompt asks for that slot."""
    venues = {"name": patterns.NAMES, "near": patterns.NEIGHBOURS}

    def edit(prompt: str, rng: random.Random) -> str:
        slots = e2e.slots_of(prompt)
        if slot not in slots:
            return prompt
        if slot in venues:
            used = {value.lower() for value in slots.values()}
            others = [name for name in venues[slot] if name.lower() not in used]
        else:
            levels = {value.lower(): level for value, level in patterns.CLOSED[slot].items()}
            own = levels[slots[slot].lower()]
            others = [value for value, level in patterns.CLOSED[slot].items() if level != own]
        text = meaning.render({**slots, slot: rng.choice(others)})
        return text.lower() if prompt == prompt.lower() else text

    return edit


def adding(slot: str) -> Edit:
    """An edit that adds a slot, if the prompt does not have it."""
    values = patterns.NEIGHBOURS if slot == "near" else list(patterns.CLOSED.get(slot, ()))

    def edit(prompt: str, rng: random.Random) -> str:
        slots = e2e.slots_of(prompt)
        if slot in slots or not values:
            return prompt
        slots[slot] = rng.choice(values)
        text = meaning.render({name: slots[name] for name in patterns.ORDER if name in slots})
        return text.lower() if prompt == prompt.lower() else text

    return edit


def both_ways(rows: list[dict[str, str]], edit: Edit) -> tuple[list[Pair], list[Pair]]:
    """Pairs whose text answers the original prompt, and pairs whose text answers the edited one."""
    demonstrations = [
        {
            "prompt": row["prompt"],
            "messages": "",  # prompts are texts
            "prompt_key": prompt_key(row["prompt"]),
            "prompt_ids": [*map(ord, row["prompt"])],
            "completion_ids": [*map(ord, row["completion"])],
        }
        for row in rows
    ]
    pairs = contrast_pairs(
        demonstrations,
        "edit",
        crossed=True,
        edit=edit,
        encode=lambda texts: [[*map(ord, str(text))] for text in texts],
    ).rows
    own = {row["prompt"] for row in rows}
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for row in pairs:
        preferred, rejected, text = (
            "".join(map(chr, row[part]))
            for part in ("prompt_ids", "rejected_prompt_ids", "chosen_ids")
        )
        sides[preferred not in own].append((preferred, rejected, text))
    return sides


def right(reward: RewardModel, pairs: list[Pair]) -> tuple[float, float]:
    """Share of pairs with the higher reward for the preferred prompt, and the mean gap."""
    preferred, rejected, texts = (list(column) for column in zip(*pairs, strict=True))
    gap = reward.score(preferred, texts) - reward.score(rejected, texts)
    share = (gap > 0).float().mean() + (gap == 0).float().mean() / 2
    return float(share), float(gap.mean())


def main(data: str, split: str, *models: str) -> None:
    """Print a line per reward."""
    rows = [
        {"prompt": str(row["prompt"]), "completion": str(row["completion"])}
        for row in load_demonstrations(load_card("e2e_nlg"), split, data)
    ]
    random.Random(0).shuffle(rows)
    edits = {"changed": (changing, SLOTS), "added": (adding, SLOTS[1:])}  # all have a name
    pairs = {
        how: {slot: both_ways(rows[:TEXTS], make(slot)) for slot in slots}
        for how, (make, slots) in edits.items()
    }
    for path in models:
        reward = RewardModel.from_pretrained(path)
        for how, by_slot in pairs.items():
            cells = []
            for slot, sides in by_slot.items():
                (own, gap), (other, other_gap) = (right(reward, side) for side in sides)
                cells.append(f"{slot} {own:.1%} / {other:.1%} ({(gap + other_gap) / 2:+.2f})")
            print(f"{path}, {how}: {', '.join(cells)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("split")
    parser.add_argument("models", nargs="+")
    chosen = parser.parse_args()
    main(chosen.data, chosen.split, *chosen.models)
