"""What runs cost: seconds, tokens and peak memory of their stages, by part and by iteration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from irl_align.stages import RunView

MEASURING = ("vitals/", "evaluation/", "matched-entropy/", "reward-report/", "pick")
PARTS = ("data", "SFT", "samples and pairs", "reward", "policy", "measuring")


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


def stage_costs(view: RunView) -> list[StageCost]:
    """The stages of a run, each once, whether it built them or found them in the store."""
    found: dict[str, StageCost] = {}
    trainings = view.ppo_records()
    for record in view.metrics:
        if not record["key"].startswith("stage/"):
            continue
        role = record["key"].removeprefix("stage/")
        part, iteration = classify(role)
        peak = record.get("peak_cuda_mib", record.get("peak_rss_mib"))
        seconds = float(record.get("seconds") or 0.0)
        trained, sampled = _tokens(view, trainings.get(role), record)
        found.setdefault(
            record["stage_key"],
            StageCost(record["stage_key"], part, iteration, seconds, peak, trained, sampled),
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


def classify(role: str) -> tuple[str, int | None]:
    """(part, iteration) of a stage by its role in a run."""
    if role in ("start", "data"):
        return "data", None
    if role == "sft":
        return "SFT", None
    if role.startswith(MEASURING) or re.match(r"(samples|selected)/(held_out|evaluation)\b", role):
        return "measuring", None
    numbers = re.findall(r"(?:^|[/-])(\d+)(?:/|$)", role)
    number = int(numbers[0]) if numbers else None
    if role.startswith(("samples/train", "selected/train", "pairs/")):
        return "samples and pairs", number
    if role.startswith("reward/"):
        return "reward", number
    if re.match(r"policy-\d", role) and number is not None:
        number -= 1  # policy k+1 is what iteration k makes
    return "policy", number


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


def method_costs(views: Sequence[RunView]) -> Iterator[MethodCost]:
    """Costs of every method, in the order of the runs."""
    for method in dict.fromkeys(view.recipe["name"] for view in views):
        own = [stage_costs(view) for view in views if view.recipe["name"] == method]
        stages = [stage for run in own for stage in run]
        parts = {
            part: sum(s.seconds for s in stages if s.part == part) / len(own)
            for part in PARTS
            if any(s.part == part for s in stages)
        }
        numbers = sorted({s.iteration for s in stages if s.iteration is not None})
        iterations = {
            k: sum(s.seconds for s in stages if s.iteration == k) / len(own) for k in numbers
        }
        peaks = [s.peak_mib for s in stages if s.peak_mib is not None]
        tokens = _per_iteration(stages, len(numbers) * len(own)) if numbers else {}
        yield MethodCost(method, parts, iterations, max(peaks, default=None), tokens)


def _per_iteration(stages: Sequence[StageCost], iterations: int) -> dict[str, float]:
    """Mean tokens of an iteration; nothing where no stage tells them, as of an older run."""
    own = [stage for stage in stages if stage.iteration is not None]
    counts = {"trained": [s.trained for s in own], "sampled": [s.sampled for s in own]}
    return {
        name: sum(values) / iterations
        for name, found in counts.items()
        if (values := [value for value in found if value is not None])
    }
