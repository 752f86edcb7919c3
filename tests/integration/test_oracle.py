"""The theory of the loop on a language so small that every sequence is enumerated.

Two prompts; sequences over three tokens, one of them EOS, of at most three tokens. Population
losses are exact sums over all pairs of sequences, minimised with this project's pair loss.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from irl_align.reward.losses import bradley_terry, implicit_reward, mixture_logp

EOS, LONGEST, PROMPTS = 2, 3, 2


def sequences() -> list[tuple[int, ...]]:
    """Every completion: tokens 0 and 1 up to an EOS, or three tokens without one."""
    stopped = [(*body, EOS) for n in range(LONGEST) for body in itertools.product((0, 1), repeat=n)]
    return stopped + list(itertools.product((0, 1), repeat=LONGEST))


COUNT = len(sequences())  # 1 + 2 + 4 + 8


def autoregressive(seed: int) -> Tensor:
    """Log-probs (prompts, sequences) of a policy with a random next-token table per prefix."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(PROMPTS):
        tables: dict[tuple[int, ...], Tensor] = {}
        row = []
        for sequence in sequences():
            total = torch.zeros((), dtype=torch.float64)
            for t, token in enumerate(sequence):
                logits = torch.randn(3, generator=draw, dtype=torch.float64)
                table = tables.setdefault(sequence[:t], logits.log_softmax(0))
                total = total + table[token]
            row.append(total)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def minimise(loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The (prompts, sequences) table at the minimum, by LBFGS from zero."""
    table = torch.zeros(PROMPTS, COUNT, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [table],
        lr=1.0,
        max_iter=2000,
        tolerance_grad=1e-11,
        tolerance_change=0.0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(table)
        value.backward()
        return value

    optimiser.step(closure)
    return table.detach()


def population_loss(reward: Tensor, expert: Tensor, other: Tensor) -> Tensor:
    """Exact E over prompts, y_E ~ expert and y_hat ~ other of the Bradley-Terry loss."""
    weight = expert.exp()[:, :, None] * other.exp()[:, None, :]
    preferred = reward[:, :, None].expand_as(weight).flatten()
    rejected = reward[:, None, :].expand_as(weight).flatten()
    return bradley_terry(preferred, rejected, weight.flatten())[0]


def centred(table: Tensor) -> Tensor:
    """A table less its mean per prompt: rewards are known up to c(x)."""
    return table - table.mean(1, keepdim=True)


def exact_update(policy: Tensor, reward: Tensor, beta: float) -> Tensor:
    """The policy level solved exactly: log of pi exp(r / beta) / Z(x)."""
    return (policy + reward / beta).log_softmax(1)


EXPERT, START, LATER = autoregressive(1), autoregressive(2), autoregressive(3)


def test_the_policies_are_distributions_over_all_sequences() -> None:
    assert COUNT == 15
    for policy in (EXPERT, START, LATER):
        assert policy.exp().sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert (EXPERT - START).abs().max() > 1.0  # there is something to learn


def test_the_reward_of_a_population_is_the_log_ratio_to_the_sampler() -> None:
    reward = minimise(lambda table: population_loss(table, EXPERT, START))
    torch.testing.assert_close(centred(reward), centred(EXPERT - START), atol=1e-6, rtol=0)


def test_the_exact_policy_step_on_that_reward_recovers_the_demonstrations() -> None:
    # Reference, sampler and start are one policy: beta = 1 is the step that ends at pi_E.
    reward = minimise(lambda table: population_loss(table, EXPERT, START))
    improved = exact_update(START, reward, beta=1.0)
    torch.testing.assert_close(improved.exp(), EXPERT.exp(), atol=1e-6, rtol=0)
    # A firmer leash stops between the two.
    half_way = exact_update(START, reward, beta=2.0)
    torch.testing.assert_close(half_way, ((EXPERT + START) / 2).log_softmax(1), atol=1e-6, rtol=0)


def test_pairs_of_two_policies_give_the_log_ratio_to_their_mixture() -> None:
    # Accumulated pairs: a quarter from START, the rest from LATER.
    mixture = (0.25 * START.exp() + 0.75 * LATER.exp()).log()
    reward = minimise(
        lambda table: (
            0.25 * population_loss(table, EXPERT, START)
            + 0.75 * population_loss(table, EXPERT, LATER)
        )
    )
    torch.testing.assert_close(centred(reward), centred(EXPERT - mixture), atol=1e-6, rtol=0)
    # So the step ends at pi_E from the mixture, and overshoots from LATER alone.
    assert (exact_update(mixture, reward, 1.0).exp() - EXPERT.exp()).abs().max() < 1e-6
    assert (exact_update(LATER, reward, 1.0).exp() - EXPERT.exp()).abs().max() > 0.05


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_spin_moves_to_the_tempered_ratio_of_its_theorem(lam: float) -> None:
    # arXiv:2401.01335: p_{t+1} is proportional to p_t (p_data / p_t)^(1 / lambda).
    def loss(logits: Tensor) -> Tensor:
        reward = implicit_reward(logits.log_softmax(1), START, lam)
        return population_loss(reward, EXPERT, START)

    learnt = minimise(loss).log_softmax(1)
    expected = START.exp() * (EXPERT.exp() / START.exp()) ** (1 / lam)
    expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(learnt.exp(), expected, atol=1e-6, rtol=0)
    if lam == 1.0:
        torch.testing.assert_close(learnt.exp(), EXPERT.exp(), atol=1e-6, rtol=0)


def test_spin_at_its_fixed_point_stands_still_at_ln_2() -> None:
    logits = EXPERT.clone().requires_grad_()
    reward = implicit_reward(logits.log_softmax(1), EXPERT, 0.1)
    loss = population_loss(reward, EXPERT, EXPERT)
    loss.backward()
    assert loss.item() == pytest.approx(0.6931471805599453, abs=1e-12)
    assert logits.grad is not None
    assert logits.grad.abs().max().item() < 1e-12


def test_spin_against_a_mixture_ends_at_the_mixture_times_the_tempered_ratio() -> None:
    # The optimal implicit reward is log(p_data / p_t) whatever the reference; with an unnormalised
    # geometric mixture as reference, Z(x) cancels in pairs.
    reference = mixture_logp([START, LATER], [0.3, 0.7])

    def loss(logits: Tensor) -> Tensor:
        reward = implicit_reward(logits.log_softmax(1), reference, 1.0)
        return population_loss(reward, EXPERT, LATER)

    learnt = minimise(loss).log_softmax(1)
    expected = START.exp() ** 0.3 * LATER.exp() ** 0.7 * EXPERT.exp() / LATER.exp()
    expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(learnt.exp(), expected, atol=1e-6, rtol=0)
