"""Which policy PPO keeps: at its end, and after a divergence."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ppo_tools import (
    EOS,
    PROMPTS,
    REWARD,
    Scripted,
    actors,
    before_each_draw,
    broken_after,
    cast_of,
    options,
    small_llama,
    train,
    train_through,
    train_until_stopped,
)
from support.rows import same_weights
from transformers import PreTrainedTokenizerFast

from irl_align.config.policy_update import PPOOptions
from irl_align.errors import UserError
from irl_align.models.loading import load_model
from irl_align.policy.ppo.actors import Actors
from irl_align.policy.ppo.checkpoint import Progress
from irl_align.policy.ppo.selection import Selection, reward_gap


def test_train_keeps_the_policy_nearest_the_demonstrations(
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
    assert nearest < 12, "training must go past the best"
    again = cast_of(tiny_tokenizer, PPOOptions.model_validate({**vars(chosen), "keep": "last"}))
    few = options(episodes=16 * 12, evaluate_every=100, kl_coef=0.0, checkpoint_every=nearest or 1)
    if nearest:
        train_until_stopped(tmp_path / "again", again, few, 1 + nearest)
        kept = load_model(tmp_path / "work/model")
        assert same_weights(kept, again.policy)


def test_train_keeps_the_start_if_it_is_best_by_log_prob(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = options(keep="log_prob", evaluate_every=1)
    # a reward that punishes what the demonstrations hold
    away = Scripted(lambda prompt, completion: -float(3 in completion) - float(EOS in completion))
    cast = cast_of(tiny_tokenizer, chosen, away)
    report = train(tmp_path / "work", cast, chosen)
    logps = [report["start"], *report["history"]]
    best = max(range(5), key=lambda i: logps[i]["held_out_log_prob"])
    assert report["kept_update"] == best == 0
    assert same_weights(load_model(tmp_path / "work/model"), small_llama(12))
    assert "no update was better than the start" in caplog.text


@pytest.mark.parametrize(
    ("demonstrated", "cut", "gap"),
    [
        # finished 1 and 3: mean 2, deviation 1; those without EOS are worth 0 at most
        (5.0, [], 5 - 8 / 4),
        (5.0, [3], 5 - (1 + 3 + 3 + 0) / 4),
        (0.0, [], -(8 / 4)),
        (1.5, [0, 3], -0.5 - (2 - (3 + 1) / 4)),
    ],
)
def test_reward_gap_by_hand(demonstrated: float, cut: list[int], gap: float) -> None:
    rewards = torch.tensor([1.0, 3.0, 1.0, 3.0])
    truncated = torch.tensor([i in cut for i in range(4)])
    if cut == [3]:  # finished 1, 3 and 1: mean 5/3, deviation sqrt(8)/3, worst 1
        worth = 1 - math.sqrt(8) / 3
        gap = demonstrated - (5 + worth) / 4
    assert reward_gap(demonstrated, rewards, truncated) == pytest.approx(gap)


def test_reward_gap_widens_with_every_sample_without_eos() -> None:
    """Also where the samples score above the demonstrations, and whatever those without EOS have:
    a policy that never stops would otherwise come nearer the demonstrations."""
    draw = torch.Generator().manual_seed(0)
    finished = 2.0 + torch.randn(50, generator=draw)
    for demonstrated in (-3.0, 2.0, 9.0):
        for worth in (-9.0, 0.0, 9.0):
            gaps = []
            for count in (0, 1, 10, 200):
                rewards = torch.cat([finished, torch.full((count,), worth)])
                truncated = torch.arange(50 + count) >= 50
                gaps.append(abs(reward_gap(demonstrated, rewards, truncated)))
            assert gaps == sorted(gaps) and len(set(gaps)) == 4


def test_evaluate_gives_the_kl_of_the_policy_under_top_p(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The policy is its reference, so the KL is 0; the renormalised log-probs of top-p gave 47."""
    chosen = options(keep="log_prob", temperature=0.7, episodes=16)
    cast = cast_of(tiny_tokenizer, chosen)
    cast = replace(cast, sampling=replace(cast.sampling, top_p=0.3, top_k=2))
    report = train(tmp_path / "work", cast, chosen)
    assert abs(report["start"]["held_out_kl"]) < 1e-5
    assert abs(report["history"][0]["kl"]) < 1e-5


