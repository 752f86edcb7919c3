"""Roles: what each stage of a run, and each record of its log, is for.

A role is written as text in ``stages.json`` and ``metrics.jsonl``. Only this module makes and
parses that text. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PARTS = ("data", "SFT", "samples and pairs", "reward", "policy", "measuring")
"""Parts of a run, in order; ``Role.part`` is one of them."""
_MEASURING = ("vitals", "evaluation", "matched-entropy", "reward-report", "pick")
_STAGE, _SIGNS = "stage/", "signs/"


@dataclass(frozen=True)
class Role:
    """The role of a stage or of a record.

    A policy update may use kinds of its own: ``Role("my-scores", iteration)``.
    """

    kind: str
    number: int | None = None
    """Iteration k; number of the policy for the kinds policy, vitals, evaluation and
    matched-entropy."""
    use: str = ""
    """What samples are drawn for: train, held_out, evaluation or candidates. Which part of an
    evaluation: demonstrations or rewards."""
    sampler: str = ""
    """Name of the sampled policy: start, or the role of a policy."""
    temperature: float | None = None

    @classmethod
    def policy(cls, k: int) -> Role:
        """Training of policy k (k > 0), and the name of pi_k."""
        return cls("policy", k)

    @classmethod
    def pairs(cls, k: int) -> Role:
        """Pairs of iteration k."""
        return cls("pairs", k)

    @classmethod
    def offsets(cls, k: int) -> Role:
        """Offsets of the pairs of iteration k."""
        return cls("offsets", k)

    @classmethod
    def reward(cls, k: int) -> Role:
        """Fit of reward r_k; in the log, its report on held-out pairs."""
        return cls("reward", k)

    @classmethod
    def reward_fit(cls, k: int) -> Role:
        """Record of the training of reward r_k."""
        return cls("reward-fit", k)

    @classmethod
    def reward_report(cls, k: int) -> Role:
        """Measurements of reward r_k on held-out pairs."""
        return cls("reward-report", k)

    @classmethod
    def candidate_rewards(cls, k: int) -> Role:
        """Rewards of the candidates of iteration k's policy update."""
        return cls("candidate-rewards", k)

    @classmethod
    def ppo(cls, k: int) -> Role:
        """Record of PPO in iteration k."""
        return cls("ppo", k)

    @classmethod
    def vitals(cls, k: int) -> Role:
        """Vital signs of policy k."""
        return cls("vitals", k)

    @classmethod
    def matched_entropy(cls, k: int) -> Role:
        """Evaluation of policy 0 at the entropy of policy k."""
        return cls("matched-entropy", k)

    @classmethod
    def evaluation(cls, k: int, temperature: float) -> Role:
        """Evaluation of policy k at a sampling temperature."""
        return cls("evaluation", k, temperature=temperature)

    @classmethod
    def evaluation_rewards(cls, k: int) -> Role:
        """Rewards of the answers of policy k to the evaluation prompts."""
        return cls("evaluation", k, "rewards")

    @classmethod
    def samples(cls, use: str, sampler: str, temperature: float) -> Role:
        """Samples of a policy."""
        return cls("samples", None, use, sampler, temperature)

    @classmethod
    def selected(cls, use: str, sampler: str) -> Role:
        """The best of the samples of a policy that selects."""
        return cls("selected", None, use, sampler)

    @classmethod
    def parse(cls, text: str) -> Role:
        """The role that ``str`` turns into this text."""
        kind, *rest = text.split("/")
        if not rest and kind.startswith("policy-") and kind[7:].isdecimal():
            return cls("policy", int(kind[7:]))
        if kind == "samples":
            return cls(kind, None, rest[0], "/".join(rest[1:-1]), float(rest[-1][1:]))
        if kind == "selected":
            return cls(kind, None, rest[0], "/".join(rest[1:]))
        number = int(rest.pop(0)) if rest and rest[0].isdecimal() else None
        last = "/".join(rest)
        if kind == "evaluation" and number is not None and last.startswith("t"):
            return cls(kind, number, temperature=float(last[1:]))
        return cls(kind, number, last)

    def __str__(self) -> str:
        if self.kind == "policy":
            return f"policy-{self.number}"
        parts = [self.kind]
        parts += [str(self.number)] if self.number is not None else []
        parts += [part for part in (self.use, self.sampler) if part]
        parts += [f"t{self.temperature:g}"] if self.temperature is not None else []
        return "/".join(parts)

    @property
    def part(self) -> str:
        """Part of the run, one of PARTS."""
        if self.kind in ("start", "data"):
            return "data"
        if self.kind == "sft":
            return "SFT"
        drawn = self.kind in ("samples", "selected")
        if self.kind in _MEASURING or (drawn and self.use.startswith(("held_out", "evaluation"))):
            return "measuring"
        if self.kind in ("pairs", "offsets") or (drawn and self.use.startswith("train")):
            return "samples and pairs"
        return "reward" if self.kind == "reward" else "policy"

    @property
    def iteration(self) -> int | None:
        """Iteration of the loop that the stage is part of; None outside the loop."""
        if self.part in ("data", "SFT", "measuring"):
            return None
        if self.kind == "policy" and self.number is not None:
            return self.number - 1  # iteration k makes policy k + 1
        if self.sampler:
            return Role.parse(self.sampler).number
        return self.number


START = Role("start")
DATA = Role("data")
SFT = Role("sft")
PICK = Role("pick")
DEMONSTRATIONS = Role("evaluation", use="demonstrations")
"""Evaluation of the demonstrations themselves."""


def is_evaluation(record: Mapping[str, Any]) -> bool:
    """Whether a record of metrics.jsonl is the evaluation of a policy."""
    return Role.parse(record["key"]).kind == "evaluation" and "policy" in record


def stage_record_key(role: Role) -> str:
    """Key of the record of a stage's cost."""
    return f"{_STAGE}{role}"


def stage_role(record: Mapping[str, Any]) -> Role | None:
    """Role of the stage whose cost a record holds; None for another kind of record."""
    key = str(record["key"])
    return Role.parse(key.removeprefix(_STAGE)) if key.startswith(_STAGE) else None


def signs_key(subject: str, number: int) -> str:
    """Key of the record of warning signs about a reward, a policy or its fresh samples."""
    return f"{_SIGNS}{subject}-{number}"


def signs_in(record: Mapping[str, Any]) -> list[str]:
    """Warning signs in a record, one line each that begins with its subject."""
    key = str(record["key"])
    if not key.startswith(_SIGNS):
        return []
    return [f"{key.removeprefix(_SIGNS)}: {sign}" for sign in record["signs"]]
