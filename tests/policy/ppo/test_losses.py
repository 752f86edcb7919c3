"""PPO's losses and monitors against hand numbers, and their gradients."""

import math

import pytest
import torch

from irl_align.policy.ppo import losses as losses


def logs(*ratios: float) -> torch.Tensor:
    return torch.tensor(ratios, dtype=torch.float64).log()


def test_policy_loss_by_hand() -> None:
    ratios, advantages = logs(1.5, 1.5, 0.5, 0.5, 1.1), torch.tensor([2.0, -2.0, 2.0, -2.0, 3.0])
    got = losses.policy_loss(ratios, torch.zeros(5), advantages.double(), 0.2)
    # -2 * 1.2 (clipped), 2 * 1.5, -2 * 0.5, 2 * 0.8 (clipped), -3 * 1.1
    assert got.tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6, -3.3])


def test_policy_gradient_is_advantage_at_ratio_one_and_zero_where_clipped() -> None:
    logps = torch.tensor([0.0, math.log(1.5), math.log(0.5)], requires_grad=True)
    losses.policy_loss(logps, torch.zeros(3), torch.tensor([2.0, 2.0, -2.0]), 0.2).sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([-2.0, 0.0, 0.0])


def test_truncated_weights_by_hand() -> None:
    learner, sampler = logs(0.5, 0.3, 0.2, 0.2), logs(0.25, 0.1, 0.2, 0.8)
    got = losses.truncated_weights(learner, sampler, 2.5)
    assert got.tolist() == pytest.approx([2.0, 2.5, 1.0, 0.25])  # 0.3 / 0.1 = 3 is cut


def test_weights_give_the_policy_gradient_from_samples_of_another_policy() -> None:
    """By enumeration: sum_a q(a) grad[w(a) loss(a)] is sum_a pi(a) grad[loss(a)] while none is cut,
    and the gradient of sum_a pi(a) A(a)."""
    generator = torch.Generator().manual_seed(0)
    logits, other, advantages = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    sampler = other.log_softmax(-1)

    def gradient(objective: torch.Tensor) -> list[float]:
        (gradient,) = torch.autograd.grad(objective, logits)
        return list(gradient.tolist())

    logps = logits.log_softmax(-1)
    loss = losses.policy_loss(logps, logps.detach(), advantages, 0.2)
    weights = losses.truncated_weights(logps.detach(), sampler, 1e9)
    weighted = gradient((sampler.exp() * weights * loss).sum())
    exact = gradient(-(logits.log_softmax(-1).exp() * advantages).sum())
    assert weighted == pytest.approx(exact)
    logps = logits.log_softmax(-1)
    loss = losses.policy_loss(logps, logps.detach(), advantages, 0.2)
    assert gradient((sampler.exp() * loss).sum()) != pytest.approx(exact, rel=0.1)


def test_value_loss_by_hand() -> None:
    values, old = torch.tensor([1.0, 1.0, 0.1]), torch.tensor([0.0, 0.0, 0.0])
    targets = torch.tensor([2.0, 0.0, 0.0])
    # moved from 0 to 1, clipped to 0.2: max(1, 1.8^2)/2, max(1, 0.2^2)/2, and 0.1^2/2 unclipped
    got = losses.value_loss(values, old, targets, 0.2)
    assert got.tolist() == pytest.approx([1.62, 0.5, 0.005])
    assert losses.value_loss(values, old, targets, None).tolist() == pytest.approx(
        [0.5, 0.5, 0.005]
    )


def test_k3_by_hand_and_unbiased() -> None:
    policy, reference = logs(0.5, 0.25), logs(0.25, 0.5)
    # log ratio log 2: 1/2 - 1 + log 2; -log 2: 2 - 1 - log 2
    want = [math.log(2) - 0.5, 1.0 - math.log(2)]
    assert losses.k3(policy, reference).tolist() == pytest.approx(want)
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    exact = float((p * (p / q).log()).sum())
    assert float((p * losses.k3(p.log(), q.log())).sum()) == pytest.approx(exact)


