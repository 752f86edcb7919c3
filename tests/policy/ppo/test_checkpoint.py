"""PPO that is stopped or killed resumes bit-identical from its last whole checkpoint."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.ppo_tools import (
    broken_after,
    cast_of,
    options,
    timeless,
    train,
    train_through,
    train_until_stopped,
)
from support.rows import same_weights
from support.tiny_runs import stage_records, tiny_recipe, weights, write_recipe
from transformers import PreTrainedTokenizerFast

from irl_align.policy.ppo.actors import Actors
from irl_align.policy.ppo.checkpoint import read_progress
from irl_align.policy.ppo.monitors import WINDOW
from irl_align.training.train import train as run_recipe

WAYS: dict[str, dict[str, Any]] = {
    "gae": {"critic": "shared", "minibatches": 2, "kl_target": 0.5, "kl_horizon": 100},
    "reinforce": {"advantage": "reinforce", "keep": "reward_gap", "evaluate_every": 1},
    "random": {"credit": "random", "keep": "log_prob", "evaluate_every": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_train_resumes_bit_identical_after_a_stop(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, way: str
) -> None:
    chosen = options(checkpoint_every=2, **WAYS[way])
    assert chosen.updates == 4
    whole = cast_of(tiny_tokenizer, chosen)
    want = train(tmp_path / "whole", whole, chosen)

    halves = tmp_path / "halves"
    first = cast_of(tiny_tokenizer, chosen)
    # stopped in its third rollout, after the evaluations before it
    evaluations = 1 + sum(done % chosen.evaluate_every == 0 for done in (1, 2))
    train_until_stopped(halves, first, chosen, evaluations + 2)
    assert [p.name for p in (halves / "scratch").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (halves / "model").exists()
    second = cast_of(tiny_tokenizer, chosen)
    got = train(halves, second, chosen)

    assert same_weights(second.policy, whole.policy)
    assert timeless(got) == timeless(want)
    assert weights(halves / "model") == weights(tmp_path / "whole/model")
    assert (halves / "samples.jsonl").read_bytes() == (
        tmp_path / "whole/samples.jsonl"
    ).read_bytes()
    updates = [json.loads(x)["update"] for x in (halves / "metrics.jsonl").read_text().splitlines()]
    assert updates == [1, 2, 3, 4]


def test_train_ignores_a_half_written_checkpoint_and_journal(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    chosen = options(checkpoint_every=2)
    want = train(tmp_path / "whole", cast_of(tiny_tokenizer, chosen), chosen)
    work = tmp_path / "killed"
    first = cast_of(tiny_tokenizer, chosen)
    train_until_stopped(work, first, chosen, 4)  # the fourth rollout
    torn = work / "scratch/.checkpoint-4.partial"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (work / name).open("a") as file:
            file.write('{"update": 4, "rew')
    assert timeless(train(work, cast_of(tiny_tokenizer, chosen), chosen)) == timeless(want)
    assert weights(work / "model") == weights(tmp_path / "whole/model")
    assert len((work / "metrics.jsonl").read_text().splitlines()) == 4


def test_save_checkpoint_keeps_the_records_that_alarms_need(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Memory and checkpoints do not grow with the updates: the journal has all records."""
    chosen = options(episodes=16 * (WINDOW + 3), checkpoint_every=WINDOW + 2)
    report = train(tmp_path, cast_of(tiny_tokenizer, chosen), chosen)
    [checkpoint] = (tmp_path / "scratch").glob("checkpoint-*")
    held = [record["update"] for record in read_progress(checkpoint).recent]
    assert held == list(range(3, WINDOW + 3))
    numbers = [record["update"] for record in report["history"]]
    assert numbers == list(range(1, WINDOW + 4))


def test_train_is_unchanged_by_a_nan_that_does_not_repeat(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    chosen = options(checkpoint_every=2)
    sound = cast_of(tiny_tokenizer, chosen, broken_after(99, math.nan))
    want = train(tmp_path / "whole", sound, chosen)
    rewards = iter([broken_after(4, math.nan), broken_after(99, math.nan)])

    def make() -> Actors:
        return cast_of(tiny_tokenizer, chosen, next(rewards))

    assert timeless(train_through(tmp_path / "work", make, chosen)) == timeless(want)
    assert weights(tmp_path / "work/model") == weights(tmp_path / "whole/model")


def test_train_skips_a_damaged_checkpoint(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    chosen = options(checkpoint_every=1)
    want = train(tmp_path / "whole", cast_of(tiny_tokenizer, chosen), chosen)
    first = cast_of(tiny_tokenizer, chosen)
    train_until_stopped(tmp_path / "work", first, chosen, 4)  # the fourth rollout
    file = tmp_path / "work/scratch/checkpoint-3/optimizer.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    got = train(tmp_path / "work", cast_of(tiny_tokenizer, chosen), chosen)
    assert timeless(got) == timeless(want)
    assert weights(tmp_path / "work/model") == weights(tmp_path / "whole/model")


# --- killed ---------------------------------------------------------------------------------------

RECIPE = (
    "policy_update={kind: ppo, batch_size: 16, episodes: 96, learning_rate: 0.001}",
    "policy_update.critic_init=reward",
    "policy_update.credit=red",
    "policy_update.checkpoint_every=2",
    "policy_update.evaluate_every=3",
    "policy_update.kl_coef=0.05",
    "evaluation={prompts: 4, held_out_prompts: 4}",
    "generation.max_new_tokens=32",
    "pairs.truncated=keep",
)


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "irl_align", "train", str(write_recipe(folder))]
    return subprocess.Popen(
        [*command, f"output_dir={folder / 'runs'}", *RECIPE],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(process: subprocess.Popen[str], happened: Callable[[], bool]) -> bool:
    """Poll until something has happened; False if the process ended first."""
    while not happened():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def recorded_updates(folder: Path) -> int:
    """Recorded updates of a PPO stage in progress."""
    files = list((folder / "runs/store/.work").glob("ppo-*/metrics.jsonl"))
    try:
        return len(files[0].read_text().splitlines()) if files else 0
    except FileNotFoundError:
        return 0


@pytest.mark.timeout(400)
def test_run_killed_in_an_update_ends_bit_identical(tmp_path: Path) -> None:
    """The loop is killed in an update between two checkpoints of PPO, and run again."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    run_recipe(tiny_recipe(whole, *RECIPE))
    left_out = shutil.ignore_patterns("ppo-*", "vitals-*", "evaluation-*")
    shutil.copytree(whole / "runs/store", killed / "runs/store", ignore=left_out)
    process = start(killed)
    reached = wait(process, lambda: recorded_updates(killed) >= 3)
    os.kill(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert reached, errors
    (scratch,) = (killed / "runs/store/.work").glob("ppo-*/scratch")
    assert list(scratch.glob("checkpoint-*"))
    run_recipe(tiny_recipe(killed, *RECIPE))

    resumed, plain = (stage_records(f / "runs/tiny-seed0")["policy-1"] for f in (killed, whole))
    assert resumed["resumed"] and not plain["resumed"]
    assert resumed["key"] == plain["key"]
    assert timeless(resumed["metrics"]) == timeless(plain["metrics"])
    first, second = (f / f"runs/store/ppo-{plain['key']}" for f in (killed, whole))
    assert weights(first / "model") == weights(second / "model")
    assert (first / "samples.jsonl").read_bytes() == (second / "samples.jsonl").read_bytes()
    assert not (first / "scratch").exists()
