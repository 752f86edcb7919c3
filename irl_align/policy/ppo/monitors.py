"""Monitors of PPO: numbers for each update, samples with their tokens' credit, and alarms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from irl_align.config.policy_update import PPOOptions
from irl_align.models.logprobs import k1
from irl_align.policy.ppo.losses import k3
from irl_align.policy.ppo.rollout import Rollout, RolloutBatch

Ids = Sequence[Sequence[int]]
Judge = Callable[[Ids, Ids, PreTrainedTokenizerBase], Mapping[str, float]]
"""Gold metrics of prompts and completions as the tokenizer's ids. They are only reported."""
WINDOW = 10  # updates in which a joint rise of length and reward is looked for
RISE = 0.15  # share by which the mean length rises between the halves of the window
EOS_CREDIT = 1.0  # mean credit of EOS, in deviations of the reward, above which there is an alarm


def rollout_report(rollout: Rollout) -> dict[str, float]:
    """Rewards, KL to the reference, lengths and endings of a rollout.

    KLs are per completion, in nats; the entropy is the samples' mean of -log pi per token.
    """
    samples, scores, mask = rollout.samples, rollout.scores, rollout.samples.mask
    logps, reference = rollout.logps, rollout.reference_logps
    tokens = float(mask.sum())
    log_ratio = k1(logps, reference) * mask
    truncated = float(samples.truncated.double().mean())
    report = {
        "reward": float(scores.rewards.mean()),
        "reward_std": float(scores.rewards.std(correction=0)),
        "return": float(scores.returns.mean()),
        "kl": float(log_ratio.double().sum(1).mean()),
        "kl_k3": float((k3(logps, reference) * mask).double().sum(1).mean()),
        "sampled_entropy": -float((logps * mask).double().sum()) / tokens,
        "length": tokens / len(mask),
        "truncated": truncated,
        "eos_rate": 1.0 - truncated,
        **scores.health,
    }
    for name, part in (("finished", ~samples.truncated), ("truncated", samples.truncated)):
        if bool(part.any()):
            report[f"return_{name}"] = float(scores.returns[part].double().mean())
    if not bool(samples.truncated.all()):
        last = scores.credit.gather(1, mask.sum(1, keepdim=True).long() - 1)[~samples.truncated]
        report["eos_credit"] = float(last.double().mean())
    if rollout.values is not None:
        report["value"] = float((rollout.values * mask).double().sum()) / tokens
    return report


def sampler_report(rollout: Rollout, cap: float) -> dict[str, float]:
    """Distance of the sampler from the learner: |log pi_learner - log pi_sampler| over tokens.

    cap: the upper limit of the importance weights.
    """
    kept = rollout.samples.mask.bool()
    gaps = (rollout.logps - rollout.samples.logps).abs()[kept].double()
    report = {"sampler_log_ratio": float(gaps.mean()), "sampler_log_ratio_max": float(gaps.max())}
    if rollout.weights is not None:
        used = rollout.weights[kept].double()
        report["importance_weight"] = float(used.mean())
        report["importance_capped"] = float((used >= cap).double().mean())
    return report


def gold_report(
    judge: Judge | None, samples: RolloutBatch, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Gold metrics of a rollout's samples, with names that start with gold_."""
    if judge is None:
        return {}
    metrics = judge(samples.prompts, samples.completions, tokenizer)
    return {f"gold_{name}": float(value) for name, value in metrics.items()}


def sample_rows(
    update: int,
    rollout: Rollout,
    advantages: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> list[dict[str, Any]]:
    """The first `count` samples, which a report draws: for each token its text, credit, KL to the
    reference (k1) and advantage (B, T)."""
    samples, scores = rollout.samples, rollout.scores
    per_token = {
        "credit": scores.credit,
        "kl": k1(rollout.logps, rollout.reference_logps),
        "advantage": advantages,
    }
    rows = []
    for i, (prompt, ids) in enumerate(zip(samples.prompts, samples.completions, strict=True)):
        if i == count:
            break
        texts: Any = tokenizer.convert_ids_to_tokens(ids)
        rows.append(
            {
                "update": update,
                "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
                "completion": tokenizer.decode(ids, skip_special_tokens=True),
                "reward": float(scores.rewards[i]),
                "return": float(scores.returns[i]),
                "truncated": bool(samples.truncated[i]),
                "token_ids": ids,
                "tokens": [str(text) for text in texts],
                **{
                    name: [float(f"{v:.6g}") for v in array[i, : len(ids)].tolist()]
                    for name, array in per_token.items()
                },
            }
        )
    return rows


def find_alarms(recent: Sequence[Mapping[str, Any]], options: PPOOptions) -> list[str]:
    """Alarms of the newest record, given the records of at most WINDOW updates up to it."""
    now = recent[-1]
    alarms = [
        f"{name} is not finite"
        for name, value in now.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if options.kl_target is not None and now["kl"] > 2.0 * options.kl_target:
        alarms.append(
            f"KL to the reference is {now['kl']:.2f} nats, more than twice its target "
            f"{options.kl_target:g}"
        )
    if now["kl"] > options.kl_alarm:
        alarms.append(
            f"KL to the reference is {now['kl']:.2f} nats, above kl_alarm {options.kl_alarm:g}"
        )
    if now["sampler_log_ratio"] > options.sampler_gap_alarm:
        alarms.append(
            f"sampler and learner differ by {now['sampler_log_ratio']:.2g} in a token's log-prob, "
            f"above sampler_gap_alarm {options.sampler_gap_alarm:g}; see importance_weights"
        )
    finished, cut = now.get("return_finished"), now.get("return_truncated")
    if finished is not None and cut is not None and cut >= finished:
        alarms.append(
            f"samples without EOS have a mean return of {cut:.3g}, finished ones {finished:.3g}: "
            "PPO pays for never stopping; see missing_eos"
        )
    eos_credit, deviation = now.get("eos_credit", 0.0), now["reward_std"]
    shaped = options.credit == "red" and options.beta_c > 0.0 and not options.eos_prefixes
    if shaped and abs(eos_credit) > EOS_CREDIT * deviation:
        alarms.append(
            f"red gives EOS a mean credit of {eos_credit:.2f}, while rewards have a standard "
            f"deviation of {deviation:.2f}: the reward was fitted to texts with EOS, and prefixes "
            "have none; see eos_prefixes"
        )
    if rise := _joint_rise(recent):
        alarms.append(rise)
    return alarms


def _joint_rise(window: Sequence[Mapping[str, Any]]) -> str | None:
    """A joint rise of length and reward: the reward may be exploited by length."""
    if len(window) < WINDOW:
        return None

    def halves(name: str) -> tuple[float, float]:
        values = torch.tensor([float(record[name]) for record in window], dtype=torch.float64)
        return float(values[: WINDOW // 2].mean()), float(values[WINDOW // 2 :].mean())

    (short, long), (low, high) = halves("length"), halves("reward")
    if long <= (1.0 + RISE) * short or high <= low:
        return None
    return (
        f"length and reward rise together over {WINDOW} updates: {short:.1f} to {long:.1f} tokens, "
        f"{low:.3g} to {high:.3g}"
    )