def test_train_keeps_the_start_if_no_policy_can_be_judged(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """The start's own KL is above kl_stop on held-out prompts, and so is every later one's."""
    chosen = options(keep="log_prob", evaluate_every=1, missing_eos="ignore")
    cast = cast_of(tiny_tokenizer, chosen)
    evaluate = Selection.evaluate

    def far(self: Selection, progress: Progress) -> dict[str, float]:
        self.options = chosen.model_copy(update={"kl_stop": -1.0})
        return evaluate(self, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Selection, "evaluate", far)
        report = train(tmp_path / "work", cast, chosen)
    assert report["kept_update"] == 0 and report["best"] is None
    assert report["ended"] == "4 updates done"
    assert same_weights(load_model(tmp_path / "work/model"), small_llama(12))
    assert "log_prob could judge no policy" in caplog.text
    assert "the start is kept" in caplog.text


def test_train_keeps_the_start_if_no_held_out_sample_ends(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Evaluations draw 4 samples; none ends. Rollouts draw 16."""
    chosen = options(keep="reward_gap", evaluate_every=1, missing_eos="relative")
    cast = cast_of(tiny_tokenizer, chosen)
    eos = cast.generator.eos.copy()  # type: ignore[attr-defined]
    stream = cast.generator.stream

    def never_ending(prompts: Any, sampling: Any) -> Any:
        cast.generator.eos[:] = [10**6] if len(prompts) == 4 else eos  # type: ignore[attr-defined]
        return stream(prompts, sampling)

    cast.generator.stream = never_ending  # type: ignore[method-assign]
    report = train(tmp_path / "work", cast, chosen)
    assert report["start"]["held_out_truncated"] == 1.0 and "held_out_gap" not in report["start"]
    assert report["kept_update"] == 0 and report["best"] is None
    assert same_weights(load_model(tmp_path / "work/model"), small_llama(12))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_train_refuses_a_reward_that_is_not_finite(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, value: float
) -> None:
    chosen = options()
    with pytest.raises(UserError, match="finite"):
        train(tmp_path / "work", cast_of(tiny_tokenizer, chosen, broken_after(2, value)), chosen)


def test_train_ends_at_a_later_reward_that_is_not_finite(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = options(checkpoint_every=1)
    # Two passes are evaluations, then each update has one: that of the third update is broken, and
    # every one in the second attempt, which starts at the second checkpoint.
    rewards = iter([broken_after(4, math.nan), broken_after(0, math.nan)])
    report = train_through(
        tmp_path / "work", lambda: cast_of(tiny_tokenizer, chosen, next(rewards)), chosen
    )
    assert report["updates"] == 2 and report["kept_update"] == 1
    assert report["ended"].startswith("stopped at update 3: ") and "\n" not in report["ended"]
    assert report["ended"].endswith("the policy after update 1 is kept")
    assert report["ended"] in caplog.text

    one = cast_of(tiny_tokenizer, chosen, broken_after(99, math.nan))
    train_until_stopped(tmp_path / "one", one, chosen, 2)
    assert same_weights(load_model(tmp_path / "work/model"), one.policy)


def test_train_stops_before_an_update_with_an_exploding_kl(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    wild: dict[str, Any] = {"kl_stop": 0.5, "learning_rate": 0.5, "epoch_kl": None}
    chosen = options(checkpoint_every=1, episodes=16 * 10, **wild)
    with pytest.raises(UserError, match=r"update 2: KL to the reference is .* above kl_stop 0.5"):
        train_through(tmp_path / "none", lambda: cast_of(tiny_tokenizer, chosen), chosen)

    slow = options(
        checkpoint_every=1, episodes=16 * 20, kl_stop=1.0, kl_coef=0.0, lr_schedule="constant"
    )
    report = train_through(tmp_path / "work", lambda: cast_of(tiny_tokenizer, slow), slow)
    kls = [record["kl"] for record in report["history"]]
    assert 2 <= len(kls) < 20 and max(kls) <= 1.0
    assert report["kept_update"] == len(kls) - 1
    assert "above kl_stop 1" in report["ended"]


def test_train_refuses_weights_that_blow_up_before_a_checkpoint(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    chosen = options(
        learning_rate=1e30, epoch_kl=None, kl_stop=1e30, kl_alarm=1e30, evaluate_every=100
    )
    with pytest.raises(UserError) as caught:
        train_through(tmp_path / "work", lambda: cast_of(tiny_tokenizer, chosen), chosen)
    assert "there is no checkpoint of an earlier policy" in str(caught.value) and "\n" not in str(
        caught.value
    )


@pytest.mark.parametrize("keep", ["reward_gap", "log_prob"])
def test_train_keeps_the_start_at_an_explosion_before_any_checkpoint(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, keep: str
) -> None:
    """Only the first evaluation, at the start, has been reached."""
    wild: dict[str, Any] = {"kl_stop": 0.5, "learning_rate": 0.5, "epoch_kl": None}
    chosen = options(keep=keep, evaluate_every=100, **wild)
    report = train_through(tmp_path / "work", lambda: cast_of(tiny_tokenizer, chosen), chosen)
    assert report["updates"] == 1 and report["kept_update"] == 0
    assert report["ended"].startswith("stopped at update 2: KL to the reference is ")
    assert report["ended"].endswith("; the start is kept")
    assert [record["update"] for record in report["history"]] == [1]
    assert same_weights(load_model(tmp_path / "work/model"), small_llama(12))


def test_train_prefers_a_best_start_to_a_checkpoint(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """As at the end of a training that does not diverge; only `last` keeps a checkpoint."""
    slow: dict[str, Any] = {"kl_stop": 1.0, "kl_coef": 0.0, "lr_schedule": "constant"}
    many: dict[str, Any] = {"episodes": 16 * 20, "checkpoint_every": 1, "evaluate_every": 100}
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
    assert "no update was better than the start; the start is kept" in caplog.text


def test_train_refuses_a_first_update_that_blows_up(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The error names the fault, and no policy is kept."""
    wild: dict[str, Any] = {"learning_rate": 1e30, "epoch_kl": None, "kl_stop": 1e30}
    chosen = options(keep="reward_gap", **wild)
    with pytest.raises(UserError, match=r"PPO: update 1: .*; no update succeeded before it") as e:
        train_through(tmp_path / "work", lambda: cast_of(tiny_tokenizer, chosen), chosen)
    assert "\n" not in str(e.value) and not (tmp_path / "work/model").exists()


def without_eos_after(cast: Actors, draws: int) -> Actors:
    """Have the generator never end a sample after so many draws."""

    def act(number: int) -> None:
        if number > draws:
            cast.generator.eos[:] = [10**6]  # type: ignore[attr-defined]

    return before_each_draw(cast, act)


@pytest.mark.parametrize(("keep", "kept"), [("last", 1), ("log_prob", 0)])
def test_train_ends_at_a_later_rollout_without_eos(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, keep: str, kept: int
) -> None:
    """In the first rollout this is an error of the settings; later an earlier policy is kept."""
    chosen = options(missing_eos="replace", checkpoint_every=1, keep=keep, evaluate_every=100)
    # The evaluation and two rollouts; in the second attempt, from the second checkpoint, none.
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
    train_until_stopped(tmp_path / "one", one, chosen, 1 + kept)
    assert same_weights(load_model(tmp_path / "work/model"), one.policy)


def test_train_refuses_a_first_rollout_without_eos(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    chosen = options(missing_eos="replace")
    cast = actors(small_llama(12), REWARD, tiny_tokenizer, PROMPTS, chosen, max_new_tokens=1)
    cast.generator.eos[:] = [10**6]  # type: ignore[attr-defined]  # an EOS that never comes
    with pytest.raises(UserError, match="all 16 samples of a rollout are without EOS; raise"):
        train(tmp_path / "work", cast, chosen)
