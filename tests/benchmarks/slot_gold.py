"""Which slots do a run's policies get wrong on E2E, and how many errors are unseen pairs of venues?

    python tests/benchmarks/slot_gold.py runs/e2e-spin-seed{1,2,3} [--temperature 1]

Reads each policy's evaluation samples (greedy by default) of all runs. The output has for each
policy the errors over the slots asked for, by slot. The errors of `near` are also listed for
prompts whose name occurs with that neighbour in the train split, and for the others. For policies
after the first it also has what became of the slots that the first policy left out, got wrong and
had right.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from irl_align.data.cards import load_card
from irl_align.data.loading import load_demonstrations
from irl_align.tasks import e2e
from irl_align.tasks.e2e_patterns import ORDER
from irl_align.training.run_folder import Run

SEEN, UNSEEN = "near, seen pair", "near, unseen pair"
KINDS = ("right", "missing", "wrong")


def venues(prompt: str) -> tuple[str, str] | None:
    """Name and neighbour of a prompt that has both."""
    slots = e2e.slots_of(prompt)
    pair = [slots.get(slot, "").lower() for slot in ("name", "near")]
    return (pair[0], pair[1]) if all(pair) else None


def count_errors(
    rows: Iterable[tuple[str, str]], together: set[tuple[str, str] | None]
) -> tuple[Counter[str], Counter[str]]:
    """Slots asked for and slots in error of (prompt, text), by slot.

    near is also counted by whether `together` has that name with that neighbour.
    """
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
    """Errors over slots, for all slots and without unseen pairs of venues."""
    errors, slots = (sum(count[slot] for slot in ORDER) for count in (wrong, asked))
    rest = (errors - wrong[UNSEEN]) / (slots - asked[UNSEEN])
    return f"{errors / slots:.1%} in all, {rest:.1%} without {UNSEEN!r}"


def share(asked: Counter[str], wrong: Counter[str], slot: str) -> str:
    """Errors of one slot as text."""
    return f"{wrong[slot]:4} of {asked[slot]:4}  {wrong[slot] / max(1, asked[slot]):.1%}"


def count_changes(rows: Iterable[tuple[str, str, str]]) -> Counter[tuple[str, str]]:
    """Count (before, after) over the slots that (prompt, first text, second text) ask for.

    Each of the two is right, missing or wrong.
    """
    changes = Counter[tuple[str, str]]()
    for prompt, *texts in rows:
        before, after = (e2e.errors(prompt, text) for text in texts)
        for slot in e2e.slots_of(prompt):
            changes[before.get(slot, "right"), after.get(slot, "right")] += 1
    return changes


def change_lines(changes: Counter[tuple[str, str]]) -> Iterator[str]:
    """Lines with the share of slots by what became of them."""
    for was in ("missing", "wrong", "right"):
        now = {after: changes[was, after] / changes.total() for after in KINDS}
        shares = ", ".join(f"{after} {share:.2%}" for after, share in now.items())
        yield f"  was {was} {sum(now.values()):.2%}: now {shares}"


def main(folders: Sequence[Path], temperature: str) -> None:
    """Print a line per policy and slot."""
    data = Run.load(folders[0]).recipe["data"]
    train = load_demonstrations(load_card(data["card"]), "train", data["path"])
    together = {venues(str(row["prompt"])) for row in train}
    texts: dict[int, dict[tuple[Path, str], str]] = {}
    for folder in folders:
        for path in (folder / "samples").glob(f"policy-*-t{temperature}.jsonl"):
            number = re.match(r"policy-(\d+)-", path.name)
            assert number is not None
            for row in map(json.loads, path.read_text().splitlines()):
                texts.setdefault(int(number[1]), {})[folder, row["prompt"]] = row["completion"]
    for policy, answers in sorted(texts.items()):
        asked, wrong = count_errors(((p, text) for (_, p), text in answers.items()), together)
        print(f"policy {policy}: {summary(asked, wrong)}")
        if policy:
            first = texts[0]
            changed = ((key[1], first[key], text) for key, text in answers.items())
            print("\n".join(change_lines(count_changes(changed))))
        for slot in sorted(asked, key=lambda slot: -wrong[slot]):
            print(f"  {slot:20} {share(asked, wrong, slot)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--temperature", default="0", help="as in the names of the samples' files")
    chosen = parser.parse_args()
    main(chosen.runs, chosen.temperature)
