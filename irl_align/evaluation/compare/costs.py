"""What runs cost: seconds, tokens and peak memory of their stages, by part and by iteration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from irl_align.evaluation.compare.policies import by_method
from irl_align.policy.roles import PARTS, stage_role
from irl_align.training.run_folder import RunView


@dataclass(frozen=True)
class StageCost:
    """What a stage took when it was built, by whichever run built it."""

    key: str
    part: str
    """One of PARTS."""
    iteration: int | None
    """Outer iteration k of what is trained; None before the loop and for measuring."""
    seconds: float
    peak_mib: float | None
    trained: int | None
    """Tokens that were trained on, counted in every pass; None if unknown."""
    sampled: int | None
    """Tokens that were sampled."""
    resumed: bool
    """Whether the stage resumed after a stop; its seconds cover the last attempt only."""


def stage_costs(view: RunView) -> list[StageCost]:
    """The stages of a run, each once, whether the run built them or reused them from the store."""
    stages: dict[str, StageCost] = {}
    trainings = view.ppo_records()
    for record in view.metrics:
        role = stage_role(record)
        if role is None:
            continue
        trained, sampled = _tokens(view, trainings.get(str(role)), record)
        stage = StageCost(
            key=record["stage_key"],
            part=role.part,
            iteration=role.iteration,
            seconds=float(record.get("seconds") or 0.0),
            peak_mib=record.get("peak_cuda_mib", record.get("peak_rss_mib")),
            trained=trained,
            sampled=sampled,
            resumed=bool(record.get("resumed")),
        )
        stages.setdefault(stage.key, stage)
    return list(stages.values())


def _tokens(
    view: RunView, updates: Sequence[Mapping[str, Any]] | None, record: Mapping[str, Any]
) -> tuple[int | None, int | None]:
    """(tokens trained on, tokens sampled) of a stage; those of PPO follow from its updates."""
    if record["stage"] != "ppo":
        return record.get("tokens_trained"), record.get("tokens_sampled")
    if updates is None:
        return None, None
    batch = view.recipe["policy_update"]["batch_size"]
    rollouts = [(r["length"] * batch, r.get("epochs", 1)) for r in updates]
    trained = sum(tokens * epochs for tokens, epochs in rollouts)
    return round(trained), round(sum(tokens for tokens, _ in rollouts))


def seconds(view: RunView) -> float:
    """Seconds of all stages of a run, as if it had shared none."""
    return sum(stage.seconds for stage in stage_costs(view))


def sharing(views: Sequence[RunView]) -> tuple[float, float]:
    """(seconds of the stages that the runs need together, sum of the seconds of each run alone)."""
    together = {stage.key: stage.seconds for view in views for stage in stage_costs(view)}
    return sum(together.values()), sum(seconds(view) for view in views)


@dataclass(frozen=True)
class MethodCost:
    """Costs of a method's runs, mean over its seeds, as if no stage were shared."""

    method: str
    by_part: dict[str, dict[str, float]]
    """Part -> `seconds`, tokens `trained` and `sampled`, and the largest `peak_mib`, without the
    values that no stage reports. In the order of PARTS."""
    by_iteration: dict[int, dict[str, float]]
    """Outer iteration -> the same of its samples, pairs, reward and policy, without measuring."""
    resumed: int
    """Number of stages that resumed after a stop."""


def method_costs(views: Sequence[RunView]) -> Iterator[MethodCost]:
    """Costs of every method, in the order of the runs."""
    for method, runs in by_method(views).items():
        stages = [stage for view in runs for stage in stage_costs(view)]
        in_part = {part: [s for s in stages if s.part == part] for part in PARTS}
        iterations = sorted({s.iteration for s in stages if s.iteration is not None})
        in_iteration = {k: [s for s in stages if s.iteration == k] for k in iterations}
        yield MethodCost(
            method,
            {part: _total(own, len(runs)) for part, own in in_part.items() if own},
            {k: _total(own, len(runs)) for k, own in in_iteration.items()},
            len({s.key for s in stages if s.resumed}),
        )


def _total(stages: Sequence[StageCost], runs: int) -> dict[str, float]:
    """Seconds and tokens of these stages per run, and their largest peak."""
    total = {"seconds": sum(s.seconds for s in stages) / runs}
    for name in ("trained", "sampled"):
        counts = [count for s in stages if (count := getattr(s, name)) is not None]
        if counts:
            total[name] = sum(counts) / runs
    peaks = [s.peak_mib for s in stages if s.peak_mib is not None]
    return total | ({"peak_mib": max(peaks)} if peaks else {})
