"""A run that is killed, stopped or started twice: nothing is lost and every bit is the same."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny_runs import BEST, stage_records, weights, write_recipe

from irl_align.training.store import Store, stage_key

pytestmark = pytest.mark.timeout(400)
# Two epochs and a save per step, so that kills fall between checkpoints of one training.
RECIPE = (
    *BEST,
    "loop.iterations=1",
    "sft.args={num_train_epochs: 2, save_steps: 3}",
    "reward.args={num_train_epochs: 2, per_device_train_batch_size: 16, save_steps: 2}",
)
KILLS = 6


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """`irl-align train` on the tiny recipe, its run below the folder."""
    command = [sys.executable, "-m", "irl_align", "train", str(write_recipe(folder))]
    return subprocess.Popen(
        [*command, f"output_dir={folder / 'runs'}", *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Ctrl-C does something, also where the tests run as a shell's background job.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> bool:
    """Poll until something is there; False when the process ended first."""
    while not happened():
        if process.poll() is not None:
            assert process.returncode == 0, process.communicate()[1]
            return False
        time.sleep(0.002)
    return True


def finished(process: subprocess.Popen[str]) -> str:
    """Standard error of a process that ends well."""
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return errors


def results(folder: Path) -> tuple[bytes, bytes]:
    """Weights of the final policy and reward of a finished run."""
    summary = json.loads((folder / "runs/tiny-seed0/summary.json").read_text())
    policy, reward = (folder / "runs" / summary[name] for name in ("policy", "reward"))
    return weights(policy), weights(reward)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    finished(start(folder, *RECIPE))
    return folder


def files_seen(folder: Path) -> int:
    """Events of a run: stages committed, and files and checkpoints of stages under way."""
    try:
        return sum(1 for path in (folder / "runs/store").rglob("*") if path.suffix != ".pid")
    except FileNotFoundError:  # a folder was renamed while it was looked at
        return 0


def test_kills_lose_nothing_and_change_no_bit(whole: Path, tmp_path: Path) -> None:
    """Killed six times, after a random number of further events in the store."""
    rng = random.Random(7)
    total = files_seen(whole)
    kills = 0
    while kills < KILLS:
        process = start(tmp_path, *RECIPE)
        target = files_seen(tmp_path) + rng.randint(1, max(2, total // KILLS))
        if not wait_for(process, lambda goal=target: files_seen(tmp_path) >= goal):  # type: ignore[misc]
            break
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    assert kills >= 3
    finished(start(tmp_path, *RECIPE))

    assert results(tmp_path) == results(whole)
    ours, theirs = (stage_records(folder / "runs/tiny-seed0") for folder in (tmp_path, whole))
    assert {role: r["key"] for role, r in ours.items()} == {
        role: r["key"] for role, r in theirs.items()
    }
    assert any(record["resumed"] for record in ours.values())
    leftovers = [p.name for p in (tmp_path / "runs/store/.work").iterdir() if p.is_dir()]
    assert leftovers == []


def test_a_half_written_record_is_no_artefact(tmp_path: Path) -> None:
    """A kill while the record is written leaves a partial file, which the next try must forget."""
    store = Store(tmp_path)
    work = tmp_path / ".work" / f"toy-{stage_key('toy', {}, {})}"
    work.mkdir(parents=True)
    (work / ".stage.json.partial").write_text('{"format": 1, "na')

    def build(folder: Path) -> dict[str, int]:
        (folder / "made.txt").write_text("made")
        return {"made": 1}

    built = store.stage("toy", {}, {}, build)
    assert sorted(path.name for path in built.path.iterdir()) == ["made.txt", "stage.json"]
    assert store.stage("toy", {}, {}, build).reused


def checkpoints(folder: Path, stage: str) -> list[Path]:
    return list((folder / "runs/store/.work").glob(f"{stage}-*/scratch/checkpoint-*/.seal.json"))


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_training_goes_on_from_its_checkpoint(whole: Path, tmp_path: Path, stage: str) -> None:
    process = start(tmp_path, *RECIPE)
    assert wait_for(process, lambda: bool(checkpoints(tmp_path, stage)))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert checkpoints(tmp_path, stage)
    finished(start(tmp_path, *RECIPE))
    assert results(tmp_path) == results(whole)
    role = {"sft": "sft", "reward": "reward/0"}[stage]
    assert stage_records(tmp_path / "runs/tiny-seed0")[role]["resumed"]


def test_ctrl_c_says_one_line_and_a_second_process_is_refused(tmp_path: Path) -> None:
    process = start(tmp_path, *RECIPE, "sft.args.num_train_epochs=2000")
    assert wait_for(process, lambda: bool(checkpoints(tmp_path, "sft")) or _training(tmp_path))
    second = start(tmp_path, *RECIPE, "sft.args.num_train_epochs=2000")
    output, errors = second.communicate(timeout=60)
    assert second.returncode == 2 and output == ""
    line = errors.splitlines()[-1]
    assert line.startswith("irl-align: run ") and f"in use by process {process.pid}" in line

    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and output == ""
    said = [line for line in errors.splitlines() if "irl-align:" in line]
    assert said == ["irl-align: stopped; the same command goes on from the last checkpoint"]
    assert "Traceback" not in errors and errors.splitlines()[-1] == said[0]


def _training(folder: Path) -> bool:
    """Whether SFT has begun to write in its work folder."""
    return bool(list((folder / "runs/store/.work").glob("sft-*/scratch")))
