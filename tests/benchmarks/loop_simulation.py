"""Where the loop goes with finite data, by settings: KL(expert || pi_k) on new prompts.

    python tests/benchmarks/loop_simulation.py [--seeds 6] [--iterations 6]

The expert and the rewards are log-linear in features of a prompt and a text, and each prompt has
60 texts, so the policy step is exact: pi' is proportional to reference * exp(r / kl_coef). The
reward is fitted on pairs of demonstrations with two samples each, with a ridge penalty. "cold"
penalises the reward, "warm" its change from the last iteration's. Rows are the settings of
`pairs.window`, the KL reference, `reward.offset` and `reward.init`. A minute in all, on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
PROMPT, FEATURES, TEXTS, SAMPLES, NEW_PROMPTS = 6, 10, 60, 2, 200
RIDGE, STEPS, RATE = 1e-2, 300, 0.5


@dataclass(frozen=True)
class Settings:
    """One row of the table."""

    window: str
    reference: str
    offset: str = "none"
    start: str = "cold"

    def __str__(self) -> str:
        parts = [f"{self.window}, {self.reference}"]
        parts += [f"offset {self.offset}"] if self.offset != "none" else []
        return ", ".join([*parts, self.start])


SETTINGS = [
    *(Settings(window, "current") for window in ("latest", "last-2", "all")),
    *(Settings(window, "current", start="warm") for window in ("latest", "last-2")),
    *(Settings(window, "initial") for window in ("latest", "all")),
    *(
        Settings(window, "initial", offset, start)
        for offset in ("log_ratio", "reward")
        for window in ("latest", "last-2", "all")
        for start in ("cold", "warm")
    ),
]


@dataclass(frozen=True)
class Case:
    """What all settings of one part of the table share."""

    demonstrations: int
    kl_coef: float = 1.0
    hidden: bool = False
    """Whether a third of the features is hidden from the reward."""
    step: float = 1.0
    """Share of the way to the best policy that a policy step goes, as in a short training."""
    noise: float = 0.0
    """Deviation of noise on the policy's weights after each step."""


CASES = [
    Case(200),
    Case(1000),
    Case(200, kl_coef=2.0),
    Case(1000, hidden=True),
    Case(200, step=0.5),
    Case(1000, step=0.5),
    Case(200, noise=0.2),
    Case(1000, noise=0.2),
]


@dataclass(frozen=True)
class World:
    """Expert, start and demonstrations of one seed."""

    features: Array
    """(TEXTS, FEATURES)."""
    expert: Array
    """(PROMPT, FEATURES): log pi_E is linear in prompt x features, up to Z."""
    start: Array
    prompts: Array
    new_prompts: Array
    seen: Array
    """(FEATURES,) 1 where the reward sees the feature."""

    @classmethod
    def draw(cls, rng: np.random.Generator, demonstrations: int, hidden: bool) -> World:
        features = rng.normal(size=(TEXTS, FEATURES)) / np.sqrt(FEATURES) * 1.5
        expert = rng.normal(size=(PROMPT, FEATURES))
        start = 0.3 * expert + 0.5 * rng.normal(size=(PROMPT, FEATURES))
        prompts = rng.normal(size=(demonstrations, PROMPT))
        seen = np.ones(FEATURES)
        seen[: FEATURES // 3 if hidden else 0] = 0.0
        new = rng.normal(size=(NEW_PROMPTS, PROMPT))
        return cls(features, expert, start, prompts, new, seen)

    def log_probs(self, weights: Array, prompts: Array) -> Array:
        logits: Array = prompts @ weights @ self.features.T
        top = logits.max(-1, keepdims=True)
        total: Array = np.log(np.exp(logits - top).sum(-1, keepdims=True))
        log_probs: Array = logits - top - total
        return log_probs

    def texts(self, weights: Array, rng: np.random.Generator) -> NDArray[np.int64]:
        cumulative = np.exp(self.log_probs(weights, self.prompts)).cumsum(-1)
        drawn = rng.random(len(self.prompts))[:, None] * cumulative[:, -1:]
        texts: NDArray[np.int64] = (drawn > cumulative).sum(-1)
        return texts

    def distance(self, weights: Array) -> float:
        expert = self.log_probs(self.expert, self.new_prompts)
        gap = expert - self.log_probs(weights, self.new_prompts)
        return float((np.exp(expert) * gap).sum(1).mean())


def run(
    settings: Settings, world: World, case: Case, iterations: int, rng: np.random.Generator
) -> list[float]:
    """KL(expert || pi_k) on new prompts for k = 0 to `iterations`."""
    demonstrations = world.texts(world.expert, rng)
    policy, reward, distances = world.start, np.zeros_like(world.start), []
    pairs: list[tuple[Array, Array]] = []  # differences of features, and of offsets
    rows = np.arange(len(demonstrations))
    for k in range(iterations + 1):
        distances.append(world.distance(policy))
        before = policy - world.start if settings.offset == "log_ratio" else reward
        had = world.prompts @ before @ world.features.T * (settings.offset != "none")
        for _ in range(SAMPLES):
            drawn = world.texts(policy, rng)
            difference = (world.features[demonstrations] - world.features[drawn]) * world.seen
            pairs.append((difference, had[rows, demonstrations] - had[rows, drawn]))
        last = {"latest": 1, "last-2": 2, "all": k + 1}[settings.window]
        centre = reward if settings.start == "warm" else np.zeros_like(reward)
        reward = fit(world, pairs[-SAMPLES * last :], centre)
        if settings.reference == "current":
            target = policy + reward / case.kl_coef
        else:  # with an offset the reward's unit is such that this weight ends at the expert
            target = world.start + reward / (case.kl_coef if settings.offset == "none" else 1.0)
        policy = policy + case.step * (target - policy)
        policy = policy + case.noise * rng.normal(size=policy.shape)
    return distances


def fit(world: World, pairs: list[tuple[Array, Array]], centre: Array) -> Array:
    """The Bradley-Terry reward (PROMPT, FEATURES) with a ridge penalty around `centre`."""
    prompts = np.concatenate([world.prompts] * len(pairs))
    difference = np.concatenate([each for each, _ in pairs])
    offset = np.concatenate([each for _, each in pairs])
    weights = centre.copy()
    for _ in range(STEPS):
        logits = ((prompts @ weights) * difference).sum(1) - offset
        pull = -1.0 / (1.0 + np.exp(logits))
        gradient = prompts.T @ (pull[:, None] * difference) / len(logits)
        weights = weights - RATE * (gradient + RIDGE * (weights - centre))
    return weights


def worlds(seeds: int, case: Case) -> Iterator[World]:
    """A world for every seed."""
    for seed in range(seeds):
        yield World.draw(np.random.default_rng(seed), case.demonstrations, case.hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=6)
    args = parser.parse_args()
    for case in CASES:
        print(case)
        for settings in SETTINGS:
            rng = np.random.default_rng(0)
            every = [
                run(settings, world, case, args.iterations, rng)
                for world in worlds(args.seeds, case)
            ]
            means = np.mean(every, axis=0)
            print(f"  {settings!s:42}", " ".join(f"{mean:.3f}" for mean in means), flush=True)


if __name__ == "__main__":
    main()
