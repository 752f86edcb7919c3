"""Vital signs compared with numbers computed by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.ppo_tools import small_llama

from irl_align.models.generation.protocol import Completion, Sampling, generate
from irl_align.models.generation.samples import SampleSet
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.models.lm_head import completion_logprobs
from irl_align.policy import Policy
from irl_align.training.diagnostics import (
    kl_report,
    length_correlation,
    of_all_tokens,
    temperature_of_entropy,
    vital_signs,
    vitals,
)
from irl_align.training.sampler import PromptSamples


def completion(logprobs: list[float], cut: bool = False) -> Completion:
    values = np.array(logprobs, np.float32)
    return Completion(list(range(5, 5 + len(values))), values, truncated=cut)


SAMPLES = SampleSet(
    [[1], [2]],
    [
        [completion([-1.0, -2.0]), completion([-0.5])],
        [completion([-1.0, -1.0, -1.0], cut=True), completion([-2.0, -0.5])],
    ],
)


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_vitals_by_hand() -> None:
    # Sums under pi: -3, -0.5, -3, -2.5. Under pi_0: -4, -1.5, -3, -2.5. Ratios 1, 1, 0, 0.
    initial = [array(-2, -2), array(-1.5), array(-1, -1, -1), array(-1.5, -1)]
    _, completions = SAMPLES.flat()
    assert vitals(completions) == pytest.approx(
        {
            "samples": 4,
            "length": 8 / 4,
            "truncated": 0.25,
            "entropy": 9 / 8,  # 3 + 0.5 + 3 + 2.5 over eight tokens
        }
    )
    assert kl_report([c.logprobs for c in completions], initial) == pytest.approx(
        {"kl": 0.5, "kl_se": math.sqrt(4 * 0.25 / 3) / math.sqrt(4)}
    )


def test_kl_report_of_one_sample_has_no_standard_error() -> None:
    assert kl_report([array(-1)], [array(-3)]) == {"kl": 2.0, "kl_se": 0.0}


def test_length_correlation_at_one_sample_a_prompt_uses_differences_of_the_pairs() -> None:
    """Reward = a(prompt) + 5 (demonstration) - length / 2: exactly -1 in differences."""
    lengths = [(3, 1), (2, 6), (5, 4), (1, 1)]
    pairs = Dataset.from_dict(
        {
            "source": ["demonstration/policy"] * 4,
            "prompt_key": list("abcd"),
            "chosen_ids": [[7] * one for one, _ in lengths],
            "rejected_ids": [[8] * two for _, two in lengths],
        }
    )
    base = np.array([10.0, -3.0, 0.0, 40.0])
    chosen, rejected = (base - np.array(side) / 2 for side in zip(*lengths, strict=True))
    assert length_correlation(pairs, chosen + 5.0, rejected) == pytest.approx(-1.0)
    # Two samples of prompt a: they decide, whatever the demonstrations are.
    keys = list("aacd")
    two = pairs.remove_columns("prompt_key").add_column("prompt_key", keys)
    samples = np.array([1.0, 9.0, 0.0, 0.0])  # lengths 1 and 6
    assert length_correlation(two, chosen, samples) == pytest.approx(1.0)


class Sampled:
    """A context whose sampler draws one token from each of two tiny models."""

    def __init__(self, *models: Any) -> None:
        self.by_key = {str(number): model for number, model in enumerate(models)}
        self.models = self.sampler = self

    def sample_rows(self, policy: Policy, rows: Any, sampling: Sampling, use: str) -> PromptSamples:
        generator = TransformersGenerator(self.by_key[policy.key], [2], 0)
        prompts: dict[str, Any] = {"a": [3, 4]}
        drawn = generate(generator, list(prompts.values()), sampling)
        return PromptSamples(prompts, SampleSet(list(prompts.values()), drawn))

    def logprobs(self, policy: Policy, prompts: Any, completions: Any) -> list[np.ndarray]:
        return completion_logprobs(self.by_key[policy.key], prompts, completions)


@pytest.mark.parametrize("top_p", [1.0, 0.3])
def test_vital_signs_give_the_kl_of_the_policy_whatever_drew_the_samples(top_p: float) -> None:
    """Against the KL by enumeration of the 12 tokens. The samples of top-p are its most likely
    ones only, whose log-ratios have another mean."""
    policies = [small_llama(12, seed=seed) for seed in (1, 2)]
    for model in policies:
        model.lm_head.weight.data.mul_(40)
    context: Any = Sampled(*policies)
    first, second = (Policy(Path(name), name) for name in ("0", "1"))
    sampling = Sampling(n=4000, top_p=top_p, max_new_tokens=1)
    drawn = context.sample_rows(first, None, sampling, "held_out")
    unchanged = of_all_tokens(context, first, None, sampling, "held_out", drawn)  # type: ignore[arg-type]
    report = vital_signs(context, first, second, drawn, unchanged)
    p, q = (
        model(input_ids=torch.tensor([[3, 4]])).logits[0, -1].double().log_softmax(-1)
        for model in policies
    )
    exact = float((p.exp() * (p - q)).sum().detach())
    assert report["kl"] == pytest.approx(exact, abs=4 * report["kl_se"])
    assert exact > 20 * report["kl_se"] > 0
    _, samples = drawn.flat()
    ids = torch.tensor([sample.token_ids[0] for sample in samples])
    biased = float((p - q)[ids].mean().detach())
    assert (abs(biased - exact) < 4 * report["kl_se"]) == (top_p == 1.0)


def two_way(temperature: float) -> float:
    """Entropy of logits 1 and 0 at a temperature."""
    p = 1 / (1 + math.exp(-1 / temperature))
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


@pytest.mark.parametrize("temperature", [0.1, 0.37, 0.8, 1.0, 1.3, 2.0])
def test_temperature_of_entropy_finds_the_temperature(temperature: float) -> None:
    asked: list[float] = []

    def entropy_at(at: float) -> float:
        asked.append(at)
        return two_way(at)

    assert temperature_of_entropy(entropy_at, two_way(temperature)) == pytest.approx(temperature)
    assert all(round(at * 100) == pytest.approx(at * 100) for at in asked)
    assert len(asked) < 12


def test_temperature_of_entropy_stops_at_the_range() -> None:
    assert temperature_of_entropy(two_way, 0.0) == 0.1
    assert temperature_of_entropy(two_way, two_way(9.0)) == 2.0
