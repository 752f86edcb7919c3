"""Rollouts: prompts, scores and their credit, and samplers that differ from the learner."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ppo_tools import EOS, PAD, Scripted, actors, options, samples_of, small_llama, train
from support.rows import plain_logps
from transformers import PreTrainedTokenizerFast

from irl_align.config.policy_update import PPOOptions
from irl_align.errors import UserError
from irl_align.models.generation.protocol import Completion, Generator, Sampling
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.policy.ppo import advantages as adv
from irl_align.policy.ppo.rollout import below_finished, collate, prompt_passes, sample, score
from irl_align.reward.implicit import ImplicitReward

PROMPTS = [[3, 4], [5], [6, 7, 8], [9, 10]]
SMALL: dict[str, Any] = {"advantage": "reinforce", "episodes": 32, "learning_rate": 1e-4}
REWARD = Scripted(lambda prompt, row: float(row[-1] == EOS) + 0.1 * len(row))


def every_completion(vocabulary: int, longest: int) -> list[tuple[list[int], list[int], bool]]:
    """(prompt, completion, truncated) of all completions that a policy can write."""
    rows, unfinished = [], [[]]
    for _ in range(longest):
        longer = [[*row, token] for row in unfinished for token in range(vocabulary)]
        unfinished = [row for row in longer if row[-1] != EOS]
        rows += [([3], row, False) for row in longer if row[-1] == EOS]
    return rows + [([3], row, True) for row in unfinished]


@pytest.mark.parametrize("credit", ["sparse", "red"])
@pytest.mark.parametrize("ratio", [{}, {"endogenous": True}, {"mean": True}])
def test_the_policy_gradient_of_a_log_ratio_is_exact(ratio: dict[str, bool], credit: str) -> None:
    """Over all completions: sum of pi * grad log pi_t * G_t = grad of the expected reward."""
    policy, one, other = (small_llama(5, seed=seed) for seed in range(3))
    rows = every_completion(5, 3)
    samples = samples_of(*rows)
    reward = ImplicitReward(one, [] if ratio else [(1.0, other)], 0.7, **ratio)
    chosen = options(advantage="reinforce", credit=credit)
    scores = score(samples, reward, policy, chosen, torch.Generator())
    torch.testing.assert_close(scores.credit.sum(1), scores.rewards)

    log_pi = [plain_logps(policy, prompt, row) for prompt, row, _ in rows]
    pi = torch.stack([logps.sum() for logps in log_pi]).exp()
    assert pi.sum().item() == pytest.approx(1.0)
    with torch.no_grad():
        own = torch.stack([plain_logps(one, prompt, row).sum() for prompt, row, _ in rows])
        if ratio == {}:
            own -= torch.stack([plain_logps(other, prompt, row).sum() for prompt, row, _ in rows])
        elif "endogenous" in ratio:
            own += one(torch.tensor([[3]])).logits[0, -1].double().logsumexp(-1)
        else:
            own /= samples.mask.sum(1)
    expected = torch.autograd.grad((pi * 0.7 * own).sum(), policy.parameters(), retain_graph=True)
    to_go = adv.rewards_to_go(scores.credit, samples.mask)
    each = [(logps * to_go[i, : len(logps)]).sum() for i, logps in enumerate(log_pi)]
    got = torch.autograd.grad((pi.detach() * torch.stack(each)).sum(), policy.parameters())
    largest = max(float(part.abs().max()) for part in expected)
    assert largest > 1e-3
    for mine, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-4 * largest, rtol=1e-3)


# --- prompts and samples --------------------------------------------------------------------------


def test_prompt_passes_take_every_prompt_once_and_continue() -> None:
    prompts = [[i] for i in range(10)]
    whole = prompt_passes(prompts, 7, 0, 25)
    assert [number for number, _ in whole] == [0, 1, 2]
    assert [len(part) for _, part in whole] == [10, 10, 5]
    for _, part in whole[:2]:
        assert sorted(part) == prompts
    assert whole[0][1] != whole[1][1]
    flat = [prompt for _, part in whole for prompt in part]
    again = [
        prompt
        for start in range(0, 25, 5)
        for _, part in prompt_passes(prompts, 7, start, 5)
        for prompt in part
    ]
    assert again == flat


def test_sample_draws_from_all_tokens() -> None:
    """With top-p or top-k the samples' log-probs would be another distribution's."""
    generator = TransformersGenerator(small_llama(12), [EOS], PAD)
    hot = Sampling(n=3, temperature=1.5, max_new_tokens=6)
    cut = replace(hot, top_p=0.2, top_k=2)
    plain, warped = (
        [(c.token_ids, c.logprobs.tolist()) for c in sample(generator, PROMPTS, s)]
        for s in (hot, cut)
    )
    assert warped == plain


def test_collate_refuses_samples_without_tokens() -> None:
    empty = Completion([], np.zeros(0, np.float32), True)
    full = Completion([4], np.zeros(1, np.float32), True)
    with pytest.raises(UserError, match="sample 1 has no token"):
        collate([[3], [3]], [full, empty])
    with pytest.raises(UserError, match="no samples"):
        collate([], [])


def test_collate_separates_what_is_scored_from_what_was_sampled() -> None:
    """The reward reads the end of text; ratios and KL are of the stop id that was sampled."""
    values = np.array([-0.5, -2.0], np.float32)
    samples = [Completion([4, EOS], values, False, stop=9), Completion([4, EOS], values, False)]
    batch = collate([[3], [3]], samples)
    assert batch.completions == [[4, EOS], [4, EOS]] and batch.actions == [[4, 9], [4, EOS]]
    assert batch.logps.tolist() == [[-0.5, -2.0]] * 2


def test_log_probs_agree_where_another_stop_id_ends_samples(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The trainer refuses a first update whose log-probs are not those of the reference."""
    chosen = options(**SMALL)
    policy = small_llama(12)
    cast = actors(policy, REWARD, tiny_tokenizer, PROMPTS, chosen)
    stops = [EOS, *range(3, 9)]
    cast = replace(cast, generator=TransformersGenerator(cast.policy, stops, PAD))
    [first, *_] = train(tmp_path, cast, chosen)["history"]
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert first["eos_rate"] > 0.5


