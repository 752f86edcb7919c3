"""The two-sample test: its pairs, its features, its rate for a perfect policy, and its power."""

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import norm
from support.ppo_tools import small_llama

from irl_align.models.generation.protocol import Completion, Sampling, generate
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.models.lm_head import completion_logprobs
from irl_align.reward.fit import SIDES
from irl_align.reward.two_sample import (
    fresh_pairs,
    identical,
    pooled_states,
    text_features,
    two_sample_accuracy,
)


def sample(ids: list[int], truncated: bool = False) -> Completion:
    return Completion(ids, np.zeros(len(ids), np.float32), truncated)


def test_fresh_pairs_count_identical_and_truncated_texts_and_cut_long_demonstrations() -> None:
    rows = Dataset.from_dict(
        {
            "prompt_key": ["a", "b", "b"],
            "prompt_ids": [[1], [2], [2]],
            "completion_ids": [[5, 2], [5, 6, 7, 8, 2], [6, 2]],
        }
    )
    samples = {"a": [sample([5, 2]), sample([4, 4, 4], True)], "b": [sample([5, 6, 7], True)]}
    pairs = fresh_pairs(rows, samples, max_tokens=3)
    texts = zip(pairs["prompt_key"], pairs["chosen_ids"], pairs["rejected_ids"], strict=True)
    assert list(texts) == [
        ("a", [5, 2], [5, 2]),
        ("a", [5, 2], [4, 4, 4]),
        ("b", [5, 6, 7], [5, 6, 7]),
        ("b", [6, 2], [5, 6, 7]),
    ]
    assert identical(pairs).tolist() == [True, False, True, False]
    assert list(pairs["rejected_truncated"]) == [False, True, True, True]


def test_pooled_states_are_mean_and_last_state_of_the_completion() -> None:
    model = small_llama(12, seed=1)
    prompts, completions = [[3, 4], [3, 4], [5]], [[6, 2], [7, 8, 9], [2]]
    with torch.no_grad():
        for p, c, own in zip(
            prompts, completions, pooled_states(model, prompts, completions), strict=True
        ):
            states = model.base_model(input_ids=torch.tensor([p + c]))[0][0, len(p) :]
            expected = torch.cat([states.mean(0), states[-1]]).numpy()
            assert own == pytest.approx(expected, abs=1e-5)
    logps = [np.array([-1.0, -3.0]), np.array([-2.0])]
    features = text_features([np.array([7.0]), np.array([8.0])], logps)
    assert features.tolist() == [[7.0, -4.0, -2.0, 2.0], [8.0, -2.0, -2.0, 1.0]]


def differences(seed: int, prompts: int, best: float) -> tuple[np.ndarray, list[str]]:
    """Two correlated pairs of each prompt; the best discriminator is right in `best` of them."""
    random = np.random.default_rng(seed)
    own = random.normal(size=(prompts, 1, 6))
    x = np.sqrt(0.5) * own + np.sqrt(0.5) * random.normal(size=(prompts, 2, 6))
    x[..., 0] += norm.ppf(best)
    return x.reshape(-1, 6), [f"{i:04}" for i in range(prompts) for _ in range(2)]


@pytest.mark.parametrize(("prompts", "runs"), [(60, 300), (500, 120)])
def test_two_sample_accuracy_of_a_perfect_policy_is_50_percent_at_the_nominal_rate(
    prompts: int, runs: int
) -> None:
    """Judging every fold by the others would miss 50% in 17% of the runs."""
    shares: list[Any] = [two_sample_accuracy(*differences(s, prompts, 0.5)) for s in range(runs)]
    missed = sum(not share.low <= 0.5 <= share.high for share in shares)
    assert 0 < missed <= runs * 0.05 + 2.5 * np.sqrt(runs * 0.05 * 0.95)
    assert np.mean([share.mean for share in shares]) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("prompts", "best", "power"), [(60, 0.8, 0.9), (60, 0.7, 0.3), (500, 0.6, 0.85)]
)
def test_two_sample_accuracy_distinguishes_another_policy(
    prompts: int, best: float, power: float
) -> None:
    shares: list[Any] = [two_sample_accuracy(*differences(s, prompts, best)) for s in range(40)]
    assert np.mean([share.low > 0.5 for share in shares]) >= power
    assert not any(share.high <= 0.55 for share in shares)  # it never seems that nothing is left


def test_two_sample_accuracy_counts_ties_one_half_and_needs_three_prompts() -> None:
    keys = [str(i) for i in range(50)]
    share = two_sample_accuracy(np.zeros((50, 4)), keys)
    assert share is not None and share.mean == 0.5 and share.clusters == 45
    assert two_sample_accuracy(np.ones((4, 3)), ["a", "a", "b", "b"]) is None
    wide = np.random.default_rng(0).normal(size=(50, 400)) + 2.0  # more features than components
    share = two_sample_accuracy(wide, keys)
    assert share is not None and share.mean == 1.0 and share.low is not None and share.low > 0.9


def draw(model: Any, prompts: list[list[int]], n: int, seed: int) -> list[list[Completion]]:
    generator = TransformersGenerator(model, [2], 0)
    return generate(generator, prompts, Sampling(n=n, max_new_tokens=4, seed=seed))


@pytest.mark.parametrize("same", [True, False])
def test_a_language_model_is_distinguished_from_another_and_not_from_itself(same: bool) -> None:
    """Demonstrations and samples of whole tiny models, some truncated, some identical."""
    expert, other = small_llama(12, seed=1), small_llama(12, seed=2)
    for model in (expert, other):
        model.lm_head.weight.data.mul_(20)
    prompts = [[a, b, c] for a in range(3, 11) for b in range(3, 11) for c in range(3, 8)]
    demonstrations = draw(expert, prompts, 1, seed=1)
    rows = Dataset.from_dict(
        {
            "prompt_key": [str(p) for p in prompts],
            "prompt_ids": prompts,
            "completion_ids": [one.token_ids for [one] in demonstrations],
        }
    )
    drawn = draw(expert if same else other, prompts, 1, seed=2)
    pairs = fresh_pairs(rows, dict(zip(map(str, prompts), drawn, strict=True)), 4)
    assert any(pairs["rejected_truncated"]) and identical(pairs).any() == same
    sides = [
        text_features(
            pooled_states(other, pairs[p][:], pairs[c][:]),
            completion_logprobs(other, pairs[p][:], pairs[c][:]),
        )
        for p, c in SIDES
    ]
    share = two_sample_accuracy(sides[0] - sides[1], pairs["prompt_key"][:])
    assert share is not None and share.low is not None and share.high is not None
    if same:
        assert share.low <= 0.5 <= share.high
    else:
        assert share.low > 0.5, share
