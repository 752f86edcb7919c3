"""PPO's learner: ratio 1 at its first step, bf16, the early stop on KL, and learning rates."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ppo_tools import PAD, Scripted, actors, options, small_llama, train, training
from support.rows import random_ids, same_weights
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from irl_align.config.policy_update import PPOOptions
from irl_align.errors import UserError
from irl_align.models.generation.protocol import Completion, Generator, Sampling
from irl_align.models.lm_head import lm_head_logits
from irl_align.policy.ppo.critic import make_critic
from irl_align.policy.ppo.learner import Batch, Learner, LogProbGap, make_accelerator
from irl_align.policy.ppo.network import Network, states, tokens_of
from irl_align.policy.ppo.rollout import RolloutBatch, collate
from irl_align.policy.ppo.trainer import PPOTrainer
from irl_align.utils import hardware

MakeModel = Callable[[str], PreTrainedModel]
CPU = torch.device("cpu")
PROMPTS = random_ids(16, 2, 5, 0, vocabulary=12)
REWARD = Scripted(lambda prompt, completion: completion.count(5) - 0.1 * len(completion))


def learner_of(model: PreTrainedModel, chosen: PPOOptions, bf16: bool = False) -> Learner:
    """Without a critic, unless the advantage is gae: then with one that starts at 0."""
    critic = make_critic(chosen, model, REWARD, None)  # type: ignore[arg-type]
    accelerator = make_accelerator(CPU, bf16)
    return Learner(Network(model, critic, 1.0), chosen, CPU, 0, PAD, accelerator)


def samples_of(count: int, length: int, vocabulary: int = 12) -> RolloutBatch:
    """Random samples, each of `length` tokens."""
    prompts = random_ids(count, 2, 5, 1, vocabulary=vocabulary)
    rows = random_ids(count, length, length, 2, vocabulary=vocabulary)
    zeros = torch.zeros(length).numpy()
    return collate(prompts, [Completion(row, zeros, True) for row in rows])


def own_batch(learner: Learner, samples: RolloutBatch) -> Batch:
    """A rollout with the learner's own log-probs and values, and advantages of 1 and -1."""
    micro = learner.micro(samples)
    logps, values = learner.infer(micro, learner.whole(micro), True, learner.trunks[1:] != [])
    assert logps is not None
    sign = 1.0 - 2.0 * (torch.arange(len(samples.mask)) % 2)
    advantages = sign[:, None] * samples.mask
    targets = None if values is None else advantages.clone()
    return Batch(samples, logps, advantages, None, 0.0, values, targets)


def update(learner: Learner, batch: Batch, number: int = 0) -> dict[str, float]:
    micro = learner.micro(batch.samples)
    return learner.update(number, batch, micro, learner.whole(micro))


def steps_of(learner: Learner) -> set[int]:
    """Optimiser steps that each weight has had."""
    return {int(state["step"]) for state in learner.optimizer.state.values()}


# --- ratio 1 --------------------------------------------------------------------------------------


def test_apart_beyond_rounding_by_hand() -> None:
    assert LogProbGap(0.9e-3, 0.049).beyond_rounding(bf16=False) is None
    told = LogProbGap(2e-3, 0.1).beyond_rounding(bf16=False)
    assert told == "by 0.002 per token, expected at most 0.001"
    told = LogProbGap(0.9e-3, 0.9).beyond_rounding(bf16=False)
    assert told == "by 0.9 at a token, expected at most 0.05"
    assert LogProbGap(0.049, 0.9).beyond_rounding(bf16=True) is None
    assert LogProbGap(0.049, 1.5).beyond_rounding(bf16=True) is not None
    assert LogProbGap(0.06, 0.9).beyond_rounding(bf16=True) is not None


