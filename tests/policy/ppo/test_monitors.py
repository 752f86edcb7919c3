"""What PPO records of an update: all of its numbers are there, and mean what they say."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.ppo_tools import EOS, Scripted, actors, options, small_llama, train
from support.rows import random_ids, save
from transformers import PreTrainedTokenizerFast

from irl_align.config.policy_update import PPOOptions
from irl_align.reward.model import RewardModel
from irl_align.reward.settings import RewardSettings

PROMPTS = random_ids(16, 2, 5, 0, vocabulary=12)
REWARD = Scripted(lambda prompt, completion: completion.count(5) - 0.1 * len(completion))
ROLLOUT = {
    *("update", "episodes_done", "alarms", "padding", "kl_coef"),
    *("reward", "reward_std", "return", "kl", "kl_k3", "sampled_entropy"),
    *("length", "truncated", "eos_rate", "eos_credit"),
    *("sampler_log_ratio", "sampler_log_ratio_max"),
    *("seconds_generate", "seconds_score", "seconds_update"),
}
UPDATE = {
    *("learning_rate", "epochs", "policy_loss", "entropy", "grad_norm"),
    *("update_kl", "clip_fraction", "log_ratio", "first_log_ratio", "first_log_ratio_max"),
}
CRITIC = {"value", "value_loss", "critic_grad_norm", "explained_variance"}
HELD_OUT = {"held_out_gap", "held_out_log_prob", "held_out_kl"}


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
def test_a_record_has_all_of_its_numbers(
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


def test_numbers_of_a_rollout_are_those_of_its_samples(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Two updates whose samples are all kept, and what is written of each of their tokens."""
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
def test_the_mass_of_attention_is_told_where_it_is_a_share(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, credit: str, attention: set[str]
) -> None:
    """The weights of the policy's attention are means over other steps: they can sum to over 1."""
    folder = save(small_llama(12, layers=2), tiny_tokenizer, tmp_path / "sft")
    reward = RewardModel.from_policy(folder, tiny_tokenizer, RewardSettings(), seed=3)
    chosen = options(episodes=16, credit=credit)
    [record] = trained(tmp_path / "work", tiny_tokenizer, chosen, reward)["history"]
    assert {name for name in record if name.startswith("attention_")} == attention
    assert 0.0 < record.get("attention_mass", 0.5) < 1.0
    assert 0.0 <= record.get("attention_last", 0.0) <= 1.0
    assert 0.0 <= record.get("attention_entropy", 0.0) <= math.log(6)
