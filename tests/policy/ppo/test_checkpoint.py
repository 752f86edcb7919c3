"""PPO that is stopped, killed or diverges: it goes on bit by bit, or keeps its last good policy."""

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
import torch
from support.ppo_tools import EOS, Scripted, actors, options, small_llama, train
from support.rows import random_ids, same_weights
from support.tiny_runs import stage_records, tiny_recipe, weights, write_recipe
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from irl_align.config.policy_update import PPOOptions
from irl_align.errors import TryAgain, UserError
from irl_align.models.loading import load_model
from irl_align.policy.ppo.actors import Actors
from irl_align.policy.ppo.checkpoint import read_progress
from irl_align.policy.ppo.monitors import WINDOW
from irl_align.training.train import train as run_recipe

PROMPTS = random_ids(16, 2, 5, 0, vocabulary=12)  # as many as a rollout has samples
REWARD = Scripted(lambda prompt, completion: completion.count(5) - 0.1 * len(completion))


def cast_of(tokenizer: PreTrainedTokenizerFast, chosen: PPOOptions, reward: Any = REWARD) -> Actors:
    return actors(small_llama(12), reward, tokenizer, PROMPTS, chosen)


def timeless(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what a clock says."""
    history = [
        {name: value for name, value in record.items() if not name.startswith("seconds")}
        for record in report["history"]
    ]
    return {**{k: v for k, v in report.items() if k != "start"}, "history": history}


class Stop(Exception):
    """In place of a kill."""


def stop_after(cast: Actors, rollouts: int) -> None:
    """Have the generator fail once it has drawn so often, looks at held-out prompts included."""
    whole, drawn = cast.generator.stream, 0

    def stream(*arguments: Any) -> Any:
        nonlocal drawn
        drawn += 1
        if drawn > rollouts:
            raise Stop
        return whole(*arguments)

    cast.generator.stream = stream  # type: ignore[method-assign]


WAYS: dict[str, dict[str, Any]] = {
    "gae": {"critic": "shared", "minibatches": 2, "kl_target": 0.5, "kl_horizon": 100},
    "reinforce": {"advantage": "reinforce", "keep": "reward_gap", "evaluate_every": 1},
    "random": {"credit": "random", "keep": "log_prob", "evaluate_every": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_two_and_two_updates_are_four(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, way: str
) -> None:
    chosen = options(checkpoint_every=2, **WAYS[way])
    assert chosen.updates == 4
    whole = cast_of(tiny_tokenizer, chosen)
    want = train(tmp_path / "whole", whole, chosen)

    halves = tmp_path / "halves"
    first = cast_of(tiny_tokenizer, chosen)
    # stopped in its third rollout, after the looks at held-out prompts that lie before it
    looks = 1 + sum(done % chosen.evaluate_every == 0 for done in (1, 2))
    stop_after(first, looks + 2)
    with pytest.raises(Stop):
        train(halves, first, chosen)
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


def test_a_half_written_checkpoint_and_journal_are_forgotten(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    chosen = options(checkpoint_every=2)
    want = train(tmp_path / "whole", cast_of(tiny_tokenizer, chosen), chosen)
    work = tmp_path / "killed"
    first = cast_of(tiny_tokenizer, chosen)
    stop_after(first, 4)  # the fourth rollout
    with pytest.raises(Stop):
        train(work, first, chosen)
    torn = work / "scratch/.checkpoint-4.partial"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (work / name).open("a") as file:
            file.write('{"update": 4, "rew')
    assert timeless(train(work, cast_of(tiny_tokenizer, chosen), chosen)) == timeless(want)
    assert weights(work / "model") == weights(tmp_path / "whole/model")
    assert len((work / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_checkpoint_holds_no_more_records_than_an_alarm_looks_at(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Memory and checkpoints do not grow with the updates: the journal has their records."""
    chosen = options(episodes=16 * (WINDOW + 3), checkpoint_every=WINDOW + 2)
    report = train(tmp_path, cast_of(tiny_tokenizer, chosen), chosen)
    [checkpoint] = (tmp_path / "scratch").glob("checkpoint-*")
    held = [record["update"] for record in read_progress(checkpoint).recent]
    assert held == list(range(3, WINDOW + 3))
    told = [record["update"] for record in report["history"]]
    assert told == list(range(1, WINDOW + 4))


# --- what is kept ---------------------------------------------------------------------------------


def test_the_policy_nearest_the_demonstrations_is_kept(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """By their reward: the demonstrations' is -0.2, and training passes it on its way up."""
    chosen = options(episodes=16 * 12, evaluate_every=1, keep="reward_gap", kl_coef=0.0)
    report = train(tmp_path / "work", cast_of(tiny_tokenizer, chosen), chosen)
    gaps = [report["start"], *report["history"]]
    nearest = min(range(13), key=lambda i: abs(gaps[i]["held_out_gap"]))
    assert report["kept_update"] == nearest and report["best"] == -abs(
        gaps[nearest]["held_out_gap"]
    )
    assert nearest < 12, "the test is of a training that goes past the best"
    again = cast_of(tiny_tokenizer, PPOOptions.model_validate({**vars(chosen), "keep": "last"}))
    few = options(episodes=16 * 12, evaluate_every=100, kl_coef=0.0, checkpoint_every=nearest or 1)
    if nearest:
        stop_after(again, 1 + nearest)
        with pytest.raises(Stop):
            train(tmp_path / "again", again, few)
        kept = load_model(tmp_path / "work/model")
        assert same_weights(kept, again.policy)


def test_by_log_prob_the_start_may_be_the_best(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = options(keep="log_prob", evaluate_every=1)
    # a reward that runs from what the demonstrations say
    away = Scripted(lambda prompt, completion: -float(3 in completion) - float(EOS in completion))
    cast = cast_of(tiny_tokenizer, chosen, away)
    report = train(tmp_path / "work", cast, chosen)
    logps = [report["start"], *report["history"]]
    best = max(range(5), key=lambda i: logps[i]["held_out_log_prob"])
    assert report["kept_update"] == best == 0
    assert same_weights(load_model(tmp_path / "work/model"), small_llama(12))
    assert "no update was better than the start" in caplog.text


# --- stops ----------------------------------------------------------------------------------------


def broken_after(calls: int, value: float) -> Scripted:
    """A reward that is `value` from its n-th pass on; the first is of the demonstrations."""
    reward = Scripted(lambda prompt, completion: float(completion.count(5)))
    whole = reward.score_ids

    def score_ids(prompts: Any, completions: Any) -> torch.Tensor:
        scores = whole(prompts, completions)
        return scores if reward.calls <= calls else torch.full_like(scores, value)

    reward.score_ids = score_ids  # type: ignore[method-assign]
    return reward


def train_through(work: Path, make: Callable[[], Actors], chosen: PPOOptions) -> dict[str, Any]:
    """Train as a stage does: anew from the last checkpoint after the first fault since it."""
    with pytest.raises(TryAgain):
        train(work, make(), chosen)
    return train(work, make(), chosen)


def test_a_nan_that_does_not_come_again_changes_nothing(
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


def test_a_damaged_checkpoint_is_not_gone_on_from(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    chosen = options(checkpoint_every=1)
    want = train(tmp_path / "whole", cast_of(tiny_tokenizer, chosen), chosen)
    first = cast_of(tiny_tokenizer, chosen)
    stop_after(first, 4)  # the fourth rollout
    with pytest.raises(Stop):
        train(tmp_path / "work", first, chosen)
    file = tmp_path / "work/scratch/checkpoint-3/optimizer.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    got = train(tmp_path / "work", cast_of(tiny_tokenizer, chosen), chosen)
    assert timeless(got) == timeless(want)
    assert weights(tmp_path / "work/model") == weights(tmp_path / "whole/model")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, value: float
) -> None:
    chosen = options()
    with pytest.raises(UserError, match="finite"):
        train(tmp_path / "work", cast_of(tiny_tokenizer, chosen, broken_after(2, value)), chosen)


def test_a_reward_that_breaks_later_ends_training(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = options(checkpoint_every=1)
    # two passes look at held-out prompts, then one per update: the third update's is broken, and
    # after the second checkpoint, from which it is tried again, every one
    rewards = iter([broken_after(4, math.nan), broken_after(0, math.nan)])
    report = train_through(
        tmp_path / "work", lambda: cast_of(tiny_tokenizer, chosen, next(rewards)), chosen
    )
    assert report["updates"] == 2 and report["kept_update"] == 1
    assert report["ended"].startswith("stopped at update 3: ") and "\n" not in report["ended"]
    assert report["ended"].endswith("the policy after update 1 is kept")
    assert report["ended"] in caplog.text

    one = cast_of(tiny_tokenizer, chosen, broken_after(99, math.nan))
    stop_after(one, 2)
    with pytest.raises(Stop):
        train(tmp_path / "one", one, chosen)
    assert same_weights(load_model(tmp_path / "work/model"), one.policy)


def test_an_exploding_kl_stops_before_the_update(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    wild: dict[str, Any] = {"kl_stop": 0.5, "learning_rate": 0.5, "epoch_kl": None}
    chosen = options(checkpoint_every=1, episodes=16 * 10, **wild)
    with pytest.raises(UserError, match=r"update 2: KL to the reference is .* above kl_stop 0.5"):
        train_through(tmp_path / "none", lambda: cast_of(tiny_tokenizer, chosen), chosen)

    slow = options(
        checkpoint_every=1, episodes=16 * 30, kl_stop=1.0, kl_coef=0.0, lr_schedule="constant"
    )
    report = train_through(tmp_path / "work", lambda: cast_of(tiny_tokenizer, slow), slow)
    kls = [record["kl"] for record in report["history"]]
    assert 2 <= len(kls) < 30 and max(kls) <= 1.0
    assert report["kept_update"] == len(kls) - 1
    assert "above kl_stop 1" in report["ended"]


def test_weights_that_blow_up_stop_training(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    chosen = options(
        learning_rate=1e30, epoch_kl=None, kl_stop=1e30, kl_alarm=1e30, evaluate_every=100
    )
    with pytest.raises(UserError) as caught:
        train_through(tmp_path / "work", lambda: cast_of(tiny_tokenizer, chosen), chosen)
    assert "no earlier policy was kept" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", ["reward_gap", "log_prob"])
def test_an_explosion_before_any_checkpoint_keeps_the_start(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, keep: str
) -> None:
    """Of the looks at held-out demonstrations only the first, at the start, has been reached."""
    wild: dict[str, Any] = {"kl_stop": 0.5, "learning_rate": 0.5, "epoch_kl": None}
    chosen = options(keep=keep, evaluate_every=100, **wild)
    report = train_through(tmp_path / "work", lambda: cast_of(tiny_tokenizer, chosen), chosen)
    assert report["updates"] == 1 and report["kept_update"] == 0
    assert report["ended"].startswith("stopped at update 2: KL to the reference is ")
    assert report["ended"].endswith("; the start is kept")
    assert [record["update"] for record in report["history"]] == [1]
    assert same_weights(load_model(tmp_path / "work/model"), small_llama(12))


def test_a_start_that_is_the_best_is_kept_and_not_a_checkpoint(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """As at the end of a training that does not diverge; a checkpoint is kept by `last` alone."""
    slow: dict[str, Any] = {"kl_stop": 1.0, "kl_coef": 0.0, "lr_schedule": "constant"}
    many: dict[str, Any] = {"episodes": 16 * 30, "checkpoint_every": 1, "evaluate_every": 100}
    kept = {}
    for keep in ("log_prob", "last"):
        chosen = options(keep=keep, **slow, **many)
        work = tmp_path / keep
        report = train_through(work, lambda c=chosen: cast_of(tiny_tokenizer, c), chosen)  # type: ignore[misc]
        assert "above kl_stop 1" in report["ended"] and len(report["history"]) >= 2
        assert list((work / "scratch").glob("checkpoint-*"))
        kept[keep] = report["kept_update"]
    assert kept["log_prob"] == 0 < kept["last"]
    assert same_weights(load_model(tmp_path / "log_prob/model"), small_llama(12))
    assert "no update was better than the start, which is kept" in caplog.text


def test_a_first_update_that_blows_up_is_no_training(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """It is told as a mistake to mend, with what it was, and not as a policy that was kept."""
    wild: dict[str, Any] = {"learning_rate": 1e30, "epoch_kl": None, "kl_stop": 1e30}
    chosen = options(keep="reward_gap", **wild)
    with pytest.raises(UserError, match=r"PPO: update 1: .*; no update before it was sound") as e:
        train_through(tmp_path / "work", lambda: cast_of(tiny_tokenizer, chosen), chosen)
    assert "\n" not in str(e.value) and not (tmp_path / "work/model").exists()


def without_eos_after(cast: Actors, rollouts: int) -> Actors:
    """Have the generator never end a sample once it has drawn so often."""
    whole, drawn = cast.generator.stream, 0

    def stream(*arguments: Any) -> Any:
        nonlocal drawn
        drawn += 1
        if drawn > rollouts:
            cast.generator.eos[:] = 10**6  # type: ignore[attr-defined]
        return whole(*arguments)

    cast.generator.stream = stream  # type: ignore[method-assign]
    return cast


@pytest.mark.parametrize(("keep", "kept"), [("last", 1), ("log_prob", 0)])
def test_all_samples_without_eos_in_a_later_rollout_end_training(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, keep: str, kept: int
) -> None:
    """A mistake in the first rollout; in the third the policy's, of which an earlier is kept."""
    chosen = options(missing_eos="replace", checkpoint_every=1, keep=keep, evaluate_every=100)
    # The look at held-out prompts and two rollouts; then, from the second checkpoint on, none.
    sound = iter([3, 0])
    report = train_through(
        tmp_path / "work",
        lambda: without_eos_after(cast_of(tiny_tokenizer, chosen), next(sound)),
        chosen,
    )
    assert report["updates"] == 2 and report["kept_update"] == kept
    line = "stopped at update 3: PPO: all 16 samples of a rollout are without EOS; raise "
    assert report["ended"].startswith(line) and "\n" not in report["ended"]
    assert report["ended"].endswith("policy after update 1 is kept" if kept else "start is kept")
    one = cast_of(tiny_tokenizer, chosen)
    stop_after(one, 1 + kept)
    with pytest.raises(Stop):
        train(tmp_path / "one", one, chosen)
    assert same_weights(load_model(tmp_path / "work/model"), one.policy)


def test_all_samples_without_eos(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    chosen = options(missing_eos="replace")
    model: PreTrainedModel = small_llama(12)
    cast = actors(model, REWARD, tiny_tokenizer, PROMPTS, chosen, max_new_tokens=1)
    cast.generator.eos[:] = 10**6  # type: ignore[attr-defined]  # an end that is never said
    with pytest.raises(UserError, match="all 16 samples of a rollout are without EOS; raise"):
        train(tmp_path / "work", cast, chosen)


def test_a_rollout_without_tokens_or_prompts(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    import numpy as np

    from irl_align.models.generation.protocol import Completion
    from irl_align.policy.ppo.rollout import collate

    empty = Completion([], np.zeros(0, np.float32), True)
    full = Completion([4], np.zeros(1, np.float32), True)
    with pytest.raises(UserError, match="sample 1 has no token"):
        collate([[3], [3]], [full, empty])
    with pytest.raises(UserError, match="no samples"):
        collate([], [])


def test_pad_equal_to_eos_is_refused(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    chosen = options()
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
    with pytest.raises(UserError, match="pad token is 2 and its EOS 2"):
        train(tmp_path / "work", cast_of(tiny_tokenizer, chosen), chosen)


def test_a_policy_that_is_another_function_in_training_is_refused(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The sampler's log-probs are of another model than the learner's."""
    chosen = options()
    cast = cast_of(tiny_tokenizer, chosen)
    cast.generator.model = small_llama(12, seed=9)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="are the same model, but their log-probs differ"):
        train(tmp_path / "work", cast, chosen)


# --- killed ---------------------------------------------------------------------------------------

RECIPE = (
    "policy_update={kind: ppo, batch_size: 16, episodes: 192, learning_rate: 0.001}",
    "policy_update.critic_init=reward",
    "policy_update.credit=red",
    "policy_update.checkpoint_every=2",
    "policy_update.evaluate_every=3",
    "policy_update.kl_coef=0.05",
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
    """Poll until something is there; False when the process ended first."""
    while not happened():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def updates_begun(folder: Path) -> int:
    """Updates of a PPO stage under way that have been recorded."""
    found = list((folder / "runs/store/.work").glob("ppo-*/metrics.jsonl"))
    try:
        return len(found[0].read_text().splitlines()) if found else 0
    except FileNotFoundError:
        return 0


@pytest.mark.timeout(400)
def test_killed_in_an_update_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    """The loop is killed in an update between two checkpoints of PPO, and run again."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    run_recipe(tiny_recipe(whole, *RECIPE))
    left_out = shutil.ignore_patterns("ppo-*", "vitals-*", "evaluation-*")
    shutil.copytree(whole / "runs/store", killed / "runs/store", ignore=left_out)
    process = start(killed)
    reached = wait(process, lambda: updates_begun(killed) >= 5)
    os.kill(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert reached, errors
    (scratch,) = (killed / "runs/store/.work").glob("ppo-*/scratch")
    assert list(scratch.glob("checkpoint-*"))
    run_recipe(tiny_recipe(killed, *RECIPE))

    ours, theirs = (stage_records(f / "runs/tiny-seed0")["policy-1"] for f in (killed, whole))
    assert ours["resumed"] and not theirs["resumed"]
    assert ours["key"] == theirs["key"]
    assert timeless(ours["metrics"]) == timeless(theirs["metrics"])
    mine, other = (f / f"runs/store/ppo-{theirs['key']}" for f in (killed, whole))
    assert weights(mine / "model") == weights(other / "model")
    assert (mine / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    assert not (mine / "scratch").exists()
