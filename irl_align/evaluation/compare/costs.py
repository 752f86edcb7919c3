"""What runs cost: seconds, tokens and peak memory of their stages, by part and by iteration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from irl_align.policy.roles import PARTS, stage_role
from irl_align.training.run_folder import RunView


@dataclass(frozen=True)
class StageCost:
    """What a stage took when it was built, by whichever run did."""

    key: str
    part: str
    """One of PARTS."""
    iteration: int | None
    """Outer iteration k, of what is trained on; None before the loop and for measuring."""
    seconds: float
    peak_mib: float | None
    trained: int | None
    """Tokens that were trained on, every pass counted; None where it is not known."""
    sampled: int | None
    """Tokens that were sampled."""
    resumed: bool = False
    """Whether it went on after a stop: its seconds are of its last try."""


def stage_costs(view: RunView) -> list[StageCost]:
    """The stages of a run, each once, whether it built them or found them in the store."""
    found: dict[str, StageCost] = {}
    trainings = view.ppo_records()
    for record in view.metrics:
        role = stage_role(record)
        if role is None:
            continue
        peak = record.get("peak_cuda_mib", record.get("peak_rss_mib"))
        seconds = float(record.get("seconds") or 0.0)
        trained, sampled = _tokens(view, trainings.get(str(role)), record)
        found.setdefault(
            record["stage_key"],
            StageCost(
                record["stage_key"],
                role.part,
                role.iteration,
                seconds,
                peak,
                trained,
                sampled,
                bool(record.get("resumed")),
            ),
        )
    return list(found.values())


def _tokens(
    view: RunView, updates: Sequence[Mapping[str, Any]] | None, record: Mapping[str, Any]
) -> tuple[int | None, int | None]:
    """(tokens trained on, tokens sampled) of a stage; PPO's follow from its updates."""
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
    """(seconds of the stages that the runs need together, of every run by itself)."""
    together = {stage.key: stage.seconds for view in views for stage in stage_costs(view)}
    return sum(together.values()), sum(seconds(view) for view in views)


@dataclass(frozen=True)
class MethodCost:
    """Costs of a method's runs, in seconds, mean over its seeds."""

    method: str
    parts: dict[str, float]
    """Part -> seconds, in the order of PARTS."""
    iterations: dict[int, float]
    """Outer iteration -> seconds of its samples, reward and policy, without measuring."""
    peak_mib: float | None
    """Largest peak of any of its stages."""
    tokens: dict[str, float]
    """`trained` and `sampled` -> tokens per outer iteration, without measuring."""
    by_part: dict[str, dict[str, float]]
    """Part -> `trained` and `sampled` tokens, mean over seeds, and `peak_mib`, the largest; each
    where its stages tell it."""
    by_iteration: dict[int, dict[str, float]]
    """Outer iteration -> the same of its stages."""
    resumed: int
    """Stages that went on after a stop, whose seconds are of their last try alone."""


def method_costs(views: Sequence[RunView]) -> Iterator[MethodCost]:
    """Costs of every method, in the order of the runs."""
    for method in dict.fromkeys(view.recipe["name"] for view in views):
        own = [stage_costs(view) for view in views if view.recipe["name"] == method]
        stages, runs = [stage for run in own for stage in run], len(own)
        numbers = sorted({s.iteration for s in stages if s.iteration is not None})
        in_loop = [s for s in stages if s.iteration is not None]
        in_part = {part: [s for s in stages if s.part == part] for part in PARTS}
        in_iteration = {k: [s for s in stages if s.iteration == k] for k in numbers}
        yield MethodCost(
            method,
            {part: sum(s.seconds for s in of) / runs for part, of in in_part.items() if of},
            {k: sum(s.seconds for s in of) / runs for k, of in in_iteration.items()},
            _peak(stages),
            _tokens_each(in_loop, len(numbers) * runs),
            {part: _told(of, runs) for part, of in in_part.items() if of},
            {k: _told(of, runs) for k, of in in_iteration.items()},
            len({s.key for s in stages if s.resumed}),
        )


def _peak(stages: Sequence[StageCost]) -> float | None:
    return max((s.peak_mib for s in stages if s.peak_mib is not None), default=None)


def _told(stages: Sequence[StageCost], runs: int) -> dict[str, float]:
    """Tokens of these stages per run, and their largest peak."""
    peak = _peak(stages)
    return _tokens_each(stages, runs) | ({} if peak is None else {"peak_mib": peak})


def _tokens_each(stages: Sequence[StageCost], number: int) -> dict[str, float]:
    """Tokens of these stages over a number of runs or iterations; nothing where no stage tells
    them, as of an older run."""
    counts = {"trained": [s.trained for s in stages], "sampled": [s.sampled for s in stages]}
    return {
        name: sum(values) / number
        for name, found in counts.items()
        if (values := [value for value in found if value is not None])
    }
