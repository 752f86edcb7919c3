"""Tiny runs for tests: each takes seconds on one core.

All tiny runs of a test session share one store of stages, also across the workers of pytest-xdist.
Stages are found by content and locked, so a stage that one test has built (SFT above all) is only
read by the others. How to use the store:

- `shared_runs.shared_run(name)` is a finished run that several test files read.
- The fixture `tiny_folder` is a folder for the runs of one test file: pass it to `tiny_recipe`,
  and set `name=...` where the file makes more than one run. Its store is the session's.
- A test that damages, deletes, kills or times stages takes `tmp_path`, where it has its own store.
"""

import json
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from irl_align.config.recipe import load_recipe
from irl_align.config.schema import Recipe

# 200 demonstrations of the built-in task, one layer of width 32, a sequence length that most
# samples of the trained model stay below.
RECIPE = """\
name: tiny
output_dir: runs
device: cpu
data:
  card: restaurant
  task: {size: 200, noise: 0.0}
  held_out: 0.2
model:
  from_scratch:
    vocab_size: 400
    hidden_size: 32
    intermediate_size: 64
    num_hidden_layers: 1
    num_attention_heads: 2
    max_position_embeddings: 192
sft:
  args: {num_train_epochs: 4, per_device_train_batch_size: 16, learning_rate: 2.0e-2}
generation: {max_new_tokens: 64}
reward:
  args: {num_train_epochs: 1, per_device_train_batch_size: 32}
  schedule: {learning_rate: [3.0e-3]}
policy_update:
  kind: best_of_n
  n: 2
  prompts: 24
loop:
  iterations: 1
  signs: {unfit_accuracy: 0.0}
evaluation: {prompts: 12, held_out_prompts: 12}
"""
BEST = (
    "policy_update.args={num_train_epochs: 1, per_device_train_batch_size: 16}",
    "policy_update.args.learning_rate=0.001",
)
SPIN = (
    "reward.kind=implicit",
    "reward.args={beta: 0.1, num_train_epochs: 1, per_device_train_batch_size: 32}",
    "reward.schedule.learning_rate=[0.001]",
    "policy_update={kind: identity}",
    "pairs.truncated=keep",
)


_session: dict[str, Path] = {}


def start_session(base: Path, shared: Path) -> None:
    """Set where this worker's runs lie (`base`) and where the session's one store lies."""
    (shared / "tiny-store").mkdir(exist_ok=True)
    _session.update(base=base, store=shared / "tiny-store")


def session_folder(name: str) -> Path:
    """A folder for tiny runs of this worker, whose `runs/store` links to the session's store."""
    folder = _session["base"] / name
    if not folder.exists():
        (folder / "runs").mkdir(parents=True)
        (folder / "runs" / "store").symlink_to(_session["store"])
    return folder


def write_recipe(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def tiny_recipe(folder: Path, *overrides: str) -> Recipe:
    """The tiny recipe with its runs below ``folder``, and overrides as on the command line."""
    return load_recipe(write_recipe(folder), [f"output_dir={folder / 'runs'}", *overrides])


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


def irl_align(capsys: pytest.CaptureFixture[str], *arguments: object) -> Ended:
    """Run the command line in this process, as its entry point does."""
    from irl_align.cli.main import main

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["irl-align", *map(str, arguments)])
        patch.setattr(os, "environ", os.environ.copy())  # what it sets is for its own process
        with warnings.catch_warnings():
            try:
                main()
                status = 0
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 0
    captured = capsys.readouterr()
    return Ended(status, captured.out, captured.err)


def the_line(ended: Ended) -> str:
    """The only line of a command's error that the user can mend, without its prefix."""
    assert ended.status == 2, (ended.out, ended.err)
    assert "Traceback" not in ended.err
    lines = [line for line in ended.err.splitlines() if line.startswith("irl-align: ")]
    assert len(lines) == 1 and ended.err.splitlines()[-1] == lines[0], ended.err
    return lines[0].removeprefix("irl-align: ")


def stage_folder(run: Path, role: str) -> Path:
    """Where a run's stage lies in the store."""
    stages = json.loads((run / "stages.json").read_text(encoding="utf-8"))
    return (run / stages[role]["path"]).resolve()


def stage_records(run: Path) -> dict[str, dict[str, Any]]:
    """Role -> record of the stage, read from the store without the package."""
    return {
        role: json.loads((stage_folder(run, role) / "stage.json").read_text(encoding="utf-8"))
        for role in json.loads((run / "stages.json").read_text(encoding="utf-8"))
    }


def metrics(run: Path) -> dict[str, dict[str, Any]]:
    """Key -> record of metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["key"]: record for record in map(json.loads, lines)}


def weights(model: Path) -> bytes:
    """The bytes of a model's weights."""
    return (model / "model.safetensors").read_bytes()
