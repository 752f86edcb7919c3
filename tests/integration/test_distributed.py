"""Runs in two processes: they equal runs in one process, and a failure ends all of them."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from support.commands import Command
from support.tiny_runs import SPIN, tiny_recipe, write_recipe

from irl_align.training.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
DEEPSPEED = Path(sys.prefix) / "deepspeed"  # where `make deepspeed` puts it
# Learning rates and epsilons at which rounding stays small: Adam divides a gradient by its own
# size, so with its default epsilon a gradient of rounding errors would make whole steps.
ALL = (
    "sft.args.num_train_epochs=2",
    "sft.args.adam_epsilon=1.0e-4",
    "sft.args.save_steps=5",
    "evaluation={prompts: 6, held_out_prompts: 6, temperatures: [1.0]}",
    "loop.signs.kl=100",
)
OPTIONS = (
    *ALL,
    "reward.args.adam_epsilon=1.0e-4",
    "policy_update={kind: ppo, advantage: gae, credit: red, episodes: 48, batch_size: 16, n: 2}",
    "policy_update.epochs=2",
    "policy_update.minibatches=2",
    "policy_update.held_out_prompts=6",
    "policy_update.checkpoint_every=1",
    "policy_update.learning_rate=1.0e-5",
    "policy_update.keep=last",
)
DPO = (
    "name=dpo",
    *ALL,
    "reward.args.adam_epsilon=1.0e-4",
    "policy_update={kind: best_of_n, n: 4, use: dpo, prompts: 22}",
    "policy_update.args={num_train_epochs: 2, per_device_train_batch_size: 4, beta: 0.1}",
    "policy_update.args.gradient_accumulation_steps=2",
    "policy_update.args.learning_rate=1.0e-5",
)
# Some 150 pairs by 32: the last piece of an epoch has fewer rows in one process than in the other.
SPIN_TOO = ("name=spin", *SPIN, *ALL, "reward.schedule.learning_rate=[1.0e-5]")
NOISE = ("runtime", "per_second", "seconds", "flos", "padding", "num_tokens")


def environment(**more: str) -> dict[str, str]:
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    return {**os.environ, **quiet, **more}


def command(folder: Path, *overrides: str) -> list[str]:
    runs = f"output_dir={folder / 'runs'}"
    return ["-m", "irl_align", "train", str(write_recipe(folder)), runs, *overrides]


def start(arguments: list[str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launcher_of(config: str) -> list[str]:
    """`accelerate launch` with one of the configs that come with the recipes."""
    file = ROOT / "recipes" / "accelerate" / f"{config}.yaml"
    return ["-m", "accelerate.commands.launch", "--config_file", str(file)]


def launch(folder: Path, *overrides: str, config: str, script: Path, **more: str) -> str:
    """Run a script in two processes by `accelerate launch`; return what they printed."""
    port = ["--num_processes", "2", "--main_process_port", str(free_port())]
    arguments = [str(script), *command(folder, *overrides)[2:]]
    process = start([*launcher_of(config), *port, *arguments], **more)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return out + errors


def two_ranks(folder: Path, *overrides: str, **more: str) -> tuple[Command, Command]:
    """Start two processes without a launcher, which would end one when the other ends."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments = command(folder, *overrides)[2:]
    number = len(list(folder.glob("*.log")))
    first, second = (
        Command(
            folder / f"{number}-{rank}.log",
            *arguments,
            RANK=rank,
            LOCAL_RANK=rank,
            ACCELERATE_USE_CPU="true",
            **shared,
            **more,
        )
        for rank in ("0", "1")
    )
    return first, second


def run_two_ranks(folder: Path, *overrides: str) -> str:
    """Run two processes to their end; return what they printed."""
    ends = [rank.ended() for rank in two_ranks(folder, *overrides)]
    assert [status for status, _ in ends] == [0, 0], ends
    return "".join(printed for _, printed in ends)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def stages(folder: Path) -> dict[str, Path]:
    store = (folder / "runs" / "store").iterdir()
    return {path.name: path for path in store if not path.name.startswith(".")}