# --- scores and credit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "returns"),
    [
        ({"missing_eos": "replace"}, [6.0, -1.0]),
        ({"missing_eos": "replace", "missing_eos_value": -4.0}, [6.0, -4.0]),
        ({"missing_eos": "subtract"}, [6.0, 8.0]),
        ({"missing_eos": "subtract", "missing_eos_value": 2.5}, [6.0, 6.5]),
        ({"missing_eos": "ignore"}, [6.0, 9.0]),
        ({"missing_eos": "subtract", "clip_reward": 7.0}, [6.0, 6.0]),
    ],
)
def test_score_changes_the_terminal_slot_for_a_missing_eos(
    way: dict[str, Any], returns: list[float]
) -> None:
    """R is the sum of a completion's ids: 4 + 2 with EOS, 4 + 5 without."""
    samples = samples_of(([3], [4, EOS], False), ([3], [4, 5], True))
    reward = Scripted(lambda prompt, completion: float(sum(completion)))
    for credit in ("sparse", "uniform", "red"):
        chosen = options(credit=credit, **way)
        scored = score(samples, reward, small_llama(12), chosen, torch.Generator())
        assert scored.returns.tolist() == returns
        assert scored.rewards.tolist() == [6.0, 9.0]
        assert scored.credit.sum(1).tolist() == pytest.approx(returns)  # red: R(x, empty) is 0
        clipped = [min(r, way.get("clip_reward", math.inf)) for r in (6.0, 9.0)]
        first = {"sparse": [0.0, 0.0], "uniform": [r / 2 for r in clipped], "red": [4.0, 4.0]}
        assert scored.credit[:, 0].tolist() == first[credit]


