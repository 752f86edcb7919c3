"""The record of an update: it has all numbers, they are correct, and alarms are raised."""

import json
import math
from collections.abc import Callable
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
    learner_of,
    options,
    pack,
    reward_model,
    samples_of,
    small_llama,
    train,
)
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from irl_align.config.policy_update import PPOOptions
from irl_align.policy.ppo.monitors import find_alarms, rollout_report
from irl_align.policy.ppo.rollout import Rollout, RolloutBatch, score

ROLLOUT = {
    *("update", "episodes_done", "alarms", "padding", "kl_coef"),
    *("reward", "reward_std", "return", "kl", "kl_k3", "sampled_entropy"),
    *("length", "truncated", "eos_rate", "eos_credit", "return_finished", "return_truncated"),
    *("sampler_log_ratio", "sampler_log_ratio_max"),
    *("seconds_generate", "seconds_score", "seconds_update"),
}
UPDATE = {
    *("learning_rate", "epochs", "policy_loss", "entropy", "grad_norm"),
    *("update_kl", "clip_fraction", "log_ratio", "first_log_ratio", "first_log_ratio_max"),
}
CRITIC = {"value", "value_loss", "critic_grad_norm", "explained_variance"}
HELD_OUT = {"held_out_gap", "held_out_log_prob", "held_out_kl", "held_out_truncated"}


def trained(
    work: Path, tokenizer: PreTrainedTokenizerFast, chosen: PPOOptions, reward: Any = REWARD
) -> dict[str, Any]:
    policy = small_llama(12, layers=2)
    return train(work, actors(policy, reward, tokenizer, PROMPTS, chosen), chosen)


@pytest.mark.parametrize(
    ("way", "more"),
    [
        ({}, CRITIC),
        ({"critic": "shared"}, CRITIC - {"critic_grad_norm"}),
        ({"advantage": "reinforce"}, set()),
        ({"kl": "loss", "entropy_coef": 0.01}, CRITIC),
    ],
    ids=["gae", "shared", "reinforce", "kl-in-loss"],
)
def test_train_records_all_numbers(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    way: dict[str, Any],
    more: set[str],
) -> None:
    chosen = options(episodes=32, evaluate_every=2, **way)
    first, second = trained(tmp_path / "work", tiny_tokenizer, chosen)["history"]
    expected = ROLLOUT | UPDATE | more
    assert set(first) == expected
    assert set(second) == expected | HELD_OUT
    for record in (first, second):
        numbers = [value for value in record.values() if not isinstance(value, list)]
        assert all(math.isfinite(value) for value in numbers)


