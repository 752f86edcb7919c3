"""`irl-align evaluate` as a whole: preference sets, the best-of-n curve and judges, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irl_align.best_of_curve import best_of_curve
from irl_align.errors import UserError
from irl_align.evaluation_tables import FILE, subject_of
from irl_align.files import atomic_write, to_json
from irl_align.policy_eval import judged
from irl_align.preference_eval import Subject, evaluate, load_set, subject
from irl_align.stages import Run, is_run


@dataclass(frozen=True)
class Evaluation:
    """What is to be evaluated of a run or a model's folder."""

    cards: Sequence[str] = ()
    """Preference sets, `CARD` or `CARD=PATH`."""
    split: str | None = None
    """Their split; default test."""
    train_split: str | None = None
    """Split on which a reward is trained to compare with."""
    beside: Sequence[Path] = ()
    """Other runs or rewards that score the same pairs."""
    sft: Path | None = None
    """Model of the log-prob baselines."""
    best_of: int | None = None
    """N of the best-of-n curve."""
    prompts: int | None = None
    """Number of its prompts; None is all."""
    judges: Sequence[Path] = ()
    """Runs or rewards that judge the run's samples."""


def evaluate_source(
    source: Path, asked: Evaluation, device: str = "auto", output: Path | None = None
) -> dict[str, Any]:
    """Evaluate a run, a reward or a policy, and write what was found to `output`.

    Of a run the default is evaluation.json in its folder. Raises UserError.
    """
    if not asked.cards and asked.best_of is None and not asked.judges:
        raise UserError("evaluate: found none of --card, --best-of and --judge, expected one")
    if asked.train_split is not None and asked.train_split == (asked.split or "test"):
        raise UserError(
            f"--train-split: found {asked.train_split!r}, which is evaluated on; expected another"
        )
    sets: list[dict[str, Any]] = []
    curve = None
    if asked.best_of is not None:
        curve = best_of_curve(source, asked.best_of, asked.prompts, device)
    if asked.cards:
        what = subject(source, asked.sft, asked.beside)
        sets = [_on_set(what, spec, asked, device) for spec in asked.cards]
    judgements = [judged(source, judge, device) for judge in asked.judges]
    found: dict[str, Any] = {
        "source": source.name,
        "sets": sets,
        "best_of": curve,
        "judged": judgements,
    }
    if is_run(source):
        found["of"] = subject_of(Run.load(source))
        output = output or source / FILE
    if output is not None:
        atomic_write(output, to_json(found, indent=2) + "\n")
    return found


def _on_set(what: Subject, spec: str, asked: Evaluation, device: str) -> dict[str, Any]:
    train = load_set(spec, asked.train_split) if asked.train_split is not None else None
    return evaluate(what, load_set(spec, asked.split), device, train)
