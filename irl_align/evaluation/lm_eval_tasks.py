"""Tasks of lm-eval by name, and the shots and metrics of the Open LLM Leaderboard."""

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
    """A task of lm-eval with its number of examples; None is the task's own number."""

    task: str
    shots: int | None

    @property
    def name(self) -> str:
        """TASK or TASK@SHOTS."""
        return self.task if self.shots is None else f"{self.task}@{self.shots}"


def benchmarks(text: str) -> list[Benchmark]:
    """Tasks of a list `TASK[@SHOTS],...`; the preset's name stands for all of its tasks.

    The default shots of a task on the leaderboard are the leaderboard's. Raises UserError: an item
    of another form.
    """
    tasks: list[Benchmark] = []
    for item in text.split(","):
        task, at, shots = item.strip().partition("@")
        if task == PRESET and not at:
            tasks += [Benchmark(name, number) for name, (number, _) in LEADERBOARD.items()]
        elif task in ("", PRESET) or (at and not shots.isdecimal()):
            raise UserError(
                f"--lm-eval: found {item.strip()!r}, expected TASK or TASK@SHOTS, or {PRESET}"
            )
        else:
            usual = LEADERBOARD[task][0] if task in LEADERBOARD else None
            tasks.append(Benchmark(task, int(shots) if at else usual))
    return list(dict.fromkeys(tasks))
