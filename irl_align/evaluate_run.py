"""`irl-align evaluate` as a whole: preference sets, best-of-n, judges and benchmarks, as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irl_align.best_of_curve import best_of_curve
from irl_align.chat_endpoint import Endpoint
from irl_align.endpoint_judge import judged_by
from irl_align.errors import UserError
from irl_align.evaluation_tables import FILE, read_evaluation, subject_of
from irl_align.files import atomic_write, to_json
from irl_align.harness import run_benchmarks
from irl_align.leaderboard import benchmarks
from irl_align.policy_eval import judged
from irl_align.preference_eval import Subject, evaluate, is_classifier, load_set, subject
from irl_align.stages import Run, is_run

NAMES = {
    "sets": ("card", "split"),
    "judged": ("judge",),
    "judged_by_chat": ("judge", "url"),
    "benchmarks": ("task", "shots", "limit", "lm_eval"),
}
"""Section of an evaluation -> what tells its entries apart."""


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
    backend: str | None = None
    """What samples for it; default: the run's."""
    prompts: int | None = None
    """Number of its and of the endpoints' prompts; None is all."""
    judges: Sequence[Path] = ()
    """Runs or rewards that judge the run's samples."""
    endpoints: Sequence[Endpoint] = ()
    """Chat models that judge the run's samples."""
    benchmarks: str | None = None
    """Tasks of lm-eval, `TASK[@SHOTS],...`."""
    tasks_folder: Path | None = None
    """Task files of lm-eval besides its own."""
    limit: int | None = None
    """Rows per task of lm-eval."""


def evaluate_source(
    source: Path, asked: Evaluation, device: str = "auto", output: Path | None = None
) -> dict[str, Any]:
    """Evaluate a run, a reward or a policy, and write what was found to `output`.

    Of a run the default is evaluation.json in its folder. Raises UserError.
    """
    _check(source, asked)
    found: dict[str, Any] = {"source": source.name, "best_of": None}
    found |= {section: [] for section in NAMES}
    before = None
    if is_run(source):
        view = Run.load(source)
        found["of"] = subject_of(view)
        if output is None:  # what was found before stays, unless it is found anew
            output, before = source / FILE, read_evaluation(view)
    for section, part in _parts(source, asked, device):
        found[section] = part
        if output is not None:  # after each part: a later one may fail
            atomic_write(output, to_json(merged(before, found), indent=2) + "\n")
    return found


def _parts(source: Path, asked: Evaluation, device: str) -> Iterator[tuple[str, Any]]:
    """(section, what was found) of all that was asked for, one after another."""
    if asked.best_of is not None:
        yield (
            "best_of",
            best_of_curve(source, asked.best_of, asked.prompts, device, asked.backend),
        )
    if asked.cards:
        what = subject(source, asked.sft, asked.beside)
        yield "sets", [_on_set(what, spec, asked, device) for spec in asked.cards]
    if asked.judges:
        yield "judged", [judged(source, judge, device) for judge in asked.judges]
    if asked.endpoints:
        yield "judged_by_chat", [judged_by(source, e, asked.prompts) for e in asked.endpoints]
    if asked.benchmarks is not None:
        yield "benchmarks", _benchmarks(source, asked, device)


def _check(source: Path, asked: Evaluation) -> None:
    """Raise UserError for what is contradictory or nothing, before any work."""
    options = (asked.cards, asked.judges, asked.endpoints)
    if not any(options) and asked.best_of is None and asked.benchmarks is None:
        raise UserError(
            "evaluate: found none of --card, --best-of, --judge and --lm-eval, expected one"
        )
    if asked.train_split is not None and asked.train_split == (asked.split or "test"):
        raise UserError(
            f"--train-split: found {asked.train_split!r}, which is evaluated on; expected another"
        )
    if asked.benchmarks is not None:
        benchmarks(asked.benchmarks)
        if not is_run(source) and is_classifier(source):
            raise UserError(f"--lm-eval: {source}: found a reward, expected a run or a policy")


def merged(before: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    """What was found before and now; of the same set, judge or task what was found now."""
    before = before or {}
    whole = {**found, "best_of": found["best_of"] or before.get("best_of")}
    for section, names in NAMES.items():
        known = [[one[name] for name in names] for one in found[section]]
        old = before.get(section, [])
        kept = [one for one in old if [one[name] for name in names] not in known]
        whole[section] = [*kept, *found[section]]
    return whole


def _benchmarks(source: Path, asked: Evaluation, device: str) -> list[dict[str, Any]]:
    """Results of lm-eval's tasks; they are kept in the run's folder, or beside the model's."""
    policy, kept = source, source.with_name(f"{source.name}-lm-eval")
    if is_run(source):
        view = Run.load(source)
        if view.summary is None:
            raise UserError(f"{source}: this run is not finished; run its recipe again to go on")
        policy, kept = source.parent / str(view.summary["policy"]), source / "lm-eval"
    return run_benchmarks(
        policy,
        benchmarks(asked.benchmarks or ""),
        kept,
        device,
        asked.tasks_folder,
        asked.limit,
    )


def _on_set(what: Subject, spec: str, asked: Evaluation, device: str) -> dict[str, Any]:
    train = load_set(spec, asked.train_split) if asked.train_split is not None else None
    return evaluate(what, load_set(spec, asked.split), device, train)
