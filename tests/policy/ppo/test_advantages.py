"""Advantages against hand numbers and plain loops, and what token credit does to each."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from irl_align.policy.ppo import advantages as adv


def loop_gae(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """One row, by the recursion of arXiv:1506.02438, from the end."""
    out = [0.0] * len(rewards)
    later = 0.0
    for t in reversed(range(len(rewards))):
        after = values[t + 1] if t + 1 < len(values) else 0.0
        later = rewards[t] + gamma * after - values[t] + gamma * lam * later
        out[t] = later
    return out, [a + v for a, v in zip(out, values, strict=True)]


def ragged(lengths: list[int], columns: int) -> Tensor:
    return (torch.arange(columns) < torch.tensor(lengths)[:, None]).double()


def test_gae_by_hand() -> None:
    # delta = (0 + 2 - 1, 0 + 3 - 2, 4 - 3) = (1, 1, 1); gamma lambda = 1/2
    rewards = torch.tensor([[0.0, 0.0, 4.0, 9.0]])
    values = torch.tensor([[1.0, 2.0, 3.0, 8.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    advantages, targets = adv.gae(rewards, values, mask, gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[1.75, 1.5, 1.0, 0.0]]
    assert targets.tolist() == [[2.75, 3.5, 4.0, 0.0]]


def test_gae_discounted_by_hand() -> None:
    # delta = (1 + 0.5 * 4 - 2, 3 - 4) = (1, -1); gamma lambda = 1/4
    got, targets = adv.gae(
        torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 4.0]]), torch.ones(1, 2), 0.5, 0.5
    )
    assert got.tolist() == [[0.75, -1.0]]
    assert targets.tolist() == [[2.75, 3.0]]


def test_gae_at_lambda_1_and_0() -> None:
    """At 1 the return less the value, at 0 the one-step error: both read off the definition."""
    rewards = torch.tensor([[1.0, 2.0, 3.0]])
    values = torch.tensor([[0.5, 1.0, 1.5]])
    mask = torch.ones(1, 3)
    assert adv.gae(rewards, values, mask, 1.0, 1.0)[0].tolist() == [[5.5, 4.0, 1.5]]
    assert adv.gae(rewards, values, mask, 1.0, 0.0)[0].tolist() == [[1.5, 2.5, 1.5]]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    st.sampled_from([0.3, 0.9, 1.0]),
    st.integers(0, 1000),
)
def test_gae_is_the_recursion(lengths: list[int], lam: float, gamma: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + 2)
    rewards = torch.randn(shape, generator=draw, dtype=torch.float64)
    values = torch.randn(shape, generator=draw, dtype=torch.float64)
    mask = ragged(lengths, shape[1])
    got, targets = adv.gae(rewards.where(mask.bool(), torch.nan), values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        want, goal = loop_gae(
            rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam
        )
        assert got[row, :length].tolist() == pytest.approx(want, abs=1e-12)
        assert targets[row, :length].tolist() == pytest.approx(goal, abs=1e-12)
        assert not got[row, length:].any() and not targets[row, length:].any()


@pytest.mark.parametrize("columns", [1, 1023, 1024, 1025, 2500])
def test_sums_over_blocks_are_the_recursion(columns: int) -> None:
    values = torch.randn(2, columns, generator=torch.Generator().manual_seed(0)).double()
    got = adv.discounted_sums(values, 0.97)
    later = torch.zeros(2, dtype=torch.float64)
    want = torch.empty_like(values)
    for t in reversed(range(columns)):
        later = values[:, t] + 0.97 * later
        want[:, t] = later
    assert torch.allclose(got, want, atol=1e-11, rtol=0)


def test_potentials_move_between_credit_and_critic() -> None:
    """GAE(sparse, V) = GAE(sparse + shaping by Phi, V - Phi) for every lambda, Phi(end) = 0."""
    draw = torch.Generator().manual_seed(3)
    lengths = [5, 3, 1]
    mask = ragged(lengths, 5)
    rewards, values, potential = torch.randn(3, 3, 5, generator=draw, dtype=torch.float64) * mask
    after = torch.nn.functional.pad(potential[:, 1:], (0, 1))
    for gamma in (1.0, 0.9):
        shaped = rewards + gamma * after - potential
        for lam in (0.0, 0.5, 0.95, 1.0):
            plain, _ = adv.gae(rewards, values, mask, gamma, lam)
            moved, _ = adv.gae(shaped, values - potential, mask, gamma, lam)
            assert torch.allclose(plain, moved, atol=1e-12, rtol=0)


def test_rewards_to_go_by_hand() -> None:
    rewards, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1, 1, 0]])
    assert adv.rewards_to_go(rewards, mask).tolist() == [[3.0, 2.0, 0.0]]
    assert adv.rewards_to_go(rewards, mask, 0.5).tolist() == [[2.0, 2.0, 0.0]]


def test_rloo_by_hand() -> None:
    # two prompts of three samples: 6 - (2 + 1) / 2, ...
    got = adv.rloo(torch.tensor([6.0, 2.0, 1.0, 5.0, 5.0, 5.0]), 3)
    assert got.tolist() == [4.5, -1.5, -3.0, 0.0, 0.0, 0.0]


def test_grpo_by_hand() -> None:
    # mean 3, deviation sqrt((9 + 1 + 4) / 2) = sqrt(7)
    got = adv.grpo(torch.tensor([6.0, 2.0, 1.0, 5.0, 5.0, 5.0]), 3, eps=0.0001)
    scale = math.sqrt(7.0) + 0.0001
    want = [3 / scale, -1 / scale, -2 / scale, 0.0, 0.0, 0.0]
    assert got.tolist() == pytest.approx(want, rel=1e-6)


def test_sums_cancel_token_credit_under_rloo() -> None:
    """Shaping adds -Phi(s_0), the same for all samples of a prompt: the claim of the refusal."""
    sums = torch.tensor([6.0, 2.0, 1.0, -5.0, 0.5, 3.0], dtype=torch.float64)
    start = torch.tensor([0.7, 0.7, 0.7, -2.0, -2.0, -2.0], dtype=torch.float64)
    for estimate in (adv.rloo, adv.grpo):
        assert torch.allclose(estimate(sums - start, 3), estimate(sums, 3), atol=1e-12)


def test_reinforce_and_its_running_mean_by_hand() -> None:
    to_go = torch.tensor([[4.0, 2.0], [6.0, 9.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    first = adv.running_mean(None, to_go, mask, 0.9)
    assert first == 4.0  # (4 + 2 + 6) / 3: over tokens, the padding's 9 aside
    assert adv.running_mean(2.0, to_go, mask, 0.75) == 2.5
    assert adv.reinforce(to_go, mask, 2.5).tolist() == [[1.5, -0.5], [3.5, 0.0]]


def test_whitening_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 100.0], [6.0, float("nan"), 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    # mean 3, variance (4 + 1 + 9) / 2 = 7
    root = math.sqrt(7.0)
    got = adv.standardize(values, mask)
    assert got.flatten().tolist() == pytest.approx([-2 / root, -1 / root, 0, 3 / root, 0, 0])
    scaled = adv.scale_only(values, mask)
    assert scaled.flatten().tolist() == pytest.approx([1 / root, 2 / root, 0, 6 / root, 0, 0])
    assert adv.WHITENINGS["none"](values, mask).tolist() == [[1.0, 2.0, 0.0], [6.0, 0.0, 0.0]]


def test_whitening_of_what_does_not_vary() -> None:
    same = torch.full((2, 2), 3.0)
    assert adv.standardize(same, torch.ones(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    one = adv.standardize(torch.tensor([[3.0]]), torch.ones(1, 1))
    assert one.tolist() == [[0.0]]


def test_one_number_on_every_token() -> None:
    got = adv.over_tokens(torch.tensor([2.0, -1.0]), torch.tensor([[1, 1], [1, 0]]))
    assert got.tolist() == [[2.0, 2.0], [-1.0, 0.0]]
