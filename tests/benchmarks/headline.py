"""Print the E2E tables of README.md and recipes/results from runs recorded in the repository.

    python tests/benchmarks/headline.py
    python tests/benchmarks/headline.py --record runs/e2e-*-seed6    # add finished runs

`recorded.tar.gz` holds the recipe, metrics, summary and stages of every run, but no models and no
samples. `irl-align compare` takes its folders, once extracted, as it takes runs. Bold is better
than SFT (in the table of differences: than the other policy), paired by seed, beyond the 95% t
interval. A test compares both documents with what this prints.
"""

from __future__ import annotations

import argparse
import gzip
import io
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from irl_align.evaluation.compare.aggregate import (
    AnalysisOptions,
    Comparison,
    analyse,
    compare_runs,
)
from irl_align.evaluation.compare.policies import BEYOND_ENTROPY
from irl_align.evaluation.compare.run_tables import measure_column
from irl_align.training.run_folder import Run
from irl_align.utils.text_table import estimate_cell

ARCHIVE = Path(__file__).with_name("recorded.tar.gz")
FILES = ("recipe.yaml", "metrics.jsonl", "stages.json", "summary.json")
OUTPUT_DIR, DATA_PATH = "runs", "../data/e2e"
"""Replace the folders of the machine that ran a recipe in its recorded copy."""
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
"""Label of a row of the comparison -> its name in the tables."""
COLUMNS = {
    "slot errors, % T=1": (f"{ERRORS}@1",),
    "T=1, minus SFT at equal entropy": (BEYOND,),
    "T=0.7": (f"{ERRORS}@0.7",),
    "greedy": (f"{ERRORS}@0",),
    "fully right, % greedy": ("fully_right@0",),
    "BLEU T=1 / greedy": ("bleu@1", "bleu@0"),
    "KL to SFT": ("kl",),
    "length": ("length",),
}
"""Column -> its measures."""
NOT_IN_README = {
    *("e2e-dpo-fixed-ref 2", "e2e-irl-best-of-n 1", "e2e-irl-ppo-red 1", "e2e-irl-ppo-abc 1"),
    *("T=0.7", "fully right, % greedy", "length"),
}
"""Rows and columns that only the full table has."""
COMPARED = "e2e-irl-best-of-n 2"
AGAINST = ("SFT", "e2e-spin 2", "e2e-spin 1")
DIFFERENCES = {
    "greedy": f"{ERRORS}@0",
    "T=0.7": f"{ERRORS}@0.7",
    "T=1": f"{ERRORS}@1",
    "T=1, minus SFT at equal entropy": BEYOND,
    "BLEU greedy": "bleu@0",
}
WITHOUT_INTERVAL = ("bleu@1", "bleu@0", "kl", "length")
"""Measures whose intervals are only in comparison.csv."""


@contextmanager
def extracted(archive: Path = ARCHIVE) -> Iterator[Path]:
    """A temporary folder with the recorded runs."""
    with tempfile.TemporaryDirectory() as name:
        with tarfile.open(archive) as tar:
            tar.extractall(name, filter="data")
        yield Path(name)


@cache
def comparison(archive: Path = ARCHIVE) -> Comparison:
    """The recorded runs side by side, every iteration."""
    with extracted(archive) as folder:
        return compare_runs([Run.load(run) for run in sorted(folder.iterdir())], iterations=True)


@cache
def analysis(baseline: str) -> Mapping[str, Any]:
    """Means and intervals of the recorded runs, with differences from the policy `baseline`."""
    label = next(row.label for row in comparison().rows if short(row.label) == baseline)
    return analyse(comparison(), AnalysisOptions(baseline=label))


def short(label: str) -> str:
    """Label of a comparison without the policy update in brackets: `e2e-spin 2`."""
    return re.sub(r" \(.*\)$", "", label)


def readme_table() -> str:
    """Markdown of README.md's table: some rows and columns of the full one."""
    policies = [label for label in POLICIES if label not in NOT_IN_README]
    return _policy_table(policies, [column for column in COLUMNS if column not in NOT_IN_README])