@pytest.mark.parametrize(
    ("rewards", "margin", "returns"),
    [
        # finished 1 and 3: deviation 1, so the bound is 1 - margin
        ([1.0, 3.0, 9.0, -5.0], 1.0, [1.0, 3.0, 0.0, -5.0]),
        ([1.0, 3.0, 9.0, -5.0], 0.0, [1.0, 3.0, 1.0, -5.0]),
        ([-4.0, -2.0, -1.0, 0.5], 2.0, [-4.0, -2.0, -6.0, -6.0]),  # below -1, as of an SFT model
        ([1e-4, 3e-4, 9e-4, 0.0], 1.0, [1e-4, 3e-4, 0.0, 0.0]),  # another reward's scale
        ([2.0, 2.0, 2.0, 2.0], 1.0, [2.0, 2.0, 1.0, 1.0]),  # no deviation anywhere
        ([2.0, 2.0, 4.0, 4.0], 0.5, [2.0, 2.0, 1.5, 1.5]),  # of all rewards: 1
    ],
)
def test_below_finished_by_hand(rewards: list[float], margin: float, returns: list[float]) -> None:
    cut = torch.tensor([False, False, True, True])
    got = below_finished(torch.tensor(rewards), cut, margin)
    assert got.tolist() == pytest.approx(returns, abs=1e-7)


def test_score_never_gives_the_most_to_samples_without_eos() -> None:
    """By default, under every credit: the reward alone prefers the longest sample, of no EOS."""
    rows = ([4, EOS], False), ([4, 4, EOS], False), ([4, 4, 4, 4, 4], True)
    samples = samples_of(*[([3], row, cut) for row, cut in rows])
    reward = Scripted(lambda prompt, row: len(row) - 9.0 if row else 0.0)
    for credit in ("sparse", "uniform", "red"):
        chosen = options(credit=credit, missing_eos=PPOOptions(kind="ppo").missing_eos)
        scored = score(samples, reward, small_llama(12), chosen, torch.Generator())
        assert scored.rewards.tolist() == [-7.0, -6.0, -4.0]
        assert scored.returns.tolist() == pytest.approx([-7.0, -6.0, -7.5])
        assert scored.credit.sum(1).tolist() == pytest.approx([-7.0, -6.0, -7.5])


@pytest.mark.parametrize("missing_eos", ["replace", "subtract"])
def test_score_centred_sums_to_r_minus_its_mean(missing_eos: str) -> None:
    """R is 4 + 2, 4 + 5 and 4 + 4 + 2 before the one without EOS becomes -1, or loses 1."""
    samples = samples_of(([3], [4, EOS], False), ([3], [4, 5], True), ([3], [4, 4, EOS], False))
    reward = Scripted(lambda prompt, completion: float(sum(completion)))
    returns, mean = {"replace": ([6, -1, 10], 5), "subtract": ([6, 8, 10], 8)}[missing_eos]
    for credit in ("sparse", "uniform", "red"):
        way = {"credit": credit, "missing_eos": missing_eos, "center_rewards": True}
        draws = torch.Generator()
        scored = score(samples, reward, small_llama(12), options(**way), draws)
        assert scored.returns.tolist() == returns and scored.rewards.tolist() == [6, 9, 10]
        assert scored.credit.sum(1).tolist() == pytest.approx([r - mean for r in returns])
        plain = score(
            samples, reward, small_llama(12), options(**way | {"center_rewards": False}), draws
        )
        moved = scored.credit - plain.credit  # red, like sparse, moves the last token alone
        last = [[0.0, -mean, 0.0], [0.0, -mean, 0.0], [0.0, 0.0, -mean]]
        even = [[-mean / 2, -mean / 2, 0.0]] * 2 + [[-mean / 3] * 3]
        assert torch.allclose(moved, torch.tensor(even if credit == "uniform" else last))


