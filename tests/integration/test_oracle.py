"""The theory of the loop on a language so small that every sequence is enumerated.

Two prompts; sequences over three tokens, one of them EOS, of at most three tokens. Population
losses are exact sums over all pairs of sequences, minimised with this project's pair loss. The loop
runs with the settings of a recipe: the pairs' window, the reward's offset and the KL reference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from irl_align.config.policy_update import PPOOptions
from irl_align.config.recipe import load_recipe
from irl_align.config.schema import Recipe
from irl_align.data.pairs import window
from irl_align.reward.losses import bradley_terry, implicit_reward, mixture_logp, pair_logits
from irl_align.reward.offset import OffsetShape

RESTAURANT = Path(__file__).parents[2] / "recipes" / "restaurant" / "base.yaml"

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


def population_loss(
    reward: Tensor, expert: Tensor, other: Tensor, offset: Tensor | None = None, beta: float = 1.0
) -> Tensor:
    """Exact E over prompts, y_E ~ expert and y_hat ~ other of the Bradley-Terry loss.

    offset: what the logits of both sides' sequences subtract, (prompts, sequences).
    """
    weight = expert.exp()[:, :, None] * other.exp()[:, None, :]
    preferred = reward[:, :, None].expand_as(weight).flatten()
    rejected = reward[:, None, :].expand_as(weight).flatten()
    had = torch.zeros_like(reward) if offset is None else offset
    difference = (had[:, :, None] - had[:, None, :]).flatten()
    logits = pair_logits(preferred, rejected, difference, beta)
    return bradley_terry(logits, weight.flatten())[0]


def centred(table: Tensor) -> Tensor:
    """A table less its mean per prompt: rewards are known up to c(x)."""
    return table - table.mean(1, keepdim=True)


def exact_update(policy: Tensor, reward: Tensor, beta: float) -> Tensor:
    """The policy level solved exactly: log of pi exp(r / beta) / Z(x)."""
    return (policy + reward / beta).log_softmax(1)


@dataclass(frozen=True)
class Settings:
    """The settings that decide where the loop ends."""

    window: str
    reference: str
    """Policy that the step moves from, in proportion to exp(reward / kl_coef)."""
    offset: str = "none"
    beta: float = 1.0
    kl_coef: float = 1.0

    @classmethod
    def of(cls, recipe: Recipe) -> Settings:
        """Those of a recipe. Best-of-N moves pi_k, by the increment of a cumulative reward."""
        update = recipe.policy_update
        ppo = isinstance(update, PPOOptions)
        return cls(
            recipe.pairs.window,
            update.reference if ppo else "current",
            recipe.offset,
            recipe.reward.beta,
            update.kl_coef if ppo else recipe.reward.beta,
        )


def exact_loop(settings: Settings, iterations: int) -> list[float]:
    """KL(expert || pi_k) for k = 0 to `iterations`; both levels are solved exactly."""
    policies, offsets, reward = [START], [torch.zeros_like(START)], torch.zeros_like(START)
    shape = OffsetShape()
    for k in range(iterations):
        numbered = [Dataset.from_dict({"k": [i]}) for i in range(k + 1)]
        used = [row["k"] for row in window(numbered, settings.window)]

        def loss(table: Tensor, used: list[int] = used) -> Tensor:
            losses = [
                population_loss(table, EXPERT, policies[i], offsets[i], settings.beta) for i in used
            ]
            return torch.stack(losses).mean()

        reward = minimise(loss)
        if settings.reference == "initial":
            policy = exact_update(START, reward, settings.kl_coef)
        else:
            increment = reward - settings.beta * offsets[k]
            policy = exact_update(policies[k], increment, settings.kl_coef)
        policies.append(policy)
        had = {
            "none": torch.zeros_like(START),
            "log_ratio": policy - START,
            "reward": reward / settings.beta,
        }
        offsets.append(shape(had[settings.offset], torch.ones_like(START)))
    return [divergence(policy) for policy in policies]


def divergence(policy: Tensor) -> float:
    """KL(expert || policy), the mean over prompts."""
    return float((EXPERT.exp() * (EXPERT - policy)).sum(1).mean())


EXPERT, START, LATER = autoregressive(1), autoregressive(2), autoregressive(3)


def test_the_policies_are_distributions_over_all_sequences() -> None:
    assert COUNT == 15
    for policy in (EXPERT, START, LATER):
        assert policy.exp().sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert (EXPERT - START).abs().max() > 1.0  # there is something to learn


def test_the_reward_of_a_population_is_the_log_ratio_to_the_sampler() -> None:
    reward = minimise(lambda table: population_loss(table, EXPERT, START))
    torch.testing.assert_close(centred(reward), centred(EXPERT - START), atol=1e-6, rtol=0)


def recipe(*options: str) -> Recipe:
    return load_recipe(RESTAURANT, ["loop.iterations=7", *options])


CUMULATIVE = ("pairs.window=all", "reward.offset=log_ratio")


@pytest.mark.parametrize("beta", [1.0, 3.0])
@pytest.mark.parametrize(
    "options",
    [
        ["policy_update={kind: best_of_n}"],
        ["policy_update={kind: ppo, kl_coef: BETA}"],
        ["policy_update={kind: ppo, kl_coef: BETA}", *CUMULATIVE],
        ["policy_update={kind: best_of_n}", *CUMULATIVE],
        ["policy_update={kind: ppo, kl_coef: BETA}", "pairs.window=last-2", *CUMULATIVE[1:]],
        ["policy_update={kind: ppo, kl_coef: BETA}", "pairs.window=latest", "reward.offset=reward"],
        ["policy_update={kind: ppo, kl_coef: BETA}", "pairs.window=all", "reward.offset=reward"],
    ],
    ids=lambda options: " ".join(options),
)
def test_the_loop_goes_to_the_demonstrations_and_stays(options: list[str], beta: float) -> None:
    """The defaults, and other settings of a cumulative reward: the KL never grows and ends at 0."""
    chosen = [f"reward.beta={beta}", *(option.replace("BETA", str(beta)) for option in options)]
    distance = exact_loop(Settings.of(recipe(*chosen)), 7)
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(distance))
    assert distance[-1] < 0.01


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # window, reference: KL after the second iteration and after the last one
        (("all", "current"), (0.056, 0.162)),
        (("last-2", "current"), (0.056, 0.001)),
        (("latest", "initial"), (0.455, 0.0)),
        (("all", "initial"), (0.087, 0.090)),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_leave_the_demonstrations(
    settings: tuple[str, str], expected: tuple[float, float]
) -> None:
    """Why these are no defaults: a reward of pi_k's samples is relative to pi_k, and one of older
    samples is relative to their mixture. The first iteration reaches the demonstrations."""
    distance = exact_loop(Settings(*settings), 7)
    assert distance[1] < 1e-6
    assert (distance[2], distance[7]) == pytest.approx(expected, abs=6e-4)


def test_a_step_with_more_kl_than_the_reward_stops_between_start_and_demonstrations() -> None:
    settings = Settings("all", "initial", "log_ratio", beta=1.0, kl_coef=2.0)
    half_way = divergence(((EXPERT + START) / 2).log_softmax(1))
    assert exact_loop(settings, 3)[1:] == pytest.approx([half_way] * 3, abs=1e-6)


def test_pairs_of_two_policies_give_the_log_ratio_to_their_mixture() -> None:
    # Accumulated pairs without offsets: a quarter from START, the rest from LATER.
    mixture = (0.25 * START.exp() + 0.75 * LATER.exp()).log()
    reward = minimise(
        lambda table: (
            0.25 * population_loss(table, EXPERT, START)
            + 0.75 * population_loss(table, EXPERT, LATER)
        )
    )
    torch.testing.assert_close(centred(reward), centred(EXPERT - mixture), atol=1e-6, rtol=0)


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_pairs_with_offsets_give_the_log_ratio_to_pi_0_whoever_drew_them(beta: float) -> None:
    reward = minimise(
        lambda table: (
            0.25 * population_loss(table, EXPERT, START, None, beta)
            + 0.75 * population_loss(table, EXPERT, LATER, LATER - START, beta)
        )
    )
    expected = beta * centred(EXPERT - START)
    torch.testing.assert_close(centred(reward), expected, atol=1e-6, rtol=0)


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