def full_table() -> str:
    """Markdown of every policy and every column."""
    return _policy_table(POLICIES, COLUMNS)


def _policy_table(policies: Iterable[str], columns: Iterable[str]) -> str:
    against_sft = analysis("SFT")
    rows = _rows_by_label(against_sft)
    lines = []
    for label in policies:
        cells = []
        for column in columns:
            shown = [_cell(rows[label], measure, against_sft) for measure in COLUMNS[column]]
            cells.append(" / ".join(text for text in shown if text))
        lines.append([POLICIES[label], *cells])
    return _markdown(["policy", *columns], lines)


def differences_table() -> str:
    """Markdown of COMPARED minus each policy of AGAINST, paired by seed."""
    lines = []
    for other in AGAINST:
        against = analysis(other)
        differences = _rows_by_label(against)[COMPARED]["against_baseline"]
        cells = []
        for measure in DIFFERENCES.values():
            text = measure_column(measure, signed=True).text(estimate_cell(differences[measure]))
            cells.append(_bold_if_better(text, differences[measure], measure, against))
        lines.append([POLICIES[other], *cells])
    return _markdown([f"{POLICIES[COMPARED]}, minus …", *DIFFERENCES], lines)


def _rows_by_label(against: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {short(row["label"]): row for row in against["rows"]}


def _cell(row: Mapping[str, Any], measure: str, against: Mapping[str, Any]) -> str:
    if row["policy"] is None and measure == "fully_right@0":
        measure = "fully_right@1"  # human texts have no temperature
    if measure not in row["estimates"] or (measure == BEYOND and row["label"] == "SFT"):
        return ""
    estimate = row["estimates"][measure]
    with_interval = measure not in WITHOUT_INTERVAL and row["policy"] is not None
    cell = estimate_cell(estimate) if with_interval else estimate["mean"]
    text = measure_column(measure, signed=measure == BEYOND).text(cell)
    return _bold_if_better(text, row["against_baseline"].get(measure), measure, against)


def _bold_if_better(
    text: str, difference: Mapping[str, Any] | None, measure: str, against: Mapping[str, Any]
) -> str:
    """Bold if the whole interval of the difference lies on the better side of zero."""
    lower_is_better = measure == BEYOND or against["lower_is_better"].get(measure)
    if difference is None or difference["low"] is None or lower_is_better is None:
        return text
    better = difference["high"] < 0 if lower_is_better else difference["low"] > 0
    return f"**{text}**" if better else text


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def record(runs: Sequence[Path], archive: Path = ARCHIVE) -> None:
    """Add the files that the tables need of finished runs, without the names of folders."""
    texts = {}
    if archive.exists():
        with extracted(archive) as folder:
            texts = {
                path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
                for path in folder.glob("*/*")
            }
    for run in runs:
        if Run.load(run).summary is None:
            raise SystemExit(f"{run}: found no summary.json, expected a finished run")
        for name in FILES:
            text = (run / name).read_text(encoding="utf-8")
            texts[f"{run.name}/{name}"] = _without_folders(text) if name == FILES[0] else text
        print(f"{run.name}: recorded")
    _write(texts, archive)


def _without_folders(recipe: str) -> str:
    recipe = re.sub(r"(?m)^output_dir: .*$", f"output_dir: {OUTPUT_DIR}", recipe)
    return re.sub(r"(?m)^(data:\n(?:  .*\n)*?  path: ).*$", rf"\g<1>{DATA_PATH}", recipe)


def _write(texts: Mapping[str, str], archive: Path) -> None:
    """Write a tar.gz whose bytes depend only on the texts and their names."""
    with (
        gzip.GzipFile(archive, "wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for path, text in sorted(texts.items()):
            content = text.encode()
            info = tarfile.TarInfo(path)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, nargs="+", metavar="RUN", default=[])
    asked = parser.parse_args()
    if asked.record:
        record(asked.record)
    else:
        print("\n\n".join([readme_table(), full_table(), differences_table()]))
