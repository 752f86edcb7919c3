"""Checkpoints of PPO in a stage's scratch folder: written atomically, the last two are kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from irl_align.errors import TryAgain
from irl_align.policy.ppo.distributed import shared_folder
from irl_align.utils import distributed
from irl_align.utils.files import atomic_write, is_sealed, read_lines, seal, to_lines


@dataclass
class Progress:
    """State of PPO between two updates, besides weights and optimiser.

    Prompts, random numbers, minibatches and learning rates are functions of the seed and `updates`.
    """

    updates: int = 0
    """Updates done; it determines the position in the prompts."""
    kl_coef: float = 0.0
    baseline: float | None = None
    """Baseline of advantage reinforce."""
    best: float | None = None
    """Held-out score of the best policy so far, whose weights are in best-N."""
    best_update: int = 0
    """Updates of the best policy, N."""
    recent: list[dict[str, Any]] = field(default_factory=list)
    """Records of the newest updates, as many as alarms need; the journal has all."""


def save_checkpoint(
    scratch: Path, accelerator: Accelerator, progress: Progress, journals: Sequence[Journal]
) -> None:
    """Write scratch/checkpoint-N with the journals so far, whole or not at all.

    Only the last two checkpoints are kept.
    """
    final = scratch / f"checkpoint-{progress.updates}"
    if distributed.on_main(final.exists):  # an earlier attempt was killed after it wrote this
        return
    with shared_folder(final) as folder:
        accelerator.save_state(str(folder), safe_serialization=True)
        distributed.barrier()
        if distributed.is_main():
            (folder / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
            for journal in journals:
                shutil.copy(journal.path, folder)
            seal(folder)
    if distributed.is_main():
        for old in checkpoints(scratch)[:-2]:
            shutil.rmtree(old)


def load_checkpoint(folder: Path, accelerator: Accelerator) -> Progress:
    """Load weights, optimiser and random state into the accelerator; returns the progress."""
    accelerator.load_state(str(folder))
    return read_progress(folder)


def checkpoints(scratch: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted((path for path in scratch.glob("checkpoint-*") if path.is_dir()), key=updates_of)


def last_checkpoint(scratch: Path) -> Path | None:
    """The newest whole checkpoint whose best policy is whole too; newer ones are deleted.

    Training writes the deleted ones again.
    """
    for checkpoint in reversed(checkpoints(scratch)):
        if is_sealed(checkpoint):
            progress = read_progress(checkpoint)
            if progress.best is None or is_sealed(scratch / f"best-{progress.best_update}"):
                return checkpoint
        shutil.rmtree(checkpoint)
    return None


def read_progress(checkpoint: Path) -> Progress:
    """The progress that a checkpoint was written with."""
    text = (checkpoint / "progress.json").read_text(encoding="utf-8")
    return Progress(**json.loads(text))


def updates_of(checkpoint: Path) -> int:
    """Number of updates before a checkpoint."""
    return int(checkpoint.name.split("-")[1])


def retry_once(scratch: Path, fault: str) -> None:
    """Raise TryAgain for the first fault after the last checkpoint; return for the second.

    A fault of the machine, such as a random NaN, does not repeat; one of training does.
    """

    def first() -> bool:
        last = max(map(updates_of, checkpoints(scratch)), default=0)
        mark = scratch / f"fault-after-{last}"
        if mark.exists():
            return False
        atomic_write(mark, fault)
        return True

    if distributed.on_main(first):
        raise TryAgain(fault)


class Journal:
    """JSON lines that grow while training runs; after a kill they hold no line twice."""

    def __init__(self, path: Path, checkpoint: Path | None) -> None:
        """Continue a checkpoint's copy; lines written after the checkpoint are dropped."""
        self.path = path
        if not distributed.is_main():
            return
        atomic_write(path, b"" if checkpoint is None else (checkpoint / path.name).read_bytes())

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows."""
        if not distributed.is_main():
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_lines(rows))

    def read(self) -> list[dict[str, Any]]:
        """All rows so far; a number that was not finite is None."""
        return distributed.on_main(lambda: read_lines(self.path, "run the recipe again"))