def numbers(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested metrics by their path, but for those that time or packing decides."""
    if any(word in path.rpartition("/")[2] for word in NOISE):
        return {}
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {path: value}
    return {k: v for key, item in items for k, v in numbers(item, f"{path}/{key}").items()}


def rows(path: Path) -> list[str]:
    """Rows of a parquet file as a set, without their log-probs, which are rounded."""
    table = pq.read_table(path).to_pylist()
    kept = [{k: v for k, v in row.items() if "logp" not in k} for row in table]
    return sorted(json.dumps(row, sort_keys=True, default=str) for row in kept)


def same(one: Path, two: Path, files: int) -> None:
    """Every stage of one run is in the other: rows the same, numbers but for their rounding.

    Losses of trainers are held to 1e-5. A norm of gradients, and what comes of trained weights, as
    scores and PPO's monitors do, is as near as the kernels of a processor are: 1e-4.
    """
    mine, theirs = stages(one), stages(two)
    assert set(mine) <= set(theirs)
    compared = 0
    for name, path in mine.items():
        records = [json.loads((p / "stage.json").read_text()) for p in (path, theirs[name])]
        ours, others = (numbers(record["metrics"]) for record in records)
        # TRL's monitors of pairs are means of pieces' means, and the last piece may be uneven.
        if any(kind in name for kind in ("dpo", "implicit", "reward")):
            ours, others = (
                {k: v for k, v in leaves.items() if "/history/" not in k or k.endswith("/loss")}
                for leaves in (ours, others)
            )
        assert ours.keys() == others.keys(), name
        for key, value in ours.items():
            if isinstance(value, float):
                near = 1e-5 if "loss" in key and "ppo" not in name else 1e-4
                assert others[key] == pytest.approx(value, rel=near, abs=near), (name, key)
            else:
                assert others[key] == value, (name, key)
        for file in path.glob("*.parquet"):
            assert rows(file) == rows(theirs[name] / file.name), (name, file.name)
            compared += 1
        for file in path.rglob("model.safetensors"):
            other = load_file(theirs[name] / file.relative_to(path))
            for key, weight in load_file(file).items():
                assert float((weight - other[key]).abs().max()) < 3e-5, (name, key)
            compared += 1
    assert compared >= files


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the same run in one process and in two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    train(tiny_recipe(one, *OPTIONS))
    printed = run_two_ranks(two, *OPTIONS)
    assert printed.count("irl-align: ") == 0
    return one, two


def test_two_processes_equal_one(both: tuple[Path, Path]) -> None:
    one, two = both
    same(one, two, files=15)
    (ppo,) = (path for name, path in stages(two).items() if name.startswith("ppo-"))
    assert len((ppo / "metrics.jsonl").read_text().splitlines()) == 3
    parts = json.loads((two / "runs/tiny-seed0/summary.json").read_text())
    assert parts["ended"] == "1 iterations done"


def test_fsdp_equals_whole_weights(both: tuple[Path, Path], tmp_path: Path) -> None:
    launch(tmp_path, *OPTIONS, config="fsdp2", script=ROOT / "tests/support/fsdp_on_cpu.py")
    same(tmp_path, both[0], files=13)


@pytest.mark.skipif(
    not DEEPSPEED.is_dir() or shutil.which("c++") is None,
    reason="needs `make deepspeed`, and a compiler for the communication between processes",
)
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_whole_weights(both: tuple[Path, Path], tmp_path: Path, stage: int) -> None:
    printed = launch(
        tmp_path,
        *OPTIONS,
        config=f"deepspeed-zero{stage}",
        script=ROOT / "tests/support/zero_on_cpu.py",
        ACCELERATE_USE_CPU="false",
        DS_ACCELERATOR="cpu",
        PYTHONPATH=os.pathsep.join(filter(None, (str(DEEPSPEED), os.environ.get("PYTHONPATH")))),
    )
    assert "deepspeed_shm_comm_op" in printed  # DeepSpeed connects the processes
    same(tmp_path, both[0], files=13)


def test_dpo_in_two_processes_equals_one_with_a_short_last_batch(
    both: tuple[Path, Path],
) -> None:
    one, two = both
    train(tiny_recipe(one, *DPO))
    run_two_ranks(two, *DPO)
    same(one, two, files=18)


def test_spin_in_two_processes_equals_one_when_pieces_differ_in_rows(
    both: tuple[Path, Path],
) -> None:
    one, two = both
    train(tiny_recipe(one, *SPIN_TOO))
    run_two_ranks(two, *SPIN_TOO)
    same(one, two, files=20)
    (fit,) = (path for name, path in stages(two).items() if name.startswith("implicit-"))
    metrics = json.loads((fit / "stage.json").read_text())["metrics"]
    assert metrics["first_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_rank_that_hangs_or_dies_ends_the_other_and_a_rerun_gives_the_same_weights(
    both: tuple[Path, Path], tmp_path: Path
) -> None:
    scratch = tmp_path / "runs" / "store" / ".work"

    def checkpoint(number: int) -> Callable[[], bool]:
        return lambda: any(scratch.glob(f"ppo-*/scratch/checkpoint-{number}"))

    # The second stops answering.
    first, second = two_ranks(tmp_path, *OPTIONS, IRL_ALIGN_SILENCE="4")
    assert first.wait_for(checkpoint(1))
    second.send(signal.SIGSTOP)
    status, printed = first.ended()
    second.send(signal.SIGKILL)
    second.ended()
    line = [line for line in printed.splitlines() if line.startswith("irl-align: ")]
    assert status == 1 and len(line) == 1
    assert "process 1 of 2 has sent no heartbeat for 4 s" in line[0], printed
    assert line[0].endswith("the same command resumes from the last checkpoint")

    # The first process, which holds the store of their messages, is killed.
    first, second = two_ranks(tmp_path, *OPTIONS)
    assert first.wait_for(checkpoint(2))
    first.send(signal.SIGKILL)
    first.ended()
    status, printed = second.ended()
    assert status == 1 and "irl-align: " in printed and "Traceback" not in printed

    # Two machines of one process each, on the loopback.
    machines = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    machines += ["--main_process_port", str(free_port())]
    launcher = [*launcher_of("ddp"), *machines]
    nodes = [
        start([*launcher, "--machine_rank", rank, *command(tmp_path, *OPTIONS)])
        for rank in ("0", "1")
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=600)
        assert node.returncode == 0, errors
    ended = {name.rpartition("-")[0]: path for name, path in stages(tmp_path).items()}
    reference = {name.rpartition("-")[0]: path for name, path in stages(both[1]).items()}
    for name in ("ppo", "reward", "sft"):
        weights = [(p / "model/model.safetensors").read_bytes()
                   for p in (ended[name], reference[name])]  # fmt: skip
        assert weights[0] == weights[1], name
    assert json.loads((ended["ppo"] / "stage.json").read_text())["resumed"]


def test_a_batch_that_two_processes_cannot_share_is_refused_by_one_line(tmp_path: Path) -> None:
    port = ["--num_processes", "2", "--main_process_port", str(free_port())]
    arguments = command(tmp_path, "sft.args.per_device_train_batch_size=3")
    process = start([*launcher_of("ddp"), *port, *arguments])
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    lines = [line for line in errors.splitlines() if line.startswith("irl-align: ")]
    assert len(lines) == 1 and "expected a batch that 2 processes can share" in lines[0], errors
