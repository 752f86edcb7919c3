"""Log-probabilities and KL estimates against values computed by hand."""

import math

import pytest
import torch

from irl_align.models.logprobs import (
    best_of_n_kl_bound,
    chosen_logprobs,
    k1,
    logprobs_and_values,
)


def test_chosen_logprobs_gives_the_probabilities_of_a_table() -> None:
    table = torch.tensor([[0.1, 0.2, 0.7], [0.25, 0.5, 0.25]])
    logits = table.log() + torch.tensor([[3.0], [-40.0]])  # a shift of logits changes nothing
    got = chosen_logprobs(logits, torch.tensor([2, 0]))
    assert got.exp().tolist() == pytest.approx([0.7, 0.25], rel=1e-4)


def test_chosen_logprobs_are_float32_for_bfloat16_logits() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    got = chosen_logprobs(logits, torch.tensor([1]))
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx([-math.log(3)], abs=1e-6)


def test_logprobs_and_values_are_those_of_soft_q_values() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.7], [0.25, 0.5, 0.25]]).log() + torch.tensor(
        [[3.0], [-4.0]]
    )
    got = logprobs_and_values(logits, torch.tensor([2, 0]))
    assert got[:, 0].exp().tolist() == pytest.approx([0.7, 0.25], rel=1e-4)
    assert got[:, 1].tolist() == pytest.approx([3.0, -4.0], rel=1e-5)  # the shift: log 1 = 0


def test_k1_averages_to_the_exact_divergence() -> None:
    # Over a whole distribution: sum_y pi(y) k1(y) = KL(pi || ref).
    pi, ref = torch.tensor([0.7, 0.1, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    exact = 0.7 * math.log(3.5) + 0.1 * math.log(1 / 3) + 0.2 * math.log(0.4)
    assert float((pi * k1(pi.log(), ref.log())).sum()) == pytest.approx(exact, abs=1e-6)
    assert k1(torch.tensor([-1.0]), torch.tensor([-3.0])).tolist() == [2.0]


def test_best_of_n_kl_bound_is_above_the_exact_divergence() -> None:
    assert best_of_n_kl_bound(1) == 0.0
    assert best_of_n_kl_bound(4) == pytest.approx(1.3862943611 - 0.75)
    # Exact KL for three outcomes ranked 0 < 1 < 2: P(best <= k) = F(k)^n.
    pi, n = [0.5, 0.3, 0.2], 4
    best = [0.5**n, 0.8**n - 0.5**n, 1 - 0.8**n]
    exact = sum(b * math.log(b / p) for b, p in zip(best, pi, strict=True))
    assert 0 < exact < best_of_n_kl_bound(n)
