"""Which slots a run's policies get wrong on E2E, and how much is of venues never seen together.

    python tests/benchmarks/slot_gold.py runs/e2e-spin-seed1 [TEMPERATURE]

Of each policy's evaluation samples (greedy ones unless told): errors over the slots asked for, by
slot; and of `near`, over prompts whose name goes with that neighbour in train, and over others.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from irl_align.cards import load_card
from irl_align.data import load_demonstrations
from irl_align.stages import Run
from irl_align.tasks import e2e

SEEN, UNSEEN = "near, seen so", "near, never seen so"


def venues(prompt: str) -> tuple[str, str] | None:
    """Name and neighbour of a prompt that has both."""
    slots = e2e.slots_of(prompt)
    pair = [slots.get(slot, "").lower() for slot in ("name", "near")]
    return (pair[0], pair[1]) if all(pair) else None


def count_errors(
    rows: Iterable[tuple[str, str]], together: set[tuple[str, str] | None]
) -> tuple[Counter[str], Counter[str]]:
    """Slots asked for and wrong, of (prompt, text), by slot; near apart by whether `together` has
    that name with that neighbour."""
    asked, wrong = Counter[str](), Counter[str]()
    for prompt, text in rows:
        slots, errors = list(e2e.slots_of(prompt)), set(e2e.errors(prompt, text))
        if (pair := venues(prompt)) is not None:
            kind = SEEN if pair in together else UNSEEN
            slots += [kind]
            errors |= {kind} if "near" in errors else set()
        asked.update(slots)
        wrong.update(errors)
    return asked, wrong


def summary(asked: Counter[str], wrong: Counter[str]) -> str:
    """Errors over slots, in all and without venues never seen together."""
    errors, slots = (sum(count[slot] for slot in e2e.ORDER) for count in (wrong, asked))
    rest = (errors - wrong[UNSEEN]) / (slots - asked[UNSEEN])
    return f"{errors / slots:.1%} in all, {rest:.1%} without {UNSEEN!r}"


def share(asked: Counter[str], wrong: Counter[str], slot: str) -> str:
    """Errors of one slot, in words."""
    return f"{wrong[slot]:4} of {asked[slot]:4}  {wrong[slot] / max(1, asked[slot]):.1%}"


def main(folder: Path, temperature: str = "0") -> None:
    """Print a line per policy and slot."""
    data = Run.load(folder).recipe["data"]
    train = load_demonstrations(load_card(data["card"]), "train", data["path"])
    together = {venues(str(row["prompt"])) for row in train}
    for path in sorted((folder / "samples").glob(f"policy-*-t{temperature}.jsonl")):
        rows = map(json.loads, path.read_text().splitlines())
        asked, wrong = count_errors(((r["prompt"], r["completion"]) for r in rows), together)
        print(f"{path.name}: {summary(asked, wrong)}")
        for slot in sorted(asked, key=lambda slot: -wrong[slot]):
            print(f"  {slot:20} {share(asked, wrong, slot)}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), *sys.argv[2:])
