"""Tasks of lm-eval by name, and what the Open LLM Leaderboard asked of them."""

from __future__ import annotations

from dataclasses import dataclass

from irl_align.errors import UserError

PRESET = "open-llm-leaderboard"
LEADERBOARD: dict[str, tuple[int, str]] = {
    "arc_challenge": (25, "acc_norm,none"),
    "hellaswag": (10, "acc_norm,none"),
    "mmlu": (5, "acc,none"),
    "truthfulqa_mc2": (0, "acc,none"),
    "winogrande": (5, "acc,none"),
    "gsm8k": (5, "exact_match,strict-match"),
}
"""Task -> its shots and metric on the Open LLM Leaderboard (the first one, 2023-24)."""


@dataclass(frozen=True)
class Benchmark:
    """A task of the harness with its number of examples; None is the task's own."""

    task: str
    shots: int | None

    @property
    def name(self) -> str:
        """Task and shots, as they are asked for."""
        return self.task if self.shots is None else f"{self.task}@{self.shots}"


def benchmarks(asked: str) -> list[Benchmark]:
    """Tasks of a list `TASK[@SHOTS],...`; the preset's name stands for all of its tasks.

    Without @SHOTS a task of the leaderboard has the leaderboard's, another one its own. Raises
    UserError.
    """
    found: list[Benchmark] = []
    for item in asked.split(","):
        task, at, shots = item.strip().partition("@")
        if task == PRESET and not at:
            found += [Benchmark(name, number) for name, (number, _) in LEADERBOARD.items()]
        elif task in ("", PRESET) or (at and not shots.isdecimal()):
            raise UserError(
                f"--lm-eval: found {item.strip()!r}, expected TASK or TASK@SHOTS, or {PRESET}"
            )
        else:
            usual = LEADERBOARD[task][0] if task in LEADERBOARD else None
            found.append(Benchmark(task, int(shots) if at else usual))
    return list(dict.fromkeys(found))