@pytest.mark.parametrize("bf16", [False, True])
def test_one_wrong_token_of_a_rollout_is_caught(bf16: bool) -> None:
    """Of 1,536 tokens one has ratio 2.46, or 1 / 4.5 under bf16: the mean is below its limit."""
    off = -1.5 if bf16 else math.log(2.46)
    chosen = options(advantage="reinforce", bf16=True, epochs=1)  # asked, and not what computes
    learner = learner_of(small_llama(12), chosen, bf16)
    batch = own_batch(learner, samples_of(256, 6))
    before = small_llama(12)
    wrong = batch.old_logps.clone()
    wrong[200, 3] -= off
    mean = abs(off) / wrong.numel()
    assert mean < (5e-2 if bf16 else 1e-3)
    told = rf"before its first step .* by {abs(off):.2g} at a token, expected at most"
    with pytest.raises(UserError, match=told) as caught:
        update(learner, replace(batch, old_logps=wrong))
    assert "\n" not in str(caught.value)
    assert same_weights(learner.network.policy, before)  # before any step
    learner.optimizer.zero_grad()
    report = update(learner, batch)
    assert report["first_log_ratio"] <= report["first_log_ratio_max"] < (0.1 if bf16 else 1e-5)


def test_the_largest_is_of_all_micro_batches() -> None:
    """One row each, the wrong one neither the first nor the last."""
    chosen = options(advantage="reinforce", epochs=1, max_batch_tokens=1)
    learner = learner_of(small_llama(12), chosen)
    batch = own_batch(learner, samples_of(8, 4))
    batch.old_logps[3, 2] += 1e-3  # within what is let through
    report = update(learner, batch)
    assert report["first_log_ratio_max"] == pytest.approx(1e-3, rel=1e-2)
    assert report["first_log_ratio"] == pytest.approx(1e-3 / 32, rel=1e-2)


class Wrong:
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
    ("at_reference", "told"),
    [
        (True, "PPO: the policy and its reference are the same model, but their log-probs differ"),
        (False, "PPO: update 1: before its first step the policy's log-probs differ from those it"),
    ],
)
def test_a_sampler_that_is_wrong_in_one_token_is_refused(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    at_reference: bool,
    told: str,
) -> None:
    monkeypatch.setattr("irl_align.policy.ppo.trainer.TransformersGenerator", Wrong)
    chosen = options(batch_size=512, episodes=512, advantage="reinforce")
    prompts = random_ids(512, 2, 5, 0, vocabulary=12)
    cast = actors(small_llama(12), REWARD, tiny_tokenizer, prompts, chosen)
    cast = replace(cast, generator=Wrong(cast.generator), starts_at_reference=at_reference)
    with pytest.raises(UserError, match=r"by 0\.9 at a token, expected at most 0\.05") as caught:
        train(tmp_path / "work", cast, chosen)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize("has", [False, True])
def test_bf16_that_a_cpu_has_not_costs_no_pass_of_its_own(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    has: bool,
) -> None:
    """Where float32 takes its place the sampler's log-probs are the learner's."""
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: has)
    chosen = options(bf16=True, advantage="reinforce")
    learner = learner_of(small_llama(12), chosen, hardware.in_bf16(chosen.bf16, on_cpu=True))
    cast = actors(small_llama(12), REWARD, tiny_tokenizer, PROMPTS, chosen)
    trainer = PPOTrainer(cast, learner, chosen, training(tmp_path / "work"))
    assert learner.bf16 is has and trainer.own_logps is not has


# --- bf16 -----------------------------------------------------------------------------------------


def test_bf16_has_log_probs_in_float32(tiny_model: MakeModel) -> None:
    """Autocast on any CPU, emulated where it must be: near float32, and not float32."""
    samples = samples_of(6, 7, vocabulary=320)
    chosen, found = options(epochs=1), {}
    for bf16 in (False, True):
        learner = learner_of(tiny_model("llama"), chosen, bf16)
        assert learner.bf16 is bf16
        found[bf16] = own_batch(learner, samples)
    exact, rounded = found[False].old_logps, found[True].old_logps
    assert rounded.dtype == torch.float32
    assert 1e-5 < float((rounded - exact).abs().max()) < 5e-2
    assert not torch.equal(rounded, rounded.bfloat16().float())
    values = found[True].old_values
    assert values is not None and values.dtype == torch.float32


def test_log_softmax_of_bf16_logits_is_float32s(tiny_model: MakeModel) -> None:
    """Against float64 on the logits that autocast computes: the temperature rounds nothing more."""
    model = tiny_model("llama")
    learner = learner_of(model, options(advantage="reinforce"), bf16=True)
    [batch] = learner.whole(learner.micro(samples_of(6, 7, vocabulary=320)))
    with torch.no_grad(), learner.accelerator.autocast():
        got = tokens_of(model, batch, 0.7, "monitor")
        logits = lm_head_logits(model.get_output_embeddings(), states(model.base_model, batch))
    assert logits.dtype == torch.bfloat16
    assert got.logps is not None and got.logps.dtype == torch.float32
    table = (logits.double() / 0.7).log_softmax(-1)
    want = table.gather(1, batch.targets[:, None])[:, 0]
    assert torch.allclose(got.logps.double(), want, atol=1e-5, rtol=0)
    assert got.entropy is not None and got.entropy.dtype == torch.float32
    assert torch.allclose(got.entropy.double(), -(table.exp() * table).sum(1), atol=1e-4, rtol=0)