def test_rollout_report_agrees_with_the_samples(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Two updates with all samples recorded: their numbers agree with the tokens' records."""
    chosen = options(episodes=32, samples_kept=16, missing_eos="subtract")
    history = trained(tmp_path / "work", tiny_tokenizer, chosen)["history"]
    lines = (tmp_path / "work/samples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for record in history:
        mine = [row for row in rows if row["update"] == record["update"]]
        assert len(mine) == 16

        def mean(values: list[float], count: int = 16) -> float:
            return sum(values) / count

        cut = [float(EOS not in row["token_ids"]) for row in mine]
        assert 0 < sum(cut) < 16
        assert record["truncated"] == pytest.approx(mean(cut))
        assert record["eos_rate"] == pytest.approx(1 - mean(cut))
        assert record["length"] == pytest.approx(mean([len(row["token_ids"]) for row in mine]))
        by_hand = [row["token_ids"].count(5) - 0.1 * len(row["token_ids"]) for row in mine]
        assert record["reward"] == pytest.approx(mean(by_hand), abs=1e-6)
        lost = [r - c for r, c in zip(by_hand, cut, strict=True)]  # 1 without EOS
        assert record["return"] == pytest.approx(mean(lost), abs=1e-6)
        assert record["kl"] == pytest.approx(mean([sum(row["kl"]) for row in mine]), abs=1e-4)
        k3 = [math.exp(-x) - 1 + x for row in mine for x in row["kl"]]
        assert record["kl_k3"] == pytest.approx(mean(k3), abs=1e-4)
        ended = [row for row, c in zip(mine, cut, strict=True) if not c]
        paid = [row["credit"][-1] for row in ended]
        assert record["eos_credit"] == pytest.approx(mean(paid, len(ended)), abs=1e-5)
        assert 0.0 <= record["clip_fraction"] <= 1.0 and record["update_kl"] >= 0.0
        assert 0.0 < record["entropy"] <= math.log(12) + 1e-6
        assert record["grad_norm"] > 0.0 and record["critic_grad_norm"] > 0.0
    first, second = history
    assert abs(first["kl"]) < 1e-5 and second["kl"] > 1e-3
    # A critic that is 0 everywhere explains nothing; one that has been trained is no constant.
    assert first["explained_variance"] == first["value"] == 0.0
    assert second["explained_variance"] != 0.0 and second["explained_variance"] <= 1.0


@pytest.mark.parametrize(
    ("credit", "attention"),
    [
        ("sparse", set()),
        ("abc", {"attention_mass", "attention_entropy", "attention_last"}),
        ("abc_policy", {"attention_entropy", "attention_last"}),
    ],
)
def test_rollout_report_has_the_attention_mass_if_it_is_a_share(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, credit: str, attention: set[str]
) -> None:
    """The weights of the policy's attention are means over other steps: they can sum to over 1."""
    reward = reward_model(tmp_path / "sft", tiny_tokenizer, small_llama(12, layers=2))
    chosen = options(episodes=16, credit=credit)
    [record] = trained(tmp_path / "work", tiny_tokenizer, chosen, reward)["history"]
    assert {name for name in record if name.startswith("attention_")} == attention
    assert 0.0 < record.get("attention_mass", 0.5) < 1.0
    assert 0.0 <= record.get("attention_last", 0.0) <= 1.0
    assert 0.0 <= record.get("attention_entropy", 0.0) <= math.log(6)


def eos_credit(
    samples: RolloutBatch, reward: Any, model: PreTrainedModel, chosen: PPOOptions
) -> float | None:
    """The report's credit of EOS for samples."""
    scores = score(samples, reward, model, chosen, torch.Generator())
    zeros = torch.zeros_like(samples.logps)
    packed = pack(learner_of(model, chosen), samples)
    rollout = Rollout(samples, scores, packed, zeros, zeros, None, None)
    return rollout_report(rollout).get("eos_credit")


def test_rollout_report_has_the_credit_of_eos_of_samples_that_end() -> None:
    """The reward is 10 with EOS and 0 without, so red pays EOS."""
    ended, cut = ([3], [4, 5, EOS], False), ([3], [4, 5], True)
    reward = Scripted(lambda prompt, completion: 10.0 * (completion[-1:] == [EOS]))
    chosen = options(credit="red", missing_eos="ignore")
    assert eos_credit(samples_of(ended, cut), reward, small_llama(12), chosen) == 10.0
    assert eos_credit(samples_of(cut), reward, small_llama(12), chosen) is None


def test_red_gives_eos_no_credit_if_prefixes_have_eos_too(
    tmp_path: Path,
    tiny_model: Callable[[str], PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    reward = reward_model(tmp_path / "sft", tiny_tokenizer, tiny_model("llama"))
    samples = samples_of(([3], [4, 5, EOS], False), ([3, 6], [4, EOS], False))
    for eos_prefixes in (True, False):
        chosen = options(credit="red", eos_prefixes=eos_prefixes)
        credit = eos_credit(samples, reward, tiny_model("llama"), chosen)
        assert credit is not None and (abs(credit) < 1e-5) is eos_prefixes


def records(lengths: list[float], rewards: list[float], kl: float = 0.1) -> list[dict[str, Any]]:
    return [
        {"length": length, "reward": reward, "reward_std": 1.0, "kl": kl, "sampler_log_ratio": 1e-6}
        for length, reward in zip(lengths, rewards, strict=True)
    ]


def test_find_alarms() -> None:
    chosen = options(kl_target=1.0, kl_alarm=5.0)
    quiet = records([10.0] * 10, [0.0] * 10)
    assert find_alarms(quiet, chosen) == []
    rising = records([10.0] * 5 + [12.0] * 5, [0.0] * 5 + [1.0] * 5)
    assert find_alarms(rising, chosen) == [
        "length and reward rise together over 10 updates: 10.0 to 12.0 tokens, 0 to 1"
    ]
    assert find_alarms(rising[1:], chosen) == []  # too few to tell
    assert find_alarms(records([10.0] * 5 + [12.0] * 5, [0.0] * 10), chosen) == []
    far = find_alarms(records([10.0], [0.0], kl=6.0), chosen)
    assert far == [
        "KL to the reference is 6.00 nats, more than twice its target 1",
        "KL to the reference is 6.00 nats, above kl_alarm 5",
    ]
    (gap,) = find_alarms([{**quiet[0], "sampler_log_ratio": 0.3}], chosen)
    assert gap.startswith("sampler and learner differ by 0.3 in a token's log-prob, above")
    assert find_alarms([{**quiet[0], "sampler_log_ratio": 0.3}], options(sampler_gap_alarm=1)) == []
    ending = [{**quiet[0], "eos_credit": -1.1}]
    (paid,) = find_alarms(ending, options(credit="red"))
    assert paid.startswith(
        "red gives EOS a mean credit of -1.10, while rewards have a standard dev"
    )
    assert find_alarms([{**quiet[0], "eos_credit": 0.9}], options(credit="red")) == []
    assert find_alarms(ending, chosen) == []  # sparse: all of R is there
    unstopped = {**quiet[0], "return_finished": -1.2, "return_truncated": -1.0}
    assert find_alarms([unstopped], chosen) == [
        "samples without EOS have a mean return of -1, finished ones -1.2: PPO pays for never "
        "stopping; see missing_eos"
    ]
    assert find_alarms([{**unstopped, "return_truncated": -1.3}], chosen) == []
    for way in ({"beta_c": 0.0}, {"eos_prefixes": True}):  # as sparse, or fixed already
        assert find_alarms(ending, options(credit="red", **way)) == []
    (broken,) = find_alarms([{**quiet[0], "entropy": math.nan}], chosen)
    assert broken == "entropy is not finite"
