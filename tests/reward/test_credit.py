"""Token credit against numbers worked by hand, its sums, and what must not change it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from irl_align.reward import credit

INF = float("inf")
REWARDS = torch.tensor([2.0, -1.0, 0.0, 5.0])
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
# Places beyond a completion hold what no result may depend on.
PREFIXES = torch.tensor(
    [[0.5, 1.0, -1.0, 3.0, 2.0], [4.0, -1.0, 9.0, 9.0, 9.0], [1, 2, 0, 9, 9], [7, 9, 9, 9, INF]]
)
ATTENTION = torch.tensor(
    [[0.1, 0.2, 0.0, 0.1], [0.3, INF, 9.0, 9.0], [0.0, 0.0, 9.0, 9.0], [9.0, 9.0, 9.0, INF]]
)


def close(actual: Tensor, expected: list) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-6, rtol=0)


def every_kind(rewards: Tensor, prefixes: Tensor, attention: Tensor, mask: Tensor) -> dict:
    """Credit of every kind, the random one from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return {
        "sparse": credit.sparse(rewards, mask),
        "uniform": credit.uniform(rewards, mask),
        "red": credit.red(rewards, prefixes, mask),
        "red_half": credit.red(rewards, prefixes, mask, beta_c=0.5, gamma=0.9),
        "red_zero": credit.red(rewards, prefixes, mask, dynamic_initialisation=False),
        "abc": credit.abc(rewards, attention, mask),
        "random": credit.random(rewards, mask, generator),
    }


def test_sparse_is_all_on_the_last_token() -> None:
    close(credit.sparse(REWARDS, MASK), [[0, 0, 0, 2.0], [-1, 0, 0, 0], [0] * 4, [0] * 4])


def test_uniform_is_the_same_on_every_token() -> None:
    close(credit.uniform(REWARDS, MASK), [[0.5] * 4, [-1.0, 0, 0, 0], [0] * 4, [0] * 4])


def test_red_is_differences_of_prefix_scores() -> None:
    # Rows 0: 1 - .5, -1 - 1, 3 - -1, and R - 3; row 1: R - 4; row 2: 2 - 1 and R - 2.
    expected = [[0.5, -2.0, 4.0, -1.0], [-5.0, 0, 0, 0], [1.0, -2.0, 0, 0], [0] * 4]
    close(credit.red(REWARDS, PREFIXES, MASK), expected)


def test_red_mixes_with_sparse_by_beta_c() -> None:
    # arXiv:2411.08302: beta_c r~_t + (1 - beta_c) R 1[t = T].
    expected = [[0.125, -0.5, 1.0, 1.25], [-2.0, 0, 0, 0], [0.25, -0.5, 0, 0], [0] * 4]
    close(credit.red(REWARDS, PREFIXES, MASK, beta_c=0.25), expected)


def test_red_without_dynamic_initialisation_starts_at_zero() -> None:
    expected = [[1.0, -2.0, 4.0, -1.0], [-1.0, 0, 0, 0], [2.0, -2.0, 0, 0], [0] * 4]
    close(credit.red(REWARDS, PREFIXES, MASK, dynamic_initialisation=False), expected)


def test_red_discounts_the_next_potential() -> None:
    # .5 * 1 - .5, .5 * -1 - 1, .5 * 3 - -1, 2 - 3: nothing is discounted at the end.
    expected = [[0.0, -1.5, 2.5, -1.0], [-5.0, 0, 0, 0], [0.0, -2.0, 0, 0], [0] * 4]
    close(credit.red(REWARDS, PREFIXES, MASK, gamma=0.5), expected)


def test_abc_is_the_reward_by_renormalised_attention() -> None:
    # alpha is (.25, .5, 0, .25); row 2 has no mass on its tokens, so half each, of R = 0.
    expected = [[0.25, 0.5, 0.0, 0.25 + 1.0], [-1.0, 0, 0, 0], [0] * 4, [0] * 4]
    close(credit.abc(REWARDS, ATTENTION, MASK, beta=0.5), expected)
    no_mass = credit.abc(torch.tensor([3.0]), torch.zeros(1, 3), torch.tensor([[1, 1, 0]]), beta=1)
    close(no_mass, [[1.5, 1.5, 0.0]])


def test_credit_with_a_weight_of_0_is_bit_identical_to_sparse() -> None:
    rewards = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 1e3
    mask = (torch.arange(9) < torch.arange(50)[:, None] % 10).long()
    prefixes, attention = torch.randn(50, 10), torch.rand(50, 9)
    expected = credit.sparse(rewards, mask)
    generator = torch.Generator().manual_seed(2)
    assert torch.equal(credit.red(rewards, prefixes, mask, beta_c=0.0), expected)
    assert torch.equal(credit.abc(rewards, attention, mask, beta=0.0), expected)
    assert torch.equal(credit.random(rewards, mask, generator, beta=0.0), expected)
    assert expected.abs().sum() > 0


lengths = st.lists(st.integers(0, 7), min_size=1, max_size=6)