def test_an_update_in_bf16_moves_weights_of_float32(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    learner = learner_of(model, options(epochs=2, learning_rate=1e-3), bf16=True)
    report = update(learner, own_batch(learner, samples_of(6, 7, vocabulary=320)))
    assert all(math.isfinite(value) for value in report.values())
    assert {weight.dtype for weight in learner.network.parameters()} == {torch.float32}
    assert not same_weights(model, tiny_model("llama"))


# --- the early stop on KL -------------------------------------------------------------------------


def test_epochs_end_where_the_updates_kl_passes_its_limit(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Eight epochs of two minibatches, of which a step ends half of one."""
    found: dict[float | None, list[dict[str, Any]]] = {}
    for limit in (None, 0.05, 1e-4):
        chosen = options(epochs=8, minibatches=2, epoch_kl=limit, episodes=32)
        cast = actors(small_llama(12), REWARD, tiny_tokenizer, PROMPTS, chosen)
        found[limit] = train(tmp_path / str(limit), cast, chosen)["history"]
    assert [record["epochs"] for record in found[None]] == [8.0, 8.0]
    assert [record["epochs"] for record in found[1e-4]] == [0.5, 0.5]
    for record in found[0.05]:
        assert 0.5 < record["epochs"] < 8.0 and record["epochs"] % 0.5 == 0.0
    for limit in (0.05, 1e-4):
        assert all(record["update_kl"] > limit for record in found[limit])
    # One and the same first rollout, so that more steps have taken the policy further.
    assert found[None][0]["update_kl"] > found[1e-4][0]["update_kl"]


@pytest.mark.parametrize(("limit", "epochs", "steps"), [(1e-4, 0.5, 1), (None, 8.0, 16)])
def test_the_minibatch_that_passes_the_limit_has_no_step(
    limit: float | None, epochs: float, steps: int
) -> None:
    chosen = options(
        epochs=8, minibatches=2, epoch_kl=limit, advantage="reinforce", learning_rate=1e-2
    )
    learner = learner_of(small_llama(12), chosen)
    report = update(learner, own_batch(learner, samples_of(16, 5)))
    assert report["epochs"] == epochs and steps_of(learner) == {steps}
    assert all(weight.grad is None for weight in learner.network.parameters())


# --- learning rates -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "factors"), [("linear", [1.0, 0.75, 0.5, 0.25]), ("constant", [1.0] * 4)]
)
def test_learning_rates_of_four_updates(schedule: str, factors: list[float]) -> None:
    chosen = options(lr_schedule=schedule, learning_rate=1e-3, critic_learning_rate=4e-3)
    assert chosen.updates == 4
    learner = learner_of(small_llama(12), chosen)
    batch = own_batch(learner, samples_of(4, 3))
    for number, factor in enumerate(factors):
        fresh = own_batch(learner, batch.samples)
        report = update(learner, fresh, number)
        assert report["learning_rate"] == pytest.approx(1e-3 * factor)
        rates = [group["lr"] for group in learner.optimizer.param_groups]
        assert rates == pytest.approx([1e-3 * factor, 4e-3 * factor])


def test_a_critics_learning_rate_is_the_critics_alone(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The critic starts at 0, so that the first update of the policy is the same."""
    values, rewards = {}, {}
    for rate in (None, 1e-9):
        chosen = options(episodes=32, critic_learning_rate=rate)
        cast = actors(small_llama(12), REWARD, tiny_tokenizer, PROMPTS, chosen)
        history = train(tmp_path / str(rate), cast, chosen)["history"]
        assert history[0]["value"] == 0.0
        values[rate], rewards[rate] = history[1]["value"], history[1]["reward"]
    assert rewards[None] == rewards[1e-9]
    assert abs(values[1e-9]) < 1e-6 < 1e-3 < abs(values[None])
