"""Whether a reward checks E2E's slots: a text's own prompt against one with a slot changed.

    python tests/benchmarks/slot_contrast.py DATA REWARD_MODEL [REWARD_MODEL ...]

Of demonstrations of the test split, by slot: how often the reward of a text is higher under its own
prompt than under the prompt with another value of that slot, half of it for ties.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict

from irl_align.cards import load_card
from irl_align.data import load_demonstrations
from irl_align.reward.model import RewardModel
from irl_align.tasks import e2e
from irl_align.tasks import e2e_patterns as patterns
from irl_align.tasks import mr as meaning

PAIRS = 250  # per slot
SLOTS = [slot for slot in e2e.ORDER if slot != "eatType"]


def changed(prompt: str, slot: str, rng: random.Random) -> str | None:
    """The prompt with another value of a slot; None where it does not ask for the slot."""
    slots = e2e.slots_of(prompt)
    if slot not in slots:
        return None
    venues = {"name": patterns.NAMES, "near": patterns.NEIGHBOURS}
    if slot in venues:
        others = [name for name in venues[slot] if name not in slots.values()]
    else:
        own = patterns.CLOSED[slot].get(slots[slot])
        others = [value for value, level in patterns.CLOSED[slot].items() if level != own]
    return meaning.render({**slots, slot: rng.choice(others)})


def main(data: str, *models: str) -> None:
    """Print a line per reward."""
    rows = load_demonstrations(load_card("e2e_nlg"), "test", data)
    rng = random.Random(0)
    rng.shuffle(rows)
    pairs: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for row in rows:
        prompt = str(row["prompt"])
        for slot in SLOTS:
            other = changed(prompt, slot, rng) if len(pairs[slot]) < PAIRS else None
            if other is not None:
                pairs[slot].append((prompt, other, row["completion"]))
    for path in models:
        reward = RewardModel.from_pretrained(path)
        found = []
        for slot in SLOTS:
            own, other, text = (list(column) for column in zip(*pairs[slot], strict=True))
            gap = reward.score(own, text) - reward.score(other, text)
            found.append(
                f"{slot} {float((gap > 0).float().mean() + (gap == 0).float().mean() / 2):.1%}"
            )
        print(f"{path}: {', '.join(found)}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
