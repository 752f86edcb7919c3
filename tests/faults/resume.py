"""The cost of a kill beyond the lost work: a long SFT stage is killed once and resumed.

    PYTHONPATH=tests python -m faults.resume --epochs 200

The tiny model is trained on the built-in task. The extra processor time of a run whose SFT is
killed at 60%, and of the command that resumes it, has two parts: the work since the last
checkpoint, which is repeated, and the rest, which is start-up after the imports, reading finished
stages and loading the checkpoint. Imports are measured apart, since a forked command has none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

import irl_align.training.train  # noqa: F401 - every forked process has it then
from irl_align.utils.files import is_sealed

from .loops import NAME, Attempt, start

LOOP = (
    "data.task={size: 120, noise: 0.0}",
    "generation.max_new_tokens=48",
    "evaluation={prompts: 6, held_out_prompts: 6, temperatures: [1.0]}",
    "loop.iterations=0",
)


def killed_sft(folder: Path, attempt: Attempt, steps: int) -> tuple[float, int]:
    """Kill an attempt some steps after SFT has a checkpoint past 60% of its steps.

    Returns the processor time at that checkpoint, and the checkpoint's step.
    """
    scratch = folder / "runs/store/.work"
    while True:
        sealed = [p for p in scratch.glob("sft-*/scratch/checkpoint-*") if is_sealed(p)]
        step = max((int(p.name.split("-")[1]) for p in sealed), default=0)
        if step >= 0.6 * steps:
            break
        time.sleep(0.01)
    at_checkpoint = attempt.cpu_seconds()
    while attempt.cpu_seconds() < at_checkpoint + 0.5:
        time.sleep(0.005)
    attempt.kill(attempt.pids[0])
    return at_checkpoint, step


def record_of(folder: Path) -> dict[str, Any]:
    """The record of a finished run's SFT stage."""
    stages = json.loads((folder / "runs" / NAME / "stages.json").read_text(encoding="utf-8"))
    path = folder / "runs" / NAME / stages["sft"]["path"] / "stage.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def main() -> None:
    """Measure the costs and print them as JSON."""
    parser = argparse.ArgumentParser(prog="resume", description=__doc__)
    parser.add_argument("--epochs", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    sft = f"{{num_train_epochs: {given.epochs}, per_device_train_batch_size: 16, save_steps: 0.05}}"
    loop = (*LOOP, f"sft.args={sft}")
    code = "import resource, irl_align.training.train; print(sum(resource.getrusage(0)[:2]))"
    imports = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name, "whole"), Path(name, "killed")
        undisturbed = start(whole, loop).wait()
        # the same run without training gives the time around the stage
        around = start(Path(name, "around"), (*loop, "sft.args.max_steps=1")).wait()
        steps = record_of(whole)["metrics"]["steps"]
        attempt = start(killed, loop)
        at_checkpoint, step = killed_sft(killed, attempt, steps)
        first = attempt.wait()
        second = start(killed, loop).wait()
        assert (undisturbed.status, around.status, second.status) == (0, 0, 0), second.said
    stage = undisturbed.cpu - around.cpu
    lost = first.cpu - at_checkpoint
    rest = first.cpu + second.cpu - undisturbed.cpu - lost
    measured = {
        "stage_cpu_s": round(stage, 2),
        "killed_after_step": step,
        "of_steps": steps,
        "lost_work_cpu_s": round(lost, 2),
        "overhead_cpu_s": round(rest, 2),
        "overhead_of_stage": round(rest / stage, 4),
        "imports_cpu_s": round(float(imports.stdout), 2),
    }
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
