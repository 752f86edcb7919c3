"""`irl-align evaluate` as a whole: preference sets, best-of-n, judges and benchmarks, as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irl_align.data.loading import data_checksum
from irl_align.errors import UserError
from irl_align.evaluation.best_of_n import best_of_curve
from irl_align.evaluation.chat_client import Endpoint
from irl_align.evaluation.llm_judge import judged_by
from irl_align.evaluation.lm_eval_harness import run_benchmarks
from irl_align.evaluation.lm_eval_tasks import benchmarks
from irl_align.evaluation.preference_baseline import with_reward
from irl_align.evaluation.preference_data import PreferenceSet, load_set, restricted
from irl_align.evaluation.preferences import Subject, evaluate, is_classifier, subject
from irl_align.evaluation.tables import FILE, read_evaluation, subject_of
from irl_align.evaluation.win_rates import judged
from irl_align.training.run_folder import Run, is_run
from irl_align.utils.files import atomic_write, to_json

NAMES = {
    "sets": ("card", "split", "only"),
    "judged": ("judge",),
    "judged_by_chat": ("judge", "url"),
    "benchmarks": ("task", "shots", "limit", "lm_eval"),
}
"""Section of an evaluation -> what tells its entries apart."""
READ_WITH = {
    "--card": {
        "subsets": "--subset",
        "split": "--split",
        "train_set": "--train-set",
        "train_split": "--train-split",
        "beside": "--beside",
        "sft": "--sft",
    },
    "--best-of": {"backend": "--backend"},
    "--best-of or a judge's address": {"prompts": "--prompts"},
    "--lm-eval": {"tasks_folder": "--lm-eval-tasks", "limit": "--lm-eval-limit"},
}
"""What reads an option -> field of an Evaluation -> the option."""


@dataclass(frozen=True)
class Evaluation:
    """What is to be evaluated of a run or a model's folder."""

    cards: Sequence[str] = ()
    """Preference sets, `CARD` or `CARD=PATH`."""
    subsets: Sequence[str] = ()
    """Subsets of theirs that are evaluated; nothing is all."""
    split: str | None = None
    """Their split; default test."""
    train_set: str | None = None
    """Preference set on which a reward is trained to compare with; default: the same."""
    train_split: str | None = None
    """Its split; default train, where there is a train_set."""
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
    scoring = _scoring(source, asked)
    found: dict[str, Any] = {"source": source.name, "best_of": None}
    found |= {section: [] for section in NAMES}
    before = None
    if is_run(source):
        view = Run.load(source)
        found["of"] = subject_of(view)
        if output is None:  # what was found before stays, unless it is found anew
            output, before = source / FILE, read_evaluation(view)
    for section, part in _parts(source, asked, scoring, device):
        found[section] = part
        if output is not None:  # after each part: a later one may fail
            atomic_write(output, to_json(merged(before, found), indent=2) + "\n")
    return found


def _parts(
    source: Path, asked: Evaluation, scoring: Scoring | None, device: str
) -> Iterator[tuple[str, Any]]:
    """(section, what was found) of all that was asked for, one after another."""
    if asked.best_of is not None:
        yield (
            "best_of",
            best_of_curve(source, asked.best_of, asked.prompts, device, asked.backend),
        )
    if scoring is not None:
        what, sets = scoring
        yield "sets", [evaluate(what, pairs, device, train) for pairs, train in sets]
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
    _refuse_unread(asked)
    if asked.benchmarks is not None:
        benchmarks(asked.benchmarks)
        if not is_run(source) and is_classifier(source):
            raise UserError(f"--lm-eval: {source}: found a reward, expected a run or a policy")


def merged(before: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    """What was found before and now; of the same set, judge or task what was found now."""
    before = before or {}
    whole = {**found, "best_of": found["best_of"] or before.get("best_of")}
    for section, names in NAMES.items():
        known = [[one.get(name) for name in names] for one in found[section]]
        old = before.get(section, [])
        kept = [one for one in old if [one.get(name) for name in names] not in known]
        whole[section] = [*kept, *found[section]]
    return whole


def _benchmarks(source: Path, asked: Evaluation, device: str) -> list[dict[str, Any]]:
    """Results of lm-eval's tasks; they are kept in the run's folder, or beside the model's."""
    policy, kept = source, source.with_name(f"{source.name}-lm-eval")
    if is_run(source):
        summary = Run.load(source).require_finished()
        policy, kept = source.parent / str(summary["policy"]), source / "lm-eval"
    return run_benchmarks(
        policy,
        benchmarks(asked.benchmarks or ""),
        kept,
        device,
        asked.tasks_folder,
        asked.limit,
    )


def _refuse_unread(asked: Evaluation) -> None:
    """Raise UserError for options that nothing reads, of what else was asked for."""
    there = {
        "--card": bool(asked.cards),
        "--best-of": asked.best_of is not None,
        "--best-of or a judge's address": asked.best_of is not None or bool(asked.endpoints),
        "--lm-eval": asked.benchmarks is not None,
    }
    unread = {
        reader: [option for field, option in options.items() if getattr(asked, field)]
        for reader, options in READ_WITH.items()
        if not there[reader]
    }
    told = [
        f"{', '.join(options)} without {reader}" for reader, options in unread.items() if options
    ]
    if told:
        raise UserError(f"evaluate: found {'; '.join(told)}, which is what reads it: give both")


Sets = list[tuple[PreferenceSet, PreferenceSet | None]]
"""Preference sets, each with the one on which a reward is trained to compare with."""
Scoring = tuple[Subject, Sets]
"""What scores which preference sets."""


def _scoring(source: Path, asked: Evaluation) -> Scoring | None:
    """What --card asks for, before any work; None without it. Raises UserError."""
    if not asked.cards:
        return None
    what = subject(source, asked.sft, asked.beside)
    if asked.train_set is not None or asked.train_split is not None:
        with_reward(what.view)
    return what, _load_sets(asked)


def _load_sets(asked: Evaluation) -> Sets:
    """The preference sets. Raises UserError: an unknown subset, or pairs that are trained on and
    evaluated."""
    train = None
    if asked.train_set is not None:
        train = load_set(asked.train_set, asked.train_split or "train")
    found = []
    for spec in asked.cards:
        pairs = restricted(load_set(spec, asked.split), asked.subsets)
        own = train
        if asked.train_set is None and asked.train_split is not None:
            own = load_set(spec, asked.train_split)
        if own is not None:
            _refuse_same(pairs, own, "--train-split" if train is None else "--train-set")
        found.append((pairs, own))
    return found


def _refuse_same(pairs: PreferenceSet, train: PreferenceSet, option: str) -> None:
    """Raise UserError where all pairs that are evaluated are trained on too."""
    rows = [data_checksum([row]) for row in train.rows]
    if {data_checksum([row]) for row in pairs.rows} <= set(rows):
        named = train.split if option == "--train-split" else f"{train.card.name}, {train.split}"
        raise UserError(f"{option}: found {named!r}, which is evaluated on; expected another")
