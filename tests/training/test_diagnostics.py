"""Vital signs compared with numbers computed by hand."""

import math

import numpy as np
import pytest

from irl_align.models.generation.protocol import Completion
from irl_align.models.generation.samples import SampleSet
from irl_align.training.diagnostics import temperature_of_entropy, vitals


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
    assert vitals(SAMPLES, initial) == pytest.approx(
        {
            "samples": 4,
            "length": 8 / 4,
            "truncated": 0.25,
            "entropy": 9 / 8,  # 3 + 0.5 + 3 + 2.5 over eight tokens
            "kl": 0.5,
            "kl_se": math.sqrt(4 * 0.25 / 3) / math.sqrt(4),
        }
    )


def test_vitals_without_a_first_policy_have_no_divergence() -> None:
    assert set(vitals(SAMPLES, None)) == {"samples", "length", "truncated", "entropy"}


def test_vitals_of_one_sample_have_no_standard_error() -> None:
    one = SampleSet([[1]], [[completion([-1.0])]])
    assert vitals(one, [array(-3)])["kl_se"] == 0.0


def test_vitals_by_the_policys_own_log_probs_where_the_sampler_cut_the_tail() -> None:
    own = [array(-2, -3), array(-1.5), array(-2, -2, -2), array(-3, -1.5)]
    report = vitals(SAMPLES, [logp - 1 for logp in own], own)
    assert report["entropy"] == pytest.approx(17 / 8)
    assert report["kl"] == pytest.approx((2 + 1 + 3 + 2) / 4)


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
