"""PPO as a whole: it learns, dense credit at 0 is sparse, and every option runs."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.ppo_tools import (
    REWARD,
    Scripted,
    actors,
    cast_of,
    learner_of,
    options,
    reward_model,
    small_llama,
    train,
    training,
)
from support.rows import random_ids, same_weights
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from irl_align.errors import UserError
from irl_align.models.generation.protocol import Completion, Generator, Sampling
from irl_align.models.loading import load_model
from irl_align.policy.ppo.trainer import PPOTrainer
from irl_align.utils import hardware

MakeModel = Callable[[str], PreTrainedModel]


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo", "reinforce"])
def test_trainer_solves_a_bandit(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, advantage: str
) -> None:
    """One token; the arm that pays depends on the prompt. Optimum 1, at random 1/12."""
    groups = advantage in ("rloo", "grpo")
    chosen = options(
        batch_size=64,
        episodes=64 * 20,
        epochs=4,
        kl_coef=0.0,
        advantage=advantage,
        n=4 if groups else 1,
        kl="loss" if advantage == "grpo" else "reward",
        evaluate_every=100,
    )
    reward = Scripted(lambda prompt, completion: float(completion[0] == 3 + prompt[0] % 5))
    cast = actors(
        small_llama(12),
        reward,
        tiny_tokenizer,
        [[i] for i in range(3, 8)],
        chosen,
        max_new_tokens=1,
    )
    report = train(tmp_path / "work", cast, chosen)
    assert report["history"][0]["reward"] < 0.3
    last = [record["reward"] for record in report["history"][-4:]]
    assert sum(last) / 4 > 0.95


@pytest.mark.parametrize("missing_eos", ["replace", "relative"])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_trainer_unlearns_to_stop_only_if_never_stopping_pays(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, missing_eos: str, scale: float
) -> None:
    """All samples score between -3 and -2.6, or a hundredth of it: with -1 for those without EOS
    their share goes from 34 to 97%, and an alarm says so at once."""
    chosen = options(
        **{"batch_size": 64, "episodes": 64 * 10, "kl_coef": 0.0, "evaluate_every": 100},
        **{"advantage": "rloo", "n": 4},
        missing_eos=missing_eos,
        missing_eos_value=-scale if missing_eos == "replace" else None,
    )
    reward = Scripted(lambda prompt, row: scale * (0.2 * min(row.count(5), 2) - 3.0))
    cast = cast_of(tiny_tokenizer, chosen, reward)
    cast = replace(cast, sampling=replace(cast.sampling, max_new_tokens=12))
    history = train(tmp_path / "work", cast, chosen)["history"]
    named = [any("without EOS" in alarm for alarm in record["alarms"]) for record in history]
    before, after = history[0]["truncated"], history[-1]["truncated"]
    if missing_eos == "replace":
        assert after > 0.9 and all(named)
    else:
        assert after < 0.5 * before and not any(named)


@pytest.mark.parametrize("credit", ["sparse", "red"])
def test_trainer_solves_a_copy_task(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, credit: str
) -> None:
    """Four steps: repeat the prompt's four tokens of two kinds. Optimum 1, the share right."""
    prompts = [list(prompt) for prompt in itertools.product((3, 4), repeat=4)]
    chosen = options(
        batch_size=64,
        episodes=64 * 25,
        epochs=4,
        kl_coef=0.0,
        entropy_coef=0.01,
        credit=credit,
        evaluate_every=100,
        samples_kept=0,
    )

    def right(prompt: list[int], completion: list[int]) -> float:
        return sum(a == b for a, b in zip(prompt, completion, strict=False)) / 4

    cast = actors(
        small_llama(8, layers=2), Scripted(right), tiny_tokenizer, prompts, chosen, max_new_tokens=4
    )
    history = train(tmp_path / "work", cast, chosen)["history"]
    assert history[0]["reward"] < 0.25
    last = [record["reward"] for record in history[-5:]]
    assert sum(last) / 5 > 0.95


