"""What is watched of PPO: numbers per update, samples with their tokens' credit, alarms."""

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
from irl_align.policy.ppo.rollout import RolloutBatch, Scored

Judge = Callable[[Sequence[Sequence[int]], Sequence[str]], Mapping[str, float]]
"""Gold metrics of samples: prompts as token ids, completions as text. For reporting alone."""
WINDOW = 10  # updates over which length and reward are seen to rise
RISE = 0.15  # of the mean length, from the first half of the window to the second
EOS_CREDIT = 1.0  # deviations of the reward that red may put on EOS


def rollout_report(
    samples: RolloutBatch, scored: Scored, logps: Tensor, reference: Tensor, values: Tensor | None
) -> dict[str, float]:
    """Rewards, KL to the reference, lengths and endings of a rollout.

    logps, reference, values: (B, T). KLs are per completion, in nats; the entropy is the samples'
    mean of -log pi per token.
    """
    mask = samples.mask
    tokens = float(mask.sum())
    log_ratio = k1(logps, reference) * mask
    report = {
        "reward": float(scored.rewards.mean()),
        "reward_std": float(scored.rewards.std(correction=0)),
        "return": float(scored.returns.mean()),
        "kl": float(log_ratio.double().sum(1).mean()),
        "kl_k3": float((k3(logps, reference) * mask).double().sum(1).mean()),
        "sampled_entropy": -float((logps * mask).double().sum()) / tokens,
        "length": tokens / len(mask),
        "truncated": float(samples.truncated.double().mean()),
        "eos_rate": 1.0 - float(samples.truncated.double().mean()),
        **scored.health,
    }
    if not bool(samples.truncated.all()):
        last = scored.credit.gather(1, mask.sum(1, keepdim=True).long() - 1)[~samples.truncated]
        report["eos_credit"] = float(last.double().mean())
    if values is not None:
        report["value"] = float((values * mask).double().sum()) / tokens
    return report


def sampler_report(
    samples: RolloutBatch, logps: Tensor, weights: Tensor | None, cap: float
) -> dict[str, float]:
    """How far the sampler is from the learner: |log pi_learner - log pi_sampler| over tokens.

    logps: (B, T) the learner's; weights: (B, T) the importance weights, if any, at most cap.
    """
    kept = samples.mask.bool()
    gaps = (logps - samples.logps).abs()[kept].double()
    report = {"sampler_log_ratio": float(gaps.mean()), "sampler_log_ratio_max": float(gaps.max())}
    if weights is not None:
        used = weights[kept].double()
        report["importance_weight"] = float(used.mean())
        report["importance_capped"] = float((used >= cap).double().mean())
    return report


def gold_report(
    judge: Judge | None, samples: RolloutBatch, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Gold metrics of a rollout's samples, under names that start with gold_."""
    if judge is None:
        return {}
    texts = tokenizer.batch_decode(samples.completions, skip_special_tokens=True)
    found = judge(samples.prompts, texts)
    return {f"gold_{name}": float(value) for name, value in found.items()}


def sample_rows(
    update: int,
    samples: RolloutBatch,
    scored: Scored,
    token_kl: Tensor,
    advantages: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> list[dict[str, Any]]:
    """The first `count` samples with, per token, its text, credit, KL to the reference (k1) and
    advantage; what a report draws."""
    rows = []
    for i in range(min(count, len(samples.completions))):
        ids = samples.completions[i]
        texts: Any = tokenizer.convert_ids_to_tokens(ids)
        per_token = {"credit": scored.credit, "kl": token_kl, "advantage": advantages}
        rows.append(
            {
                "update": update,
                "prompt": tokenizer.decode(samples.prompts[i], skip_special_tokens=True),
                "completion": tokenizer.decode(ids, skip_special_tokens=True),
                "reward": float(scored.rewards[i]),
                "return": float(scored.returns[i]),
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
    """What the last of the records of at most WINDOW updates gives reason to worry about."""
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
    on_eos, bound = now.get("eos_credit", 0.0), EOS_CREDIT * now["reward_std"]
    shaped = options.credit == "red" and options.beta_c > 0.0 and not options.eos_prefixes
    if shaped and abs(on_eos) > bound:
        alarms.append(
            f"EOS gets credit {on_eos:.2f} in the mean from red, where rewards deviate by "
            f"{now['reward_std']:.2f}: the reward was fitted to texts with EOS, and prefixes have "
            "none; see eos_prefixes"
        )
    if rise := _rise(recent):
        alarms.append(rise)
    return alarms


def _rise(window: Sequence[Mapping[str, Any]]) -> str | None:
    """Length and reward that rise together: a reward that can be had by talking on."""
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
