"""`irl-align evaluate`: preference sets, best-of-n, judges and benchmarks, as one JSON file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from irl_align.data.splits import data_checksum
from irl_align.errors import UserError
from irl_align.evaluation.best_of_n import best_of_curve
from irl_align.evaluation.chat_client import Endpoint
from irl_align.evaluation.llm_judge import chat_win_rates
from irl_align.evaluation.lm_eval_harness import benchmarks, run_benchmarks
from irl_align.evaluation.preference_data import PreferenceSet, is_foreign, load_set, restricted
from irl_align.evaluation.preferences import (
    ModelInput,
    evaluate_preferences,
    find_scorers,
    is_classifier,
    require_explicit_reward,
    reward_of,
)
from irl_align.evaluation.tables import FILE, read_evaluation, subject_of
from irl_align.evaluation.win_rates import win_rates
from irl_align.training.run_folder import Run, artefact_folder, is_run
from irl_align.utils.files import atomic_write, to_json

IDENTITY = {
    "sets": ("card", "split", "only"),
    "judged": ("judge",),
    "judged_by_chat": ("judge", "url"),
    "benchmarks": ("task", "shots", "limit", "lm_eval"),
}
"""Section of an evaluation -> the fields that identify an entry."""
READ_WITH = {
    "--card or --judge": ("template",),
    "--card": ("subset", "split", "train_set", "train_split", "beside", "sft"),
    "--best-of": ("backend",),
    "--best-of or a judge's address": ("prompts",),
    "--lm-eval": ("lm_eval_tasks", "lm_eval_limit"),
}
"""Option -> the fields of an EvaluationRequest whose options are read together with it only."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate of a run or a model's folder: the options of `irl-align evaluate`."""

    cards: Sequence[str] = ()
    """Preference sets, `CARD` or `CARD=PATH`."""
    subset: Sequence[str] = ()
    split: str | None = None
    train_set: str | None = None
    train_split: str | None = None
    beside: Sequence[Path] = ()
    sft: Path | None = None
    best_of: int | None = None
    backend: str | None = None
    prompts: int | None = None
    """Number of prompts of the curve and of the endpoints; None is all."""
    judges: Sequence[Path] = ()
    """Runs or rewards that judge the run's samples."""
    endpoints: Sequence[Endpoint] = ()
    """Chat models that judge the run's samples."""
    template: str | None = None
    """Template of the models that were not made here; their chat template by default."""
    benchmarks: str | None = None
    """Tasks of lm-eval, `TASK[@SHOTS],...`."""
    lm_eval_tasks: Path | None = None
    lm_eval_limit: int | None = None


def evaluate_source(
    source: Path, request: EvaluationRequest, device: str = "auto", output: Path | None = None
) -> dict[str, Any]:
    """Evaluate a run, a reward or a policy, and write the results to `output`.

    The default output of a run is evaluation.json in its folder, where earlier results stay unless
    they are evaluated again. Raises UserError.
    """
    _check(source, request)
    evaluations = _evaluations(source, request, device)
    results: dict[str, Any] = {"source": source.name, "best_of": None}
    results |= {section: [] for section in IDENTITY}
    before = None
    if is_run(source):
        view = Run.load(source)
        results["of"] = subject_of(view)
        if output is None:
            output, before = source / FILE, read_evaluation(view)
    for section, evaluation in evaluations.items():
        results[section] = evaluation()
        if output is not None:  # after each section: a later one may fail
            atomic_write(output, to_json(merged(before, results), indent=2) + "\n")
    return results


