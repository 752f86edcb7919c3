"""Policy gradients by exact enumeration of every completion: V = 3 tokens, T = 3 at most."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from irl_align.reward import credit

VOCABULARY, LONGEST = 3, 3


@dataclass
class World:
    """Every completion, a softmax policy with free logits for each prefix, and random rewards."""

    logits: Tensor
    """(prefixes, V)."""
    states: Tensor
    """Number of the prefix before each token: (B, T)."""
    tokens: Tensor
    mask: Tensor
    rewards: Tensor
    """R of each completion: (B,)."""
    potentials: Tensor
    """Random Phi of each prefix, then R: (B, T + 1)."""
    attention: Tensor

    def logps(self) -> Tensor:
        """Log-prob of each token: (B, T), 0 on padding."""
        table = self.logits.log_softmax(-1)
        return table[self.states, self.tokens] * self.mask

    def gradient(self, token_rewards: Tensor, gamma: float = 1.0, full: bool = False) -> Tensor:
        """sum_y p(y) sum_t gamma^t grad log pi(y_t | s_t) G_t over all completions y.

        G_t is the discounted reward from t on, or (full) of the whole completion, gamma = 1.
        """
        logps = self.logps()
        returns = torch.zeros_like(token_rewards)
        after = torch.zeros(len(returns), dtype=torch.float64)
        for t in reversed(range(LONGEST)):
            after = token_rewards[:, t] + gamma * after
            returns[:, t] = after
        if full:
            returns = token_rewards.sum(1, keepdim=True).expand_as(returns)
        powers = gamma ** torch.arange(LONGEST, dtype=torch.float64)
        weights = logps.sum(1).exp().detach()[:, None] * powers
        return torch.autograd.grad((weights * returns * logps).sum(), self.logits)[0]

    def truth(self, gamma: float = 1.0) -> Tensor:
        """Gradient of the expected reward E[gamma^(T-1) R] itself."""
        value = self.rewards * gamma ** (self.mask.sum(1).double() - 1)
        return torch.autograd.grad((self.logps().sum(1).exp() * value).sum(), self.logits)[0]


def make_world(eos: int | None, seed: int = 0) -> World:
    """All 27 completions of three tokens; with `eos` those that it ends earlier are cut there."""
    completions = set()
    for whole in itertools.product(range(VOCABULARY), repeat=LONGEST):
        end = whole.index(eos) + 1 if eos in whole else LONGEST
        completions.add(whole[:end])
    rows = sorted(completions)
    prefixes = sorted({row[:t] for row in rows for t in range(len(row))})
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    potential, rewards = draw(len(prefixes)) * 2, draw(len(rows)) * 2
    states = torch.tensor([[number[r[: min(t, len(r) - 1)]] for t in range(LONGEST)] for r in rows])
    tokens = torch.tensor([[*r, *[0] * (LONGEST - len(r))] for r in rows])
    mask = torch.tensor([[t < len(r) for t in range(LONGEST)] for r in rows]).long()
    potentials = torch.cat([potential[states], rewards[:, None]], 1)
    return World(
        draw(len(prefixes), VOCABULARY).requires_grad_(),
        states,
        tokens,
        mask,
        rewards,
        potentials,
        torch.rand(len(rows), LONGEST, generator=generator, dtype=torch.float64),
    )


@pytest.fixture(params=[None, 2], ids=["fixed_length", "with_eos"])
def world(request: pytest.FixtureRequest) -> World:
    return make_world(request.param)


def distance(one: Tensor, other: Tensor) -> float:
    """Relative distance of two gradients."""
    return float((one - other).norm() / other.norm())


def test_the_enumeration_is_whole(world: World) -> None:
    assert float(world.logps().sum(1).exp().sum().detach()) == pytest.approx(1.0, abs=1e-14)
    assert len(world.rewards) == 27 or {1, 2, 3} == set(world.mask.sum(1).tolist())


def test_sparse_rewards_to_go_give_the_true_gradient(world: World) -> None:
    gradient = world.gradient(credit.sparse(world.rewards, world.mask))
    assert distance(gradient, world.truth()) < 1e-12


@pytest.mark.parametrize("beta_c", [0.0, 0.3, 0.5, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("dynamic", [True, False])
def test_red_rewards_to_go_give_the_true_gradient(
    world: World, beta_c: float, dynamic: bool
) -> None:
    values = credit.red(
        world.rewards,
        world.potentials,
        world.mask,
        beta_c=beta_c,
        dynamic_initialisation=dynamic,
    )
    assert distance(world.gradient(values), world.truth()) < 1e-12
    if beta_c:
        assert (values - credit.sparse(world.rewards, world.mask)).abs().max() > 0.1


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_red_is_invariant_under_a_discount_that_it_shares(world: World, gamma: float) -> None:
    shared = credit.red(world.rewards, world.potentials, world.mask, gamma=gamma)
    assert distance(world.gradient(shared, gamma), world.truth(gamma)) < 1e-12
    undiscounted = credit.red(world.rewards, world.potentials, world.mask)
    assert distance(world.gradient(undiscounted, gamma), world.truth(gamma)) > 0.01


def return_preserving(world: World) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "uniform": credit.uniform(world.rewards, world.mask),
        "abc": credit.abc(world.rewards, world.attention, world.mask),
        "abc_half": credit.abc(world.rewards, world.attention, world.mask, beta=0.5),
        "random": credit.random(world.rewards, world.mask, generator),
    }


@pytest.mark.parametrize("kind", ["uniform", "abc", "abc_half", "random"])
def test_return_preserving_credit_is_right_under_full_returns_only(world: World, kind: str) -> None:
    values = return_preserving(world)[kind]
    assert distance(world.gradient(values, full=True), world.truth()) < 1e-12
    assert distance(world.gradient(values), world.truth()) > 0.05


def test_red_needs_a_potential_of_zero_at_the_end(world: World) -> None:
    """Why prefixes' last column is not read: a terminal potential of R biases the gradient."""
    ending = credit.sparse(world.rewards, world.mask) * 2  # red's, plus Phi(terminal) = R
    values = credit.red(world.rewards, world.potentials, world.mask) + ending / 2
    assert distance(world.gradient(values), world.truth()) > 0.5


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates (arXiv:1506.02438), token by token from the end."""
    advantages = torch.zeros_like(rewards)
    for row in range(len(rewards)):
        after, next_value = 0.0, 0.0
        for t in reversed(range(int(mask[row].sum()))):
            delta = rewards[row, t] + gamma * next_value - values[row, t]
            after = delta + gamma * lam * after
            advantages[row, t], next_value = after, values[row, t]
    return advantages


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("beta_c", [1.0, 0.4])
def test_red_with_its_potential_taken_off_the_critic_is_sparse(
    lam: float, gamma: float, beta_c: float
) -> None:
    """GAE(sparse, V) == GAE(red, V - beta_c Phi)."""
    world = make_world(eos=2, seed=1)
    critic = torch.randn(world.states.shape, generator=torch.Generator().manual_seed(2)).double()
    sparse = credit.sparse(world.rewards, world.mask)
    red = credit.red(world.rewards, world.potentials, world.mask, beta_c, gamma)
    shifted = critic - beta_c * world.potentials[:, :-1]
    expected = gae(sparse, critic, world.mask, gamma, lam)
    actual = gae(red, shifted, world.mask, gamma, lam)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    if lam < 1:  # with the same critic they are two estimators
        assert (gae(red, critic, world.mask, gamma, lam) - expected).abs().max() > 0.1
