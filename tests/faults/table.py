"""The table of a run of cases: faults.json and faults.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from irl_align.utils.files import atomic_write, to_json

from .harness import Outcome


def write(folder: Path, outcomes: Sequence[Outcome], seed: int) -> None:
    """Write both files."""
    atomic_write(folder / "faults.json", to_json([asdict(o) for o in outcomes], indent=1) + "\n")
    atomic_write(folder / "faults.md", markdown(outcomes, seed))


def markdown(outcomes: Sequence[Outcome], seed: int) -> str:
    """A line per case below a summary by kind."""
    won = sum(not outcome.wrong for outcome in outcomes)
    lines = [f"# Faults: {won} of {len(outcomes)} cases won (seed {seed})", ""]
    lines += ["| kind | cases | won |", "| --- | ---: | ---: |"]
    for kind in sorted({outcome.kind for outcome in outcomes}):
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        lines.append(f"| {kind} | {len(of_kind)} | {sum(not o.wrong for o in of_kind)} |")
    if over := [o.overhead for o in outcomes if o.overhead is not None]:
        lines += [
            "",
            "Processor time of killed loops beyond an undisturbed one's (work since the last "
            "checkpoint done again, and reading what is there): median "
            f"{statistics.median(over):.0%}.",
        ]
    lines += ["", "| case | loop | fault | the command with it | commands after it | verdict |"]
    lines += ["| ---: | --- | --- | --- | ---: | --- |"]
    for o in outcomes:
        cells = (
            o.number,
            o.loop,
            o.fault,
            o.first,
            o.attempts,
            "; ".join(o.wrong) or "same weights",
        )
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
