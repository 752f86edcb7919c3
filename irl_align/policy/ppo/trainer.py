"""The loop of PPO: roll out, score, estimate advantages, update; watch, checkpoint, resume.

Legend of shapes: B samples, N samples per prompt, T completion tokens.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from irl_align.config.policy_update import PPOOptions
from irl_align.errors import UserError
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.models.logprobs import k1
from irl_align.models.trl import Training
from irl_align.policy.ppo import advantages as adv
from irl_align.policy.ppo.actors import Actors
from irl_align.policy.ppo.checkpoint import (
    Journal,
    Progress,
    last_checkpoint,
    load_checkpoint,
    once_more,
    save_checkpoint,
)
from irl_align.policy.ppo.learner import Batch, Diverged, Learner, LogProbGap, Micro
from irl_align.policy.ppo.losses import adapted_kl_coef, explained_variance, truncated_weights
from irl_align.policy.ppo.monitors import (
    WINDOW,
    find_alarms,
    gold_report,
    rollout_report,
    sample_rows,
    sampler_report,
)
from irl_align.policy.ppo.network import MicroBatch
from irl_align.policy.ppo.rollout import RolloutBatch, Scored, draw, score
from irl_align.policy.ppo.selection import Selection
from irl_align.utils import distributed

logger = logging.getLogger("irl_align.policy.ppo")


@dataclass(frozen=True)
class Rollout:
    """Samples with all that is known of them before an update."""

    samples: RolloutBatch
    scored: Scored
    micro: Micro
    whole: list[MicroBatch]
    logps: Tensor
    """(B, T) of the policy as it is now: the sampler's own where those are the learner's."""
    reference: Tensor
    """(B, T) of the reference."""
    values: Tensor | None
    """(B, T) of the critic as it is now."""
    weights: Tensor | None
    """(B, T) truncated importance weights, where they are asked for and not all 1."""


class PPOTrainer:
    """One PPO training in a stage's folder; `run` goes on from the last checkpoint there."""

    def __init__(
        self, actors: Actors, learner: Learner, options: PPOOptions, training: Training
    ) -> None:
        self.actors, self.learner = actors, learner
        self.options, self.training = options, training
        self.selection = Selection(actors, learner, options, training)
        self.progress = Progress(kl_coef=options.kl_coef)
        self.scratch = training.work / "scratch"
        # What top-p or top-k drew, autocast rounds or another engine computes has other log-probs
        # in the learner: those are then computed once per rollout.
        plain = actors.sampling.top_p == 1 and actors.sampling.top_k == 0
        same_engine = isinstance(actors.generator, TransformersGenerator)
        self.own_logps = plain and same_engine and not learner.bf16

    def run(self) -> dict[str, Any]:
        """Train to the end or to a stop, and leave the policy that is kept in work/model.

        Raises UserError where a rollout cannot be scored, or training diverged before any policy
        was kept; TryAgain where it diverged for the first time since the last checkpoint.
        """
        self.scratch.mkdir(parents=True, exist_ok=True)
        found = distributed.on_main(lambda: last_checkpoint(self.scratch))
        if found is not None:
            self.progress = load_checkpoint(found, self.learner.accelerator)
            self.learner.publish()
            logger.info("%s: resuming from %s", self.training.label, found.name)
        progress, work = self.progress, self.training.work
        self.metrics = Journal(work / "metrics.jsonl", found)
        self.samples = Journal(work / "samples.jsonl", found)
        ended = f"{self.options.updates} updates done"
        start: dict[str, Any] = {}
        try:
            if progress.updates == 0:
                start = self.selection.evaluate(progress)
            self._updates()
            kept = self.selection.finish(progress)
        except Diverged as fault:
            once_more(self.scratch, str(fault))
            ended, kept = self.selection.fall_back(fault, progress)
            logger.warning("%s: %s", self.training.label, ended)
        return {
            "updates": progress.updates,
            "episodes": progress.updates * self.options.batch_size,
            "kept_update": kept,
            "best": progress.best,
            "ended": ended,
            "history": self.metrics.read(),
            **({"start": start} if start else {}),
        }

    def _updates(self) -> None:
        total, batch = self.options.updates, self.options.batch_size
        done = self.progress.updates
        label = self.training.label
        with tqdm(total=total * batch, initial=done * batch, desc=label, unit="sample") as bar:
            for number in range(done, total):
                record = self._sound_update(number)
                self.progress.updates = number + 1
                last = number + 1 == total
                if last or (number + 1) % self.options.evaluate_every == 0:
                    record.update(self.selection.evaluate(self.progress))
                self._tell(record)
                if not last and (number + 1) % self.options.checkpoint_every == 0:
                    self._checkpoint()
                shown = {name: f"{record[name]:.3g}" for name in ("reward", "kl", "length")}
                bar.set_postfix(shown, refresh=False)
                bar.update(batch)

    def _sound_update(self, number: int) -> dict[str, Any]:
        """An update; what the first one refuses as a mistake is later the end of training."""
        try:
            return self._update(number)
        except UserError as error:
            if number == 0:
                raise
            raise Diverged(f"update {number + 1}: {error}") from error

    def _update(self, number: int) -> dict[str, Any]:
        """One rollout and the update on it; raises Diverged before an update that cannot be."""
        clock = [time.perf_counter()]
        with self._autocast():
            samples = draw(
                self.actors.generator,
                self.actors.prompts,
                self.actors.sampling,
                self.training.seed,
                number,
                self.options.batch_size,
            )
        clock.append(time.perf_counter())
        rollout = self._judge(number, samples)
        report = self._report(rollout)
        self._check(number, rollout, report["kl"])
        batch = self._batch(rollout)
        clock.append(time.perf_counter())
        report.update(self.learner.update(number, batch, rollout.micro, rollout.whole))
        self.learner.publish()
        if self.own_logps:  # the sampler's, which the first minibatch has computed anew
            for name in ("log_ratio", "log_ratio_max"):
                report[f"sampler_{name}"] = report[f"first_{name}"]
        clock.append(time.perf_counter())
        if batch.old_values is not None and batch.targets is not None:
            kept = samples.mask.bool()
            report["explained_variance"] = explained_variance(
                batch.old_values[kept], batch.targets[kept]
            )
        self._adapt(report["kl"])
        token_kl = k1(rollout.logps, rollout.reference)
        rows = (samples, rollout.scored, token_kl, batch.advantages, self.actors.tokenizer)
        self.samples.write(sample_rows(number + 1, *rows, self.options.samples_kept))
        names = ("seconds_generate", "seconds_score", "seconds_update")
        spent = {n: end - begin for n, begin, end in zip(names, clock, clock[1:], strict=False)}
        gold = distributed.on_main(
            lambda: gold_report(self.actors.judge, samples, self.actors.tokenizer)
        )
        done = (number + 1) * self.options.batch_size
        return {"update": number + 1, "episodes_done": done, **report, **gold, **spent}

    def _judge(self, number: int, samples: RolloutBatch) -> Rollout:
        """Reward, reference, critic and (where the sampler's do not do) policy: one pass each."""
        draws = torch.Generator().manual_seed(self.training.seed + number)
        scored = score(samples, self.actors.reward, self.actors.policy, self.options, draws)
        micro = self.learner.micro(samples)
        whole = self.learner.whole(micro)
        critic = self.options.advantage == "gae"
        old, values = None, None
        if critic or not self.own_logps:
            old, values = self.learner.infer(micro, whole, not self.own_logps, critic)
        with self.actors.as_reference():
            reference = self.learner.logps_of(self.actors.reference, micro, whole)
        logps, weights = samples.logps, None
        if old is not None:
            logps = old
            if self.options.importance_weights == "truncated":
                weights = truncated_weights(old, samples.logps, self.options.importance_cap)
        return Rollout(samples, scored, micro, whole, logps, reference, values, weights)

    def _report(self, rollout: Rollout) -> dict[str, float]:
        samples = rollout.samples
        slots = sum(distributed.gather(sum(batch.slots for batch in rollout.whole)))
        return {
            **rollout_report(
                samples, rollout.scored, rollout.logps, rollout.reference, rollout.values
            ),
            **self._sampler_report(rollout),
            "padding": 1.0 - sum(rollout.micro.lengths) / slots,
            "kl_coef": self.progress.kl_coef,
        }

    def _sampler_report(self, rollout: Rollout) -> dict[str, float]:
        if self.own_logps:
            return {}  # nothing to compare with before the first minibatch
        cap = self.options.importance_cap
        return sampler_report(rollout.samples, rollout.logps, rollout.weights, cap)

    def _check(self, number: int, rollout: Rollout, kl: float) -> None:
        """KL 0 where policy and reference are one model; an end to a KL that has exploded."""
        if not kl <= self.options.kl_stop:
            raise Diverged(
                f"update {number + 1}: KL to the reference is {kl:.2f} nats per completion, above "
                f"kl_stop {self.options.kl_stop:g}; raise kl_coef or lower learning_rate"
            )
        if number == 0 and self.actors.starts_at_reference:
            gaps = (rollout.logps - rollout.reference).abs() * rollout.samples.mask
            apart = LogProbGap(_mean(gaps, rollout.samples.mask), float(gaps.max()))
            if told := apart.beyond_rounding(self.learner.bf16):
                raise UserError(
                    "PPO: the policy and its reference are the same model, but their log-probs "
                    f"differ {told}"
                )

    def _batch(self, rollout: Rollout) -> Batch:
        """Advantages, whitened, and all that the update reads."""
        mask, options = rollout.samples.mask, self.options
        rewards = self._token_rewards(rollout)
        advantages, targets = self._advantages(rewards, rollout.values, mask)
        in_loss = options.kl == "loss"
        return Batch(
            rollout.samples,
            rollout.logps,
            adv.WHITENINGS[options.whiten_advantages](advantages, mask),
            rollout.reference if in_loss else None,
            self.progress.kl_coef if in_loss else 0.0,
            rollout.values,
            targets,
            rollout.weights,
        )

    def _token_rewards(self, rollout: Rollout) -> Tensor:
        """r_t = credit_t - kl_coef * k1_t (arXiv:1909.08593 eq. 2), clipped or scaled: (B, T)."""
        options, mask = self.options, rollout.samples.mask
        rewards = rollout.scored.credit
        if options.kl == "reward":
            log_ratio = k1(rollout.logps, rollout.reference) * mask
            rewards = rewards - self.progress.kl_coef * log_ratio
        if options.clip_token_rewards is not None:
            rewards = rewards.clamp(-options.clip_token_rewards, options.clip_token_rewards)
        return adv.scale_only(rewards, mask) if options.whiten_rewards else rewards

    def _advantages(
        self, rewards: Tensor, values: Tensor | None, mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Advantages before whitening, and the critic's targets: (B, T) each."""
        options = self.options
        if values is not None:
            return adv.gae(rewards, values, mask, options.gamma, options.lam)
        if options.advantage == "reinforce":
            to_go = adv.rewards_to_go(rewards, mask, options.gamma)
            before = self.progress.baseline
            after = adv.running_mean(before, to_go, mask, options.baseline_decay)
            self.progress.baseline = after
            return adv.reinforce(to_go, mask, after if before is None else before), None
        estimate = {"rloo": adv.rloo, "grpo": adv.grpo}[options.advantage]
        return adv.over_tokens(estimate(rewards.sum(1), options.n), mask), None

    def _adapt(self, kl: float) -> None:
        """The next rollout's weight of the KL, where it is adaptive."""
        options = self.options
        if options.kl_target is not None:
            self.progress.kl_coef = adapted_kl_coef(
                self.progress.kl_coef,
                kl,
                options.kl_target,
                options.batch_size,
                options.kl_horizon,
            )

    def _checkpoint(self) -> None:
        journals = (self.metrics, self.samples)
        save_checkpoint(self.scratch, self.learner.accelerator, self.progress, journals)
        self.selection.forget_older(self.progress)

    def _tell(self, record: dict[str, Any]) -> None:
        """Write a record down, and warn of alarms that the one before did not have."""
        before = {_kind(alarm) for alarm in _alarms(self.progress.recent)}
        recent = [*self.progress.recent, record][-WINDOW:]
        record["alarms"] = find_alarms(recent, self.options)
        self.progress.recent = recent
        for alarm in record["alarms"]:
            if _kind(alarm) not in before:
                logger.warning("%s: update %d: %s", self.training.label, record["update"], alarm)
        self.metrics.write([record])
        numbers = {name: value for name, value in record.items() if isinstance(value, float)}
        self.learner.accelerator.log(numbers, step=record["update"])

    def _autocast(self) -> Any:
        """bfloat16 for sampling, where that is faster: on a GPU."""
        on_gpu = self.training.device.type == "cuda"
        return self.learner.accelerator.autocast() if on_gpu else contextlib.nullcontext()


def _alarms(recent: Sequence[dict[str, Any]]) -> list[str]:
    """Of the newest record."""
    return list(recent[-1]["alarms"]) if recent else []


def _kind(alarm: str) -> str:
    """What an alarm is of, without its numbers."""
    return " ".join(alarm.split()[:3])


def _mean(values: Tensor, mask: Tensor) -> float:
    """Over the tokens of the mask."""
    return float((values * mask).double().sum() / mask.sum())