def kl_gradient(logits: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> list[float]:
    """Gradient of KL(p || q) = sum p log(p / q), by enumeration of all tokens."""
    (gradient,) = torch.autograd.grad((p * (p / q).log()).sum(), logits, retain_graph=True)
    return list(gradient.tolist())


@pytest.mark.parametrize("epoch", [1, 2])
def test_exact_kl_has_the_value_and_the_gradient_of_the_kl(epoch: int) -> None:
    """By enumeration of six tokens, whose mean is over pi_old: pi itself in the first epoch, and
    another policy from the second on. The gradient of k3 is that of the other KL, and off pi its
    value is biased too."""
    generator = torch.Generator().manual_seed(1)
    logits, other, before = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logps, reference = logits.log_softmax(-1), other.log_softmax(-1)
    old = logps.detach() if epoch == 1 else before.log_softmax(-1)

    def gradient(objective: torch.Tensor) -> list[float]:
        (gradient,) = torch.autograd.grad(objective, logits, retain_graph=True)
        return list(gradient.tolist())

    want = kl_gradient(logits, logps.exp(), reference.exp())
    exact = float((logps.exp() * (logps - reference)).sum().detach())
    mean = (old.exp() * losses.exact_kl(logps, old, reference)).sum()
    assert float(mean.detach()) == pytest.approx(exact)
    assert gradient(mean) == pytest.approx(want)
    k3 = (old.exp() * losses.k3(logps, reference)).sum()
    assert gradient(k3) != pytest.approx(want, rel=0.1)
    if epoch == 1:
        assert gradient(k3) == pytest.approx(kl_gradient(logits, reference.exp(), logps.exp()))
    else:
        assert float(k3.detach()) != pytest.approx(exact, rel=0.1)


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(3.0), 0.0, -torch.inf, -torch.inf]])
    got = losses.entropy(logits.clamp(min=-1e4))
    three = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert got.tolist() == pytest.approx([math.log(4), three], rel=1e-6)


def test_clipped_share_by_hand() -> None:
    got = losses.clipped_share(logs(1.3, 1.1, 0.7, 0.95), torch.zeros(4), 0.2)
    assert float(got) == 0.5


def test_explained_variance_by_hand() -> None:
    targets = torch.tensor([1.0, 2.0, 3.0])
    assert losses.explained_variance(targets + 5.0, targets) == 1.0  # a constant off is explained
    assert losses.explained_variance(torch.zeros(3), targets) == 0.0
    # errors (0, 1, 2) have variance 2/3, as the targets
    assert losses.explained_variance(torch.tensor([1.0, 1.0, 1.0]), targets) == pytest.approx(0.0)
    assert losses.explained_variance(-targets, targets) == pytest.approx(-3.0)
    assert losses.explained_variance(targets, torch.ones(3)) == 0.0


@pytest.mark.parametrize(
    ("kl", "want"),
    [(6.0, 0.1), (12.0, 0.1 * 1.02), (0.0, 0.1 * 0.98), (6.6, 0.1 * 1.01)],
)
def test_adaptive_kl_by_hand(kl: float, want: float) -> None:
    """Errors of 0, +1 and -1 (bounded to 0.2), and 0.1; 100 of 1,000 episodes."""
    assert losses.adapted_kl_coef(0.1, kl, 6.0, 100, 1000) == pytest.approx(want)


@pytest.mark.parametrize(("kl", "want"), [(0.0, 0.08), (99.0, 0.12), (6.6, 0.11)])
def test_adaptive_kl_changes_by_at_most_a_fifth(kl: float, want: float) -> None:
    """Ten horizons in one update: the equation without a bound would give -0.1 for the first."""
    assert losses.adapted_kl_coef(0.1, kl, 6.0, 10_000, 1000) == pytest.approx(want)
