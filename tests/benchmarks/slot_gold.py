"""Which slots a run's policies get wrong on E2E, and how much is of venues never seen together.

    python tests/benchmarks/slot_gold.py runs/e2e-spin-seed1 [TEMPERATURE]

Of each policy's evaluation samples (greedy ones unless told): errors over the slots asked for, by
slot; and of `near`, over prompts whose name goes with that neighbour in train, and over others.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from irl_align.cards import load_card
from irl_align.data import load_demonstrations
from irl_align.stages import Run
from irl_align.tasks import e2e


def venues(prompt: str) -> tuple[str, str] | None:
    """Name and neighbour of a prompt that has both."""
    slots = e2e.slots_of(prompt)
    pair = [slots.get(slot, "").lower() for slot in ("name", "near")]
    return (pair[0], pair[1]) if all(pair) else None


def main(folder: Path, temperature: str = "0") -> None:
    """Print a line per policy and slot."""
    data = Run.load(folder).recipe["data"]
    train = load_demonstrations(load_card(data["card"]), "train", data["path"])
    together = {venues(str(row["prompt"])) for row in train}
    for path in sorted((folder / "samples").glob(f"policy-*-t{temperature}.jsonl")):
        asked, wrong = Counter[str](), Counter[str]()
        for row in map(json.loads, path.read_text().splitlines()):
            slots = list(e2e.slots_of(row["prompt"]))
            errors = set(e2e.errors(row["prompt"], row["completion"]))
            if (pair := venues(row["prompt"])) is not None:
                seen = "near, seen so" if pair in together else "near, never seen so"
                slots += [seen]
                errors |= {seen} if "near" in errors else set()
            asked.update(slots)
            wrong.update(errors)
        errors, slots = (sum(count[slot] for slot in e2e.ORDER) for count in (wrong, asked))
        unseen = "near, never seen so"
        rest = (errors - wrong[unseen]) / (slots - asked[unseen])
        print(f"{path.name}: {errors / slots:.1%} in all, {rest:.1%} without {unseen!r}")
        for slot in sorted(asked, key=lambda slot: -wrong[slot]):
            print(
                f"  {slot:20} {wrong[slot]:4} of {asked[slot]:4}  {wrong[slot] / asked[slot]:.1%}"
            )


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), *sys.argv[2:])
