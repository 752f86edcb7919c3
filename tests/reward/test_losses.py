"""Losses and log-probabilities against hand-computed numbers and closed-form gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from irl_align.reward.losses import (
    PAIR_LOSSES,
    PairLoss,
    bound,
    bradley_terry,
    calibration_error,
    implicit_reward,
    linear,
    mixture_logp,
    pair_logits,
    pair_metrics,
)

REWARDS = st.lists(
    st.tuples(st.floats(-30, 30), st.floats(-30, 30), st.floats(0.1, 5)), min_size=1, max_size=6
)


def gradients(loss: Tensor, *leaves: Tensor) -> list[list[float]]:
    return [g.tolist() for g in torch.autograd.grad(loss, leaves)]


# --- pair losses ----------------------------------------------------------------------------------


def test_bradley_terry_by_hand() -> None:
    # margins ln 3 and -ln 3: sigmoid 3/4 and 1/4; mean of -ln(3/4) and -ln(1/4).
    logits = pair_logits(
        torch.tensor([math.log(3) + 1, 0.5]), torch.tensor([1.0, 0.5 + math.log(3)])
    )
    loss, metrics = bradley_terry(logits)
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2, abs=1e-6)
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(
        {"accuracy": 0.5, "margin": 0.0, "loss": (math.log(4 / 3) + math.log(4)) / 2}, abs=1e-6
    )


def test_bradley_terry_of_equal_rewards_is_ln_2() -> None:
    rewards = torch.tensor([2.0, -7.0])
    loss, _ = bradley_terry(pair_logits(rewards, rewards))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)


def test_bradley_terry_stays_finite_where_the_sigmoid_underflows() -> None:
    preferred = torch.tensor([-500.0], requires_grad=True)
    loss, _ = bradley_terry(pair_logits(preferred, torch.tensor([500.0])))
    assert loss.item() == 1000.0
    assert gradients(loss, preferred) == [[-1.0]]


@settings(max_examples=30, deadline=None)
@given(REWARDS)
def test_bradley_terry_gradient_has_the_factor_sigmoid_of_minus_the_margin(rows: list) -> None:
    preferred = torch.tensor([r[0] for r in rows], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([r[1] for r in rows], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([r[2] for r in rows])
    loss, _ = bradley_terry(pair_logits(preferred, rejected), weight)
    total = sum(r[2] for r in rows)
    expected = [w / total / (1 + math.exp(a - b)) for a, b, w in rows]
    up, down = gradients(loss, preferred, rejected)
    assert up == pytest.approx([-g for g in expected], rel=1e-4, abs=1e-9)
    assert down == pytest.approx(expected, rel=1e-4, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(REWARDS)
def test_linear_is_minus_the_mean_margin_with_constant_gradient(rows: list) -> None:
    preferred = torch.tensor([r[0] for r in rows], requires_grad=True)
    rejected = torch.tensor([r[1] for r in rows], requires_grad=True)
    loss, _ = linear(pair_logits(preferred, rejected))
    assert loss.item() == pytest.approx(sum(b - a for a, b, _ in rows) / len(rows), abs=1e-4)
    up, down = gradients(loss, preferred, rejected)
    assert up == pytest.approx([-1 / len(rows)] * len(rows))
    assert down == pytest.approx([1 / len(rows)] * len(rows))


def test_at_zero_margin_bradley_terry_pulls_half_as_hard_as_linear() -> None:
    reward = torch.tensor([0.3, -0.2], requires_grad=True)
    pulls = [
        gradients(loss(pair_logits(reward, reward.detach()))[0], reward)[0]
        for loss in PAIR_LOSSES.values()
    ]
    assert list(PAIR_LOSSES) == ["bradley_terry", "linear"]
    assert pulls == [[-0.25, -0.25], [-0.5, -0.5]]


@pytest.mark.parametrize("logit", [-2.0, 0.0, 3.0])
def test_label_smoothing_mixes_both_directions(logit: float) -> None:
    smoothed, _ = bradley_terry(torch.tensor([logit], dtype=torch.float64), smoothing=0.1)
    right, wrong = math.log(1 + math.exp(-logit)), math.log(1 + math.exp(logit))
    assert smoothed.item() == pytest.approx(0.9 * right + 0.1 * wrong, abs=1e-9)


def test_label_smoothing_bounds_the_best_logit() -> None:
    best = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)
    loss, _ = bradley_terry(best, smoothing=0.1)
    assert gradients(loss, best)[0] == pytest.approx([0.0], abs=1e-6)


def test_pair_loss_gives_no_gradient_beyond_the_cap() -> None:
    preferred = torch.tensor([5.0, 2.0], requires_grad=True)
    rejected, none, equal = torch.zeros(2), torch.zeros(2), torch.ones(2)
    loss, metrics = PairLoss(cap=2.0, beta=2.0)(preferred, rejected, none, equal)
    assert gradients(loss, preferred)[0] == pytest.approx([0.0, -0.25 / (1 + math.e)], abs=1e-6)
    assert float(metrics["margin"]) == pytest.approx((2.5 + 1.0) / 2)  # of the logits themselves


@pytest.mark.parametrize(("name", "losses"), [("bradley_terry", None), ("linear", [-1.0, 2.0])])
def test_weights_make_a_weighted_mean(name: str, losses: list[float] | None) -> None:
    losses = losses or [math.log(1 + math.exp(-1)), math.log(1 + math.exp(2))]
    loss, metrics = PAIR_LOSSES[name](torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5]))
    assert loss.item() == pytest.approx((3.0 * losses[0] + 0.5 * losses[1]) / 3.5, abs=1e-6)
    assert float(metrics["accuracy"]) == 0.5  # of pairs, whatever their weight


def test_pair_logits_of_half_precision_rewards_are_not_rounded() -> None:
    # Both are bfloat16 numbers; their difference, 255.9375, is not: it would round to 256.
    logits = pair_logits(torch.tensor([256.0]).bfloat16(), torch.tensor([0.0625]).bfloat16())
    assert logits.tolist() == [255.9375]


def test_pair_logits_divide_by_beta_and_subtract_the_offset() -> None:
    offset = torch.tensor([0.5, -1.0])
    logits = pair_logits(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0]), offset, beta=2.0)
    assert logits.tolist() == [0.5, 0.5]


def test_pair_metrics_count_ties_as_half_and_carry_no_gradient() -> None:
    metrics = pair_metrics(torch.tensor([1.0, 0.0, 0.0, -2.0, 3.0]))
    assert float(metrics["accuracy"]) == pytest.approx(3 / 5)
    assert float(metrics["margin"]) == pytest.approx(2 / 5)
    by_hand = [math.log(1 + math.exp(-m)) for m in (1, 0, 0, -2, 3)]
    assert float(metrics["loss"]) == pytest.approx(sum(by_hand) / 5, abs=1e-6)
    reward = torch.tensor([1.0], requires_grad=True)
    assert not any(v.requires_grad for v in bradley_terry(reward)[1].values())


# --- rewards --------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(0.5, 20))
def test_bound_is_tanh_shaped_and_never_beyond_its_limit(value: float, limit: float) -> None:
    out = float(bound(torch.tensor(value, dtype=torch.float64), limit))
    assert abs(out) <= limit
    assert out == pytest.approx(limit * math.tanh(value / limit))


def test_bound_is_near_the_identity_at_zero() -> None:
    small = torch.tensor(1e-3, requires_grad=True)
    out = bound(small, 5.0)
    assert out.item() == pytest.approx(1e-3, rel=1e-6)
    assert gradients(out, small)[0] == pytest.approx(1.0, abs=1e-6)


def test_implicit_reward_by_hand() -> None:
    got = implicit_reward(torch.tensor([-3.0, -10.0]), torch.tensor([-5.0, -4.0]), 0.1)
    assert got.tolist() == pytest.approx([0.2, -0.6])


def test_mixture_of_two_distributions_by_hand() -> None:
    # sqrt(0.5 * 0.125) = 0.25, and 0.9^0.25 * 0.4^0.75.
    half = mixture_logp([torch.tensor([0.5]).log(), torch.tensor([0.125]).log()], [0.5, 0.5])
    assert half.exp().tolist() == pytest.approx([0.25])
    skew = mixture_logp([torch.tensor([0.9]).log(), torch.tensor([0.4]).log()], [0.25, 0.75])
    assert skew.exp().tolist() == pytest.approx([0.9**0.25 * 0.4**0.75])


def test_mixture_refuses_a_missing_weight() -> None:
    with pytest.raises(ValueError, match="zip"):
        mixture_logp([torch.zeros(1), torch.zeros(1)], [1.0])


# --- calibration ----------------------------------------------------------------------------------


def test_calibration_error_by_hand() -> None:
    # sigmoid(ln 3) = 0.75 and two of four win; sigmoid(ln 9) = 0.9 and all four win:
    # |0.75 - 0.5| / 2 + |0.9 - 1| / 2.
    low, high = math.log(3), math.log(9)
    margin = torch.tensor([low, -low, high, low, high, -low, high, high])
    assert calibration_error(margin, bins=2) == pytest.approx(0.25 / 2 + 0.1 / 2, abs=1e-6)


def test_calibration_error_of_ties_and_of_the_sure() -> None:
    assert calibration_error(torch.zeros(6)) == pytest.approx(0.0)  # says 1/2, counts 1/2
    assert calibration_error(torch.full((5,), 60.0)) == pytest.approx(0.0)
    assert calibration_error(torch.full((5,), -60.0)) == pytest.approx(1.0)
    assert calibration_error(torch.tensor([math.log(3)])) == pytest.approx(0.25, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40), st.integers(1, 12))
def test_calibration_error_is_a_share(margins: list[float], bins: int) -> None:
    assert 0.0 <= calibration_error(torch.tensor(margins), bins) <= 1.0