def test_score_centred_uniform_does_not_pay_for_length() -> None:
    """All completions are worth -6, of 2 or of 6 tokens: rewards-to-go tell the short ones from the
    long ones at the first tokens they share, unless R is centred."""
    short, long = [4, EOS], [4, 4, 4, 4, 4, EOS]
    samples = samples_of(([3], short, False), ([3], long, False))
    reward = Scripted(lambda prompt, completion: -6.0)
    for centred in (False, True):
        chosen = options(credit="uniform", center_rewards=centred)
        scored = score(samples, reward, small_llama(12), chosen, torch.Generator())
        after_first = adv.rewards_to_go(scored.credit, samples.mask)[:, 1].tolist()
        assert after_first == pytest.approx([0.0, 0.0] if centred else [-3.0, -5.0])


# --- samplers that differ from the learner --------------------------------------------------------


class HotSampler:
    """Samples at another temperature than requested; its log-probs are correct for it."""

    def __init__(self, inner: Generator, temperature: float) -> None:
        self.inner, self.temperature = inner, temperature

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        yield from self.inner.stream(prompts, replace(sampling, temperature=self.temperature))


def history(
    work: Path, tokenizer: PreTrainedTokenizerFast, temperature: float | None, chosen: PPOOptions
) -> list[dict[str, Any]]:
    """Records of a training on samples at a temperature that the learner does not use."""
    model = small_llama(len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # distributions that a temperature changes
    cast = actors(model, REWARD, tokenizer, PROMPTS, chosen, max_new_tokens=12)
    if temperature is not None:
        cast = replace(cast, generator=HotSampler(cast.generator, temperature))
    return list(train(work, cast, chosen)["history"])


def test_train_measures_and_logs_the_gap_of_another_sampler(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="irl_align"):
        records = history(tmp_path, tiny_tokenizer, 1.5, options(**SMALL))
    for record in records:
        assert 0.05 < record["sampler_log_ratio"] < record["sampler_log_ratio_max"]
        assert any(alarm.startswith("sampler and learner differ") for alarm in record["alarms"])
        assert record["first_log_ratio"] < 1e-4  # the update starts from the learner's own
        assert "importance_weight" not in record
    assert caplog.text.count("sampler and learner differ") == 1  # logged when it begins


def test_train_has_no_gap_with_the_same_engine(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    for record in history(tmp_path, tiny_tokenizer, None, options(**SMALL)):
        assert 0 <= record["sampler_log_ratio"] == record["first_log_ratio"] < 1e-4
        assert record["alarms"] == []


def test_importance_weights_have_mean_one_unless_truncated(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """E_q[pi / q] = 1 at every token."""
    big = {**SMALL, "batch_size": 128, "episodes": 128, "epochs": 1}
    records = {}
    for cap in (1e9, 1.1):
        chosen = options(importance_weights="truncated", importance_cap=cap, **big)
        [records[cap]] = history(tmp_path / str(cap), tiny_tokenizer, 1.5, chosen)
    assert records[1e9]["importance_weight"] == pytest.approx(1.0, abs=0.15)
    assert records[1e9]["importance_capped"] == 0
    assert 0.1 < records[1.1]["importance_capped"] < 0.9
    assert records[1.1]["importance_weight"] < 0.95


def test_importance_weights_are_one_under_top_p(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The sampler is the learner: a probability that top-p has renormalised would divide it."""
    chosen = options(importance_weights="truncated", bf16=True, **SMALL)
    model = small_llama(len(tiny_tokenizer))
    cast = actors(model, REWARD, tiny_tokenizer, PROMPTS, chosen)
    cast = replace(
        cast,
        generator=HotSampler(cast.generator, 1.0),  # another engine: the learner computes its own
        sampling=replace(cast.sampling, top_p=0.3),
    )
    for record in train(tmp_path, cast, chosen)["history"]:
        assert record["importance_weight"] == pytest.approx(1.0, abs=0.01)
        assert record["importance_capped"] == 0


def test_options_refuse_a_negative_margin() -> None:
    with pytest.raises(ValueError, match="with missing_eos relative it is a margin"):
        options(missing_eos="relative", missing_eos_value=-1.0)


def test_options_refuse_a_cap_without_weights() -> None:
    with pytest.raises(ValueError, match="importance_cap is an option of importance_weights trunc"):
        options(importance_cap=3.0)
