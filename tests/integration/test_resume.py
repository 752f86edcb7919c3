"""A run that is killed, stopped or started twice: nothing is lost and every bit is the same."""

import json
import random
import signal
from functools import partial
from pathlib import Path

import pytest
from support.commands import Command
from support.tiny_runs import BEST, stage_records, weights, write_recipe

from irl_align.training.store import Store, stage_key

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
# Two epochs and a save per step, so that kills fall between checkpoints of one training.
RECIPE = (
    *BEST,
    "loop.iterations=1",
    "sft.args={num_train_epochs: 2, save_steps: 3}",
    "reward.args={num_train_epochs: 2, per_device_train_batch_size: 16, save_steps: 2}",
)
KILLS = 6


def start(folder: Path, *overrides: str) -> Command:
    """`irl-align train` on the tiny recipe, its run below the folder."""
    log = folder / f"{len(list(folder.glob('*.log')))}.log"
    return Command(log, "train", write_recipe(folder), f"output_dir={folder / 'runs'}", *overrides)


def finish(command: Command) -> None:
    """Wait for a command that ends well."""
    status, printed = command.ended()
    assert status == 0, printed


def kill(command: Command) -> None:
    """End a command as a crash of the machine does."""
    command.send(signal.SIGKILL)
    assert command.ended()[0] == -signal.SIGKILL


def results(folder: Path) -> tuple[bytes, bytes]:
    """Weights of the final policy and reward of a finished run."""
    summary = json.loads((folder / "runs/tiny-seed0/summary.json").read_text())
    policy, reward = (folder / "runs" / summary[name] for name in ("policy", "reward"))
    return weights(policy), weights(reward)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder, *RECIPE))
    return folder


def files_seen(folder: Path) -> int:
    """Events of a run: stages committed, and files and checkpoints of stages under way."""
    try:
        return sum(1 for path in (folder / "runs/store").rglob("*") if path.suffix != ".pid")
    except FileNotFoundError:  # a folder was renamed while it was looked at
        return 0


def has_files(folder: Path, count: int) -> bool:
    return files_seen(folder) >= count


def test_train_killed_six_times_ends_with_the_same_weights(whole: Path, tmp_path: Path) -> None:
    """Killed six times, after a random number of further events in the store."""
    rng = random.Random(7)
    total = files_seen(whole)
    kills = 0
    while kills < KILLS:
        target = files_seen(tmp_path) + rng.randint(1, max(2, total // KILLS))
        command = start(tmp_path, *RECIPE)
        if not command.wait_for(partial(has_files, tmp_path, target)):
            break
        kill(command)
        kills += 1
    assert kills >= 3
    finish(start(tmp_path, *RECIPE))

    assert results(tmp_path) == results(whole)
    ours, theirs = (stage_records(folder / "runs/tiny-seed0") for folder in (tmp_path, whole))
    assert {role: r["key"] for role, r in ours.items()} == {
        role: r["key"] for role, r in theirs.items()
    }
    assert any(record["resumed"] for record in ours.values())
    leftovers = [p.name for p in (tmp_path / "runs/store/.work").iterdir() if p.is_dir()]
    assert leftovers == []


def test_stage_forgets_a_half_written_record(tmp_path: Path) -> None:
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
def test_train_killed_in_a_stage_resumes_from_its_checkpoint(
    whole: Path, tmp_path: Path, stage: str
) -> None:
    command = start(tmp_path, *RECIPE)
    assert command.wait_for(lambda: bool(checkpoints(tmp_path, stage)))
    kill(command)
    assert checkpoints(tmp_path, stage)
    finish(start(tmp_path, *RECIPE))
    assert results(tmp_path) == results(whole)
    role = {"sft": "sft", "reward": "reward/0"}[stage]
    assert stage_records(tmp_path / "runs/tiny-seed0")[role]["resumed"]


def test_train_refuses_a_second_process_and_ends_with_one_line_on_ctrl_c(tmp_path: Path) -> None:
    first = start(tmp_path, *RECIPE, "sft.args.num_train_epochs=2000")
    assert first.wait_for(lambda: bool(checkpoints(tmp_path, "sft")))
    status, printed = start(tmp_path, *RECIPE, "sft.args.num_train_epochs=2000").ended()
    assert status == 2
    line = printed.splitlines()[-1]
    assert line.startswith("irl-align: run ") and f"in use by process {first.pid}" in line

    first.send(signal.SIGINT)
    status, printed = first.ended()
    assert status == 130 and "Traceback" not in printed
    messages = [line for line in printed.splitlines() if "irl-align:" in line]
    assert messages == ["irl-align: stopped; the same command resumes from the last checkpoint"]
    assert printed.splitlines()[-1] == messages[0]
