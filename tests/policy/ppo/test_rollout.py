"""PPO on rollouts of a sampler that is not the learner: the gap, its alarm, importance weights."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ppo_tools import EOS, PAD, Scripted, actors, options, small_llama, train
from transformers import PreTrainedTokenizerFast

from irl_align.config.policy_update import PPOOptions
from irl_align.models.generation.protocol import Completion, Generator, Sampling
from irl_align.policy.ppo.learner import Batch, Learner, make_accelerator
from irl_align.policy.ppo.network import Network
from irl_align.policy.ppo.rollout import collate, sample

CPU = torch.device("cpu")
PROMPTS = [[3, 4], [5], [6, 7, 8], [9, 10]]
SMALL: dict[str, Any] = {"advantage": "reinforce", "episodes": 32, "learning_rate": 1e-4}
REWARD = Scripted(lambda prompt, row: float(row[-1] == EOS) + 0.1 * len(row))


class Hot:
    """Samples at another temperature than it is asked for, and says so in its log-probs."""

    def __init__(self, inner: Generator, temperature: float) -> None:
        self.inner, self.temperature = inner, temperature

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        yield from self.inner.stream(prompts, replace(sampling, temperature=self.temperature))


def history(
    work: Path, tokenizer: PreTrainedTokenizerFast, temperature: float | None, chosen: PPOOptions
) -> list[dict[str, Any]]:
    """Of a training on samples of the policy at a temperature that the learner does not have."""
    model = small_llama(len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # distributions that a temperature changes
    cast = actors(model, REWARD, tokenizer, PROMPTS, chosen, max_new_tokens=12)
    if temperature is not None:
        cast = replace(cast, generator=Hot(cast.generator, temperature))
    return list(train(work, cast, chosen)["history"])


def test_a_sampler_that_is_not_the_learner_is_measured_and_told(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="irl_align"):
        records = history(tmp_path, tiny_tokenizer, 1.5, options(**SMALL))
    for record in records:
        assert 0.05 < record["sampler_log_ratio"] < record["sampler_log_ratio_max"]
        assert any(alarm.startswith("sampler and learner differ") for alarm in record["alarms"])
        assert record["first_log_ratio"] < 1e-4  # the update starts from the learner's own
        assert "importance_weight" not in record
    assert caplog.text.count("sampler and learner differ") == 1  # told when it begins


def test_the_same_engine_has_no_gap(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    for record in history(tmp_path, tiny_tokenizer, None, options(**SMALL)):
        assert 0 <= record["sampler_log_ratio"] == record["first_log_ratio"] < 1e-4
        assert record["alarms"] == []


def test_weights_have_a_mean_of_one_under_the_sampler_until_they_are_cut(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """E_q[pi / q] = 1 at every token."""
    big = {**SMALL, "batch_size": 128, "episodes": 128, "epochs": 1}
    found = {}
    for cap in (1e9, 1.1):
        chosen = options(importance_weights="truncated", importance_cap=cap, **big)
        [found[cap]] = history(tmp_path / str(cap), tiny_tokenizer, 1.5, chosen)
    assert found[1e9]["importance_weight"] == pytest.approx(1.0, abs=0.15)
    assert found[1e9]["importance_capped"] == 0
    assert 0.1 < found[1.1]["importance_capped"] < 0.9
    assert found[1.1]["importance_weight"] < 0.95


def test_weights_multiply_the_policy_gradient_token_by_token(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Against -mean(w A pi / pi_old), written with the model's own logits."""
    model = small_llama(len(tiny_tokenizer))
    chosen = options(advantage="reinforce")
    learner = Learner(Network(model, None, 1.0), chosen, CPU, 0, PAD, make_accelerator(CPU, False))
    cast = actors(model, REWARD, tiny_tokenizer, PROMPTS, chosen)
    samples = collate(PROMPTS, sample(cast.generator, PROMPTS, cast.sampling))
    shape = samples.mask.shape
    advantages, weights = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    weights = weights.abs()
    batch = Batch(samples, samples.logps, advantages, None, 0.0, None, None, weights)
    micro = learner.micro(samples)
    learner._accumulate(learner.whole(micro), learner._on_device(batch), 0.0, 0)
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.zero_grad()
    loss = torch.zeros(())
    for i, (prompt, row) in enumerate(zip(samples.prompts, samples.completions, strict=True)):
        logits = model(input_ids=torch.tensor([[*prompt, *row]])).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1)[range(len(row)), row]
        ratio = (logps - samples.logps[i, : len(row)]).exp()
        loss = loss - (weights[i, : len(row)] * advantages[i, : len(row)] * ratio).sum()
    (loss / samples.mask.sum()).backward()
    want = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-4)


def test_a_cap_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="importance_cap is an option of importance_weights trunc"):
        options(importance_cap=3.0)
