"""Vital signs by hand, and each bound on its own."""

import math

import numpy as np
import pytest

from irl_align.config.loop import SignOptions
from irl_align.models.generation.protocol import Completion
from irl_align.models.generation.samples import SampleSet
from irl_align.training.diagnostics import find_signs, temperature_of_entropy, vitals


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


START = {
    "entropy": 2.0,
    "length": 20.0,
    "truncated": 0.01,
    "kl": 0.0,
    "demonstration_logp": -30.0,
}
BOUNDS = SignOptions()


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        ({}, None),
        # entropy: 0.75 to 1.25 of the first policy's
        ({"entropy": 1.5}, None),
        ({"entropy": 1.48}, "entropy: 0.74 of the first policy's, outside 0.75 to 1.25"),
        ({"entropy": 2.5}, None),
        ({"entropy": 2.52}, "entropy: 1.26 of the first policy's, outside 0.75 to 1.25"),
        ({"entropy": math.nan}, "entropy: nan of"),
        # kl: 3 nats
        ({"kl": 3.0}, None),
        ({"kl": 3.5}, "kl: 3.50 nats, above 3"),
        ({"kl": math.nan}, "kl: nan nats"),
        # length: a quarter either way
        ({"length": 25.0}, None),
        ({"length": 15.0}, None),
        ({"length": 26.0}, "length: +30% against the first policy, beyond 25%"),
        ({"length": 14.0}, "length: -30% against"),
        # samples without EOS: two points more; fewer is no fault
        ({"truncated": 0.025}, None),
        ({"truncated": 0.0}, None),
        ({"truncated": 0.05}, "missing_eos: +4.0% samples without EOS, above 2.0%"),
        # log-prob of the demonstrations: a fall of 5 nats; a rise is no fault
        ({"demonstration_logp": -35.0}, None),
        ({"demonstration_logp": -20.0}, None),
        ({"demonstration_logp": -36.0}, "demonstration_log_prob: fell by 6.00 nats, more than 5"),
        ({"demonstration_logp": math.nan}, "demonstration_log_prob: fell by nan"),
    ],
)
def test_each_bound(change: dict[str, float], sign: str | None) -> None:
    signs = find_signs(BOUNDS, {**START, **change}, START)
    if sign is None:
        assert signs == []
    else:
        assert len(signs) == 1
        assert signs[0].startswith(sign)


def test_bounds_are_the_recipes() -> None:
    wide = SignOptions(
        entropy_low=0.1,
        entropy_high=9.0,
        kl=99.0,
        length_change=9.0,
        missing_eos=0.9,
        demonstration_log_prob=99.0,
    )
    bad = {
        "entropy": 1.0,
        "length": 40.0,
        "truncated": 0.5,
        "kl": 9.0,
        "demonstration_logp": -50.0,
    }
    assert find_signs(wide, bad, START) == []
    names = [sign.split(":")[0] for sign in find_signs(BOUNDS, bad, START)]
    assert names == ["entropy", "kl", "length", "missing_eos", "demonstration_log_prob"]


def test_what_is_not_measured_is_not_judged() -> None:
    assert find_signs(BOUNDS, {"length": 20.0, "truncated": 0.01}, START) == []


def two_way(temperature: float) -> float:
    """Entropy of logits 1 and 0 at a temperature."""
    p = 1 / (1 + math.exp(-1 / temperature))
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


@pytest.mark.parametrize("temperature", [0.1, 0.37, 0.8, 1.0, 1.3, 2.0])
def test_temperature_of_an_entropy(temperature: float) -> None:
    asked: list[float] = []

    def entropy_at(at: float) -> float:
        asked.append(at)
        return two_way(at)

    assert temperature_of_entropy(entropy_at, two_way(temperature)) == pytest.approx(temperature)
    assert all(round(at * 100) == pytest.approx(at * 100) for at in asked)
    assert len(asked) < 12


def test_an_entropy_out_of_reach_gets_the_nearest_temperature() -> None:
    assert temperature_of_entropy(two_way, 0.0) == 0.1
    assert temperature_of_entropy(two_way, two_way(9.0)) == 2.0