def test_trainer_gives_bit_identical_weights_for_dense_credit_of_0(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = small_llama(12, layers=2)
    reward = reward_model(tmp_path / "sft", tiny_tokenizer, model)
    prompts = random_ids(8, 2, 5, 0, vocabulary=12)
    ways: list[dict[str, Any]] = [
        {"credit": "sparse"},
        {"credit": "red", "beta_c": 0.0},
        {"credit": "abc", "beta": 0.0},
        {"credit": "abc_policy", "beta": 0.0},
        {"credit": "random", "beta": 0.0},
    ]
    ended = []
    for number, way in enumerate(ways):
        chosen = options(episodes=32, missing_eos="subtract", minibatches=2, **way)
        cast = actors(model, reward, tiny_tokenizer, prompts, chosen)
        report = train(tmp_path / str(number), cast, chosen)
        ended.append((cast.policy, [record["kl"] for record in report["history"]]))
    for policy, kl in ended[1:]:
        assert same_weights(policy, ended[0][0]) and kl == ended[0][1]
    assert not same_weights(ended[0][0], model)
    moved = options(episodes=32, missing_eos="subtract", minibatches=2, credit="red")
    cast = actors(model, reward, tiny_tokenizer, prompts, moved)
    train(tmp_path / "red", cast, moved)
    assert not same_weights(cast.policy, ended[0][0])


def test_trainer_leaves_the_reward_unchanged(
    tmp_path: Path, tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    reward = reward_model(tmp_path / "sft", tiny_tokenizer, tiny_model("llama"))
    before = copy.deepcopy(reward.model)
    chosen = options(credit="abc", critic_init="reward", episodes=32)
    cast = actors(tiny_model("llama"), reward, tiny_tokenizer, random_ids(8, 2, 5, 0), chosen)
    history = train(tmp_path / "work", cast, chosen)["history"]
    assert same_weights(reward.model, before)
    assert all(weight.grad is None for weight in reward.model.parameters())
    assert 0 < history[0]["attention_mass"] < 1
    assert history[0]["attention_entropy"] > 0


@pytest.mark.parametrize(
    "way",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"critic": "shared", "minibatches": 3},
        {"temperature": 0.7, "kl_target": 2.0, "kl_horizon": 100},
        {"advantage": "rloo", "n": 4, "whiten_rewards": True, "clip_token_rewards": 1.0},
        {"advantage": "grpo", "n": 4, "kl": "loss", "whiten_advantages": "scale_only"},
        {"credit": "red", "eos_prefixes": True, "gamma": 0.9, "dynamic_initialisation": False},
        {"advantage": "reinforce", "credit": "uniform", "lr_schedule": "constant"},
        {"credit": "abc", "center_rewards": True},
    ],
    ids=str,
)
def test_trainer_starts_at_ratio_1_and_kl_0_with_every_option(
    tmp_path: Path,
    tiny_model: MakeModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    way: dict[str, Any],
) -> None:
    model = tiny_model("llama")
    reward = reward_model(tmp_path / "sft", tiny_tokenizer, model)
    chosen = options(episodes=48, **way)
    cast = actors(model, reward, tiny_tokenizer, random_ids(8, 2, 5, 0), chosen)
    report = train(tmp_path / "work", cast, chosen)
    first, last = report["history"][0], report["history"][-1]
    exact = 5e-2 if hardware.in_bf16(chosen.bf16, on_cpu=True) else 1e-4
    assert first["first_log_ratio"] < exact and abs(first["kl"]) < 6 * exact
    assert all(math.isfinite(v) for v in last.values() if isinstance(v, float))
    assert report["updates"] == 3 and last["episodes_done"] == 48
    assert not same_weights(cast.policy, model)
    assert same_weights(load_model(tmp_path / "work/model"), cast.policy)
    changes = [record["kl_coef"] for record in report["history"]]
    assert (len(set(changes)) > 1) == (chosen.kl_target is not None)


def test_train_refuses_a_pad_token_equal_to_eos(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    chosen = options()
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
    with pytest.raises(UserError, match="pad token is 2 and its EOS 2"):
        train(tmp_path / "work", cast_of(tiny_tokenizer, chosen), chosen)


def test_trainer_refuses_a_sampler_of_another_model(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The sampler's log-probs are of another model than the learner's."""
    chosen = options()
    cast = cast_of(tiny_tokenizer, chosen)
    cast.generator.model = small_llama(12, seed=9)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="are the same model, but their log-probs differ"):
        train(tmp_path / "work", cast, chosen)


@pytest.mark.parametrize("has", [False, True])
def test_trainer_uses_the_samplers_log_probs_if_the_cpu_lacks_bf16(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    has: bool,
) -> None:
    """A CPU without bf16 computes in float32, where both log-probs are the same."""
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: has)
    chosen = options(bf16=True, advantage="reinforce")
    learner = learner_of(small_llama(12), chosen, bf16=hardware.in_bf16(chosen.bf16, on_cpu=True))
    cast = cast_of(tiny_tokenizer, chosen)
    trainer = PPOTrainer(cast, learner, chosen, training(tmp_path / "work"))
    assert learner.bf16 is has and trainer.own_logps is not has


class WrongSampler:
    """A sampler that gives one token of each rollout another log-prob than it had."""

    def __init__(self, inner: Generator) -> None:
        self.inner = inner

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        for number, group in self.inner.stream(prompts, sampling):
            if number == 0:
                logps = group[0].logprobs.copy()
                logps[0] -= math.log(2.46)
                group = [replace(group[0], logprobs=logps), *group[1:]]
            yield number, group


@pytest.mark.parametrize(
    ("at_reference", "message"),
    [
        (True, "PPO: the policy and its reference are the same model, but their log-probs differ"),
        (False, "PPO: update 1: before its first step the policy's log-probs differ from those it"),
    ],
)
def test_trainer_refuses_a_sampler_that_is_wrong_in_one_token(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    at_reference: bool,
    message: str,
) -> None:
    monkeypatch.setattr("irl_align.policy.ppo.trainer.TransformersGenerator", WrongSampler)
    chosen = options(batch_size=512, episodes=512, advantage="reinforce")
    prompts = random_ids(512, 2, 5, 0, vocabulary=12)
    cast = actors(small_llama(12), REWARD, tiny_tokenizer, prompts, chosen)
    cast = replace(cast, generator=WrongSampler(cast.generator), starts_at_reference=at_reference)
    with pytest.raises(UserError, match=r"by 0\.9 at a token, expected at most 0\.05") as caught:
        train(tmp_path / "work", cast, chosen)
    assert str(caught.value).startswith(message)
