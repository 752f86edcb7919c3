"""The README's E2E tables, from runs that are recorded in the repository.

    python tests/benchmarks/headline.py
    python tests/benchmarks/headline.py --record runs/e2e-*-seed6    # keep what the tables read

A run's recipe, metrics, summary and stages are kept, with neither models nor samples;
`irl-align compare` takes these folders as it takes runs. Bold is ahead of SFT (in differences of
the other), paired by seed, beyond the 95% t interval. A test holds the README to what this prints.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from irl_align.evaluation.compare.aggregate import BEYOND_ENTROPY, Comparison, analyse, compare_runs
from irl_align.evaluation.compare.tables import interval
from irl_align.training.run_folder import Run

RECORDED = Path(__file__).parent / "recorded" / "e2e"
FILES = ("recipe.yaml", "metrics.jsonl", "stages.json", "summary.json")
HOME = {"output_dir": "runs", "path": "../data/e2e"}
"""What stands in a recorded recipe in place of folders of the machine that ran it."""
ERRORS = "slot_error_rate"
BEYOND = f"{ERRORS}@{BEYOND_ENTROPY}"
POLICIES = {
    "demonstrations": "human references",
    "SFT": "SFT",
    "e2e-sft-more 1": "one more SFT epoch",
    "e2e-spin 1": "SPIN, 1 iteration",
    "e2e-spin 2": "SPIN, 2 iterations",
    "e2e-dpo-fixed-ref 2": "DPO, reference fixed at SFT, 2 iterations (its first is SPIN's)",
    "e2e-irl-best-of-n 1": "IRL, Best-of-N, 1 iteration",
    "e2e-irl-best-of-n 2": "IRL, Best-of-N, 2 iterations",
    "e2e-irl-ppo 1": "IRL, PPO, sparse credit",
    "e2e-irl-ppo-red 1": "IRL, PPO, RED",
    "e2e-irl-ppo-abc 1": "IRL, PPO, ABC",
}
"""Label of a row of the comparison -> the name that the README gives it."""
COLUMNS = {
    "slot errors, % T=1": (f"{ERRORS}@1",),
    "less SFT's at the same entropy": (BEYOND,),
    "T=0.7": (f"{ERRORS}@0.7",),
    "greedy": (f"{ERRORS}@0",),
    "fully right, % greedy": ("fully_right@0",),
    "BLEU T=1 / greedy": ("bleu@1", "bleu@0"),
    "KL to SFT": ("kl",),
    "length": ("length",),
}
AGAINST = ("SFT", "e2e-spin 2", "e2e-spin 1")
DIFFERENCES = {
    "greedy": f"{ERRORS}@0",
    "T=0.7": f"{ERRORS}@0.7",
    "T=1": f"{ERRORS}@1",
    "T=1, at SFT's entropy": BEYOND,
    "BLEU greedy": "bleu@0",
}
WITHOUT_INTERVAL = ("bleu@1", "bleu@0", "kl", "length")
"""Measures whose intervals are left to comparison.csv."""


@cache
def comparison(folder: Path = RECORDED) -> Comparison:
    """The recorded runs side by side, every iteration."""
    return compare_runs([Run.load(run) for run in sorted(folder.iterdir())], iterations=True)


def short(label: str) -> str:
    """A comparison's label without what the policy was made by: `e2e-spin 2`."""
    return re.sub(r" \(.*\)$", "", label)


def rows_by_label(analysis: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The rows of an analysis by the labels of POLICIES."""
    found = {short(row["label"]): row for row in analysis["rows"]}
    return {label: found[label] for label in POLICIES if label in found}


def is_ahead(against: Mapping[str, Any], measure: str, analysis: Mapping[str, Any]) -> bool:
    """Whether a difference lies on the better side of zero with all of its interval."""
    lower = measure == BEYOND or analysis["lower_is_better"].get(measure)
    if against["low"] is None or lower is None:
        return False
    return bool(against["high"] < 0 if lower else against["low"] > 0)


def headline_table(analysis: Mapping[str, Any]) -> Iterator[str]:
    """Rows of the first table, from an analysis against SFT."""
    for label, row in rows_by_label(analysis).items():
        cells = []
        for measures in COLUMNS.values():
            shown = [_cell(row, measure, analysis) for measure in measures]
            cells.append(" / ".join(text for text in shown if text))
        yield _line([POLICIES[label], *cells])


def _cell(row: Mapping[str, Any], measure: str, analysis: Mapping[str, Any]) -> str:
    if row["policy"] is None and measure == "fully_right@0":
        measure = "fully_right@1"  # people's texts are of no temperature
    if measure not in row["estimates"] or (measure == BEYOND and row["label"] == "SFT"):
        return ""
    signed = measure == BEYOND
    method = None if measure in WITHOUT_INTERVAL or row["policy"] is None else analysis["interval"]
    text = interval(row["estimates"][measure], measure, method, signed)
    against = row["against_baseline"].get(measure)
    return f"**{text}**" if against and is_ahead(against, measure, analysis) else text


def differences_table(found: Comparison, label: str) -> Iterator[str]:
    """Rows of the second table: the policy of `label` less others, by seed."""
    for other in AGAINST:
        base = next(row.label for row in found.rows if short(row.label) == other)
        analysis = analyse(found, None, base)
        against = rows_by_label(analysis)[label]["against_baseline"]
        cells = []
        for measure in DIFFERENCES.values():
            text = interval(against[measure], measure, analysis["interval"], signed=True)
            ahead = is_ahead(against[measure], measure, analysis)
            cells.append(f"**{text}**" if ahead else text)
        yield _line([POLICIES[other], *cells])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def tables(folder: Path = RECORDED, label: str = "e2e-irl-best-of-n 2") -> Iterator[str]:
    """Both tables of the README as lines of Markdown."""
    found = comparison(folder)
    analysis = analyse(found, None, None)
    yield _line(["policy", *COLUMNS])
    yield _line(["---", *["---:"] * len(COLUMNS)])
    yield from headline_table(analysis)
    yield ""
    yield _line([f"{POLICIES[label]}, less …", *DIFFERENCES])
    yield _line(["---", *["---:"] * len(DIFFERENCES)])
    yield from differences_table(found, label)


def record(runs: Sequence[Path], folder: Path = RECORDED) -> None:
    """Keep what the tables read of finished runs, without the names of folders."""
    for run in runs:
        view = Run.load(run)
        if view.summary is None:
            raise SystemExit(f"{run}: found no summary.json, expected a finished run")
        kept = folder / run.name
        kept.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(run / name, kept / name)
        recipe = kept / "recipe.yaml"
        text = recipe.read_text(encoding="utf-8")
        text = re.sub(r"(?m)^output_dir: .*$", f"output_dir: {HOME['output_dir']}", text)
        text = re.sub(r"(?m)^(data:\n(?:  .*\n)*?  path: ).*$", rf"\g<1>{HOME['path']}", text)
        recipe.write_text(text, encoding="utf-8")
        print(f"{kept.relative_to(folder.parent)}: kept")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, nargs="+", metavar="RUN", default=[])
    asked = parser.parse_args()
    if asked.record:
        record(asked.record)
    else:
        print("\n".join(tables()))