def batch(counts: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, prefixes, attention and mask of completions of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    width, rows = max(counts), len(counts)
    mask = (torch.arange(width) < torch.tensor(counts)[:, None]).long()
    rewards = torch.randn(rows, generator=generator, dtype=torch.float64) * 3
    prefixes = torch.randn(rows, width + 1, generator=generator, dtype=torch.float64)
    attention = torch.rand(rows, width, generator=generator, dtype=torch.float64)
    return rewards, prefixes, attention, mask


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(0, 99))
def test_credit_sums_by_kind(counts: list[int], seed: int) -> None:
    rewards, prefixes, attention, mask = batch(counts, seed)
    present = mask.any(1)
    whole = torch.where(present, rewards, 0.0)
    start = torch.where(present, prefixes[:, 0], 0.0)
    sums = {k: v.sum(1) for k, v in every_kind(rewards, prefixes, attention, mask).items()}
    for kind in ("sparse", "uniform", "red_zero", "abc", "random"):
        torch.testing.assert_close(sums[kind], whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(sums["red"], whole - start, atol=1e-12, rtol=0)
    discounted = every_kind(rewards, prefixes, attention, mask)["red_half"]
    powers = 0.9 ** torch.arange(mask.shape[1], dtype=torch.float64)
    expected = torch.stack(
        [
            0.9 ** (n - 1) * r - 0.5 * s if n else r * 0
            for n, r, s in zip(counts, rewards, start, strict=True)
        ]
    )
    torch.testing.assert_close((discounted * powers).sum(1), expected, atol=1e-12, rtol=0)


@settings(max_examples=30, deadline=None)
@given(lengths, st.integers(0, 99), st.integers(1, 4))
def test_credit_does_not_depend_on_padding_and_other_rows(
    counts: list[int], seed: int, more: int
) -> None:
    rewards, prefixes, attention, mask = batch(counts, seed)
    together = every_kind(rewards, prefixes, attention, mask)

    def padded(values: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(values, (0, more), value=fill)

    wider = every_kind(rewards, padded(prefixes, 7.0), padded(attention, 7.0), padded(mask, 0))
    for kind, values in together.items():
        torch.testing.assert_close(wider[kind], padded(values, 0.0), atol=1e-14, rtol=0)
        assert not values[mask == 0].any(), kind
    last, count = len(counts) - 1, counts[-1]
    alone = every_kind(
        rewards[last:], prefixes[last:, : count + 1], attention[last:, :count], mask[last:, :count]
    )
    for kind in set(together) - {"random"}:  # its draws go on from row to row
        torch.testing.assert_close(together[kind][last, :count], alone[kind][0], atol=1e-12, rtol=0)


def test_random_is_a_symmetric_dirichlet() -> None:
    mask = torch.ones(4000, 4)
    for concentration in (0.5, 3.0):
        generator = torch.Generator().manual_seed(5)
        shares = credit.random(torch.ones(4000), mask, generator, concentration, beta=1.0)
        assert shares.min() >= 0
        torch.testing.assert_close(shares.mean(0), torch.full((4,), 0.25), atol=0.015, rtol=0)
        # Variance of a share of K: (1/K)(1 - 1/K) / (K a + 1).
        variance = torch.full((4,), 0.25 * 0.75 / (4 * concentration + 1))
        torch.testing.assert_close(shares.var(0), variance, atol=0, rtol=0.1)


def test_random_follows_its_generator() -> None:
    def draw(seed: int) -> Tensor:
        return credit.random(REWARDS, MASK, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_credit_has_no_gradient() -> None:
    prefixes = PREFIXES.clone().requires_grad_()
    attention = ATTENTION.clone().requires_grad_()
    rewards = REWARDS.clone().requires_grad_()
    for kind, values in every_kind(rewards, prefixes, attention, MASK).items():
        assert not values.requires_grad, kind


def test_credit_of_half_precision_is_float32() -> None:
    halves = (REWARDS.bfloat16(), PREFIXES.bfloat16(), ATTENTION.bfloat16(), MASK)
    for kind, values in every_kind(*halves).items():
        assert values.dtype == torch.float32, kind
    thirds = credit.uniform(torch.tensor([1.0]).bfloat16(), torch.ones(1, 3))
    close(thirds, [[1 / 3, 1 / 3, 1 / 3]])


def test_attention_health() -> None:
    health = credit.attention_health(ATTENTION, MASK)
    close(health.mass, [0.4, 0.3, 0.0, 0.0])
    first = -(0.25 * math.log(0.25) * 2 + 0.5 * math.log(0.5))
    close(health.entropy, [first, 0.0, math.log(2), 0.0])
    close(health.last, [0.25, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("kind", ["sparse", "uniform", "red", "abc", "random"])
def test_credit_of_one_token_is_the_whole_reward(kind: str) -> None:
    """T = 1: the token is first and last; red takes the empty prefix off."""
    values = every_kind(
        torch.tensor([-3.0]), torch.tensor([[1.0, -3.0]]), torch.zeros(1, 1), torch.ones(1, 1)
    )
    close(values[kind], [[-4.0 if kind == "red" else -3.0]])