def _evaluations(
    source: Path, request: EvaluationRequest, device: str
) -> dict[str, Callable[[], Any]]:
    """Section -> its evaluation, in the order in which they run.

    Raises UserError for what is wrong with the preference sets, before any work.
    """
    evaluations: dict[str, Callable[[], Any]] = {}
    models: list[ModelInput] = []
    if request.best_of is not None:
        evaluations["best_of"] = partial(
            best_of_curve, source, request.best_of, request.prompts, request.backend, device
        )
    if request.cards:
        scorers = find_scorers(source, request.sft, request.beside)
        scorers = replace(scorers, template=request.template)
        models += scorers.models
        if request.train_set is not None or request.train_split is not None:
            require_explicit_reward(scorers.view)
        sets = _load_sets(request)
        evaluations["sets"] = lambda: [
            evaluate_preferences(scorers, pairs, device, train) for pairs, train in sets
        ]
    if request.judges:
        evaluations["judged"] = lambda: [
            win_rates(source, judge, device, request.template) for judge in request.judges
        ]
    if request.endpoints:
        evaluations["judged_by_chat"] = lambda: [
            chat_win_rates(source, endpoint, request.prompts) for endpoint in request.endpoints
        ]
    if request.template is not None:
        models += [(reward_of(judge), True) for judge in request.judges]
        if not any(is_foreign(*model) for model in models):
            raise UserError(
                "--template: found only models that were made by irl-align, which keep their own "
                "template; expected another judge or model, or leave the option out"
            )
    if request.benchmarks is not None:
        folder = source.with_name(f"{source.name}-lm-eval")  # next to a model's folder
        evaluations["benchmarks"] = partial(
            run_benchmarks,
            artefact_folder(source, "policy"),
            benchmarks(request.benchmarks),
            source / "lm-eval" if is_run(source) else folder,
            device,
            tasks_folder=request.lm_eval_tasks,
            limit=request.lm_eval_limit,
        )
    return evaluations


def merged(before: Mapping[str, Any] | None, results: Mapping[str, Any]) -> dict[str, Any]:
    """Earlier and new results; a new entry replaces the earlier one with the same identity."""
    before = before or {}
    together = {**results, "best_of": results["best_of"] or before.get("best_of")}
    for section, fields in IDENTITY.items():
        new = [[entry.get(field) for field in fields] for entry in results[section]]
        old = before.get(section, [])
        others = [entry for entry in old if [entry.get(field) for field in fields] not in new]
        together[section] = [*others, *results[section]]
    return together


def _check(source: Path, request: EvaluationRequest) -> None:
    """Raise UserError for options that contradict each other or ask for nothing."""
    given = {
        "--card": bool(request.cards),
        "--card or --judge": bool(request.cards or request.judges),
        "--best-of": request.best_of is not None,
        "--judge": bool(request.judges or request.endpoints),
        "--best-of or a judge's address": request.best_of is not None or bool(request.endpoints),
        "--lm-eval": request.benchmarks is not None,
    }
    if not any(given.values()):
        raise UserError(
            "evaluate: found none of --card, --best-of, --judge and --lm-eval, expected one"
        )
    unread = []
    for reader, options in READ_WITH.items():
        unused = [f"--{name.replace('_', '-')}" for name in options if getattr(request, name)]
        if unused and not given[reader]:
            unread.append(f"{', '.join(unused)} without {reader}")
    if unread:
        raise UserError(f"evaluate: found {'; '.join(unread)}, which reads it; expected both")
    if request.benchmarks is not None:
        benchmarks(request.benchmarks)
        if not is_run(source) and is_classifier(source):
            raise UserError(f"--lm-eval: {source}: found a reward, expected a run or a policy")


def _load_sets(request: EvaluationRequest) -> list[tuple[PreferenceSet, PreferenceSet | None]]:
    """The preference sets, each with the set on which a reward is trained for comparison.

    Raises UserError: an unknown subset, or all pairs to evaluate are trained on.
    """
    train = None
    if request.train_set is not None:
        train = load_set(request.train_set, request.train_split or "train")
    sets = []
    for spec in request.cards:
        pairs = restricted(load_set(spec, request.split), request.subset)
        own = train
        if train is None and request.train_split is not None:
            own = load_set(spec, request.train_split)
        if own is not None and _checksums(pairs) <= _checksums(own):
            option, named = "--train-set", f"{own.card.name}, {own.split}"
            if train is None:
                option, named = "--train-split", own.split
            raise UserError(f"{option}: found {named!r}, which is evaluated on; expected another")
        sets.append((pairs, own))
    return sets


def _checksums(pairs: PreferenceSet) -> set[str]:
    return {data_checksum([row]) for row in pairs.rows}
