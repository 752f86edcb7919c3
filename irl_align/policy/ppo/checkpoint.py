"""Checkpoints of PPO in a stage's scratch folder: written aside, renamed in, the last two kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from irl_align.files import atomic_folder, atomic_write, fsync, to_lines


@dataclass
class Progress:
    """What PPO carries from one update to the next beside weights and optimiser.

    Prompts, random numbers, minibatches and learning rates are functions of the seed and `updates`,
    and so need no state of their own.
    """

    updates: int = 0
    """Updates done: the position in prompts and samples."""
    kl_coef: float = 0.0
    baseline: float | None = None
    """Of advantage reinforce."""
    best: float | None = None
    """Score of the best policy so far by held-out demonstrations; its weights are in best/."""
    best_update: int = 0
    """Updates that it had."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One record per update."""


def save_checkpoint(scratch: Path, accelerator: Accelerator, progress: Progress) -> None:
    """Write scratch/checkpoint-N, whole or not at all; older ones but the last are deleted."""
    final = scratch / f"checkpoint-{progress.updates}"
    if final.exists():  # of an earlier try that was killed after it
        return
    with atomic_folder(final) as folder:
        accelerator.save_state(str(folder), safe_serialization=True)
        (folder / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
    for old in checkpoints(scratch)[:-2]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, accelerator: Accelerator) -> Progress:
    """Weights, optimiser and random state into what the accelerator has prepared; the progress."""
    accelerator.load_state(str(folder))
    values = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    return Progress(**values)


def checkpoints(scratch: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in scratch.glob("checkpoint-*") if path.is_dir()]
    return sorted(found, key=updates_of)


def updates_of(checkpoint: Path) -> int:
    """Updates that a checkpoint has behind it."""
    return int(checkpoint.name.split("-")[1])


class Journal:
    """JSON lines that are there while training runs, and hold nothing twice after a kill."""

    def __init__(self, path: Path, keep: int) -> None:
        """Go on after the lines of the first `keep` updates; later ones are dropped."""
        self.path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith(b"\n") and _update(line) <= keep]
        atomic_write(path, b"".join(kept))

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, each with its field update, counted from 1."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_lines(rows))

    def flush(self) -> None:
        """Have what was written reach the disk."""
        fsync(self.path)


def _update(line: bytes) -> int:
    return int(json.loads(line)["update"])
