"""The loop of PPO: roll out, score, estimate advantages, update; watch, checkpoint, resume.

B is the number of samples in a rollout.
"""

from __future__ import annotations

import contextlib
import logging
import time
from contextlib import AbstractContextManager
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
    retry_once,
    save_checkpoint,
)
from irl_align.policy.ppo.faults import Diverged, LogProbGap
from irl_align.policy.ppo.learner import Learner, UpdateBatch
from irl_align.policy.ppo.losses import adapted_kl_coef, explained_variance, truncated_weights
from irl_align.policy.ppo.monitors import (
    WINDOW,
    find_alarms,
    gold_report,
    rollout_report,
    sample_rows,
    sampler_report,
)
from irl_align.policy.ppo.rollout import Rollout, RolloutBatch, draw, score
from irl_align.policy.ppo.selection import Selection
from irl_align.reward.composed import FunctionError
from irl_align.utils import distributed

logger = logging.getLogger("irl_align.policy.ppo")


class PPOTrainer:
    """One PPO training in a stage's folder; `run` resumes from the last checkpoint there."""

    def __init__(
        self, actors: Actors, learner: Learner, options: PPOOptions, training: Training
    ) -> None:
        self.actors, self.learner = actors, learner
        self.options, self.training = options, training
        self.selection = Selection(actors, learner, options, training)
        self.progress = Progress(kl_coef=options.kl_coef)
        self.scratch = training.work / "scratch"
        # The sampler's log-probs are the learner's unless autocast rounded them or another engine
        # computed them; then the learner computes its own.
        same_engine = isinstance(actors.generator, TransformersGenerator)
        self.own_logps = same_engine and not learner.bf16

    def run(self) -> dict[str, Any]:
        """Train to the end or to a stop, and leave the policy that is kept in work/model.

        Raises UserError if a rollout cannot be scored, or if training diverged and there is no
        policy to keep; TryAgain if it diverged for the first time since the last checkpoint.
        """
        self.scratch.mkdir(parents=True, exist_ok=True)
        checkpoint = distributed.on_main(lambda: last_checkpoint(self.scratch))
        if checkpoint is not None:
            self.progress = load_checkpoint(checkpoint, self.learner.accelerator)
            self.learner.publish()
            logger.info("%s: resuming from %s", self.training.label, checkpoint.name)
        progress, work = self.progress, self.training.work
        self.metrics = Journal(work / "metrics.jsonl", checkpoint)
        self.samples = Journal(work / "samples.jsonl", checkpoint)
        ended = f"{self.options.updates} updates done"
        start: dict[str, Any] = {}
        try:
            if progress.updates == 0:
                start = self.selection.evaluate(progress)
            self._updates()
            kept = self.selection.finish(progress)
        except Diverged as fault:
            retry_once(self.scratch, str(fault))
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
        """All updates that are left, each with its record, evaluation and checkpoint."""
        total, batch = self.options.updates, self.options.batch_size
        done = self.progress.updates
        label = self.training.label
        with tqdm(total=total * batch, initial=done * batch, desc=label, unit="sample") as bar:
            for number in range(done, total):
                record = self._update(number)
                self.progress.updates = number + 1
                last = number + 1 == total
                if last or (number + 1) % self.options.evaluate_every == 0:
                    record.update(self.selection.evaluate(self.progress))
                self._record(record)
                if not last and (number + 1) % self.options.checkpoint_every == 0:
                    journals = (self.metrics, self.samples)
                    save_checkpoint(self.scratch, self.learner.accelerator, self.progress, journals)
                    self.selection.forget_older(self.progress)
                shown = {name: f"{record[name]:.3g}" for name in ("reward", "kl", "length")}
                bar.set_postfix(shown, refresh=False)
                bar.update(batch)

    def _update(self, number: int) -> dict[str, Any]:
        """One rollout and the update on it; returns the update's record.

        Raises Diverged for an update that cannot be made. What is a mistake of the user's in the
        first update is a divergence in a later one.
        """
        try:
            return self._roll_out_and_learn(number)
        except UserError as error:
            if number == 0 or isinstance(error, FunctionError):
                raise
            raise Diverged(f"update {number + 1}: {error}") from error

    def _roll_out_and_learn(self, number: int) -> dict[str, Any]:
        actors, options = self.actors, self.options
        clock = [time.perf_counter()]
        with self._autocast():
            samples = draw(
                actors.generator,
                actors.prompts,
                actors.sampling,
                self.training.seed,
                number,
                options.batch_size,
            )
        clock.append(time.perf_counter())
        rollout = self._score(number, samples)
        report = self._report(rollout)
        self._check_kl(number, rollout, report["kl"])
        batch = self._batch(rollout)
        clock.append(time.perf_counter())
        report.update(self.learner.update(number, batch))
        self.learner.publish()
        if self.own_logps:  # the first minibatch has computed the sampler's log-probs again
            for name in ("log_ratio", "log_ratio_max"):
                report[f"sampler_{name}"] = report[f"first_{name}"]
        clock.append(time.perf_counter())
        if batch.old_values is not None and batch.targets is not None:
            kept = samples.mask.bool()
            report["explained_variance"] = explained_variance(
                batch.old_values[kept], batch.targets[kept]
            )
        if options.kl_target is not None:
            self.progress.kl_coef = adapted_kl_coef(
                self.progress.kl_coef,
                report["kl"],
                options.kl_target,
                options.batch_size,
                options.kl_horizon,
            )
        self.samples.write(
            sample_rows(
                number + 1, rollout, batch.advantages, actors.tokenizer, options.samples_kept
            )
        )
        names = ("seconds_generate", "seconds_score", "seconds_update")
        spent = {n: end - begin for n, begin, end in zip(names, clock, clock[1:], strict=False)}
        gold = distributed.on_main(lambda: gold_report(actors.judge, samples, actors.tokenizer))
        done = (number + 1) * options.batch_size
        return {"update": number + 1, "episodes_done": done, **report, **gold, **spent}

    def _score(self, number: int, samples: RolloutBatch) -> Rollout:
        """Passes of reward, reference and critic, and of the policy if the sampler's log-probs are
        not the learner's."""
        draws = torch.Generator().manual_seed(self.training.seed + number)
        scores = score(samples, self.actors.reward, self.actors.policy, self.options, draws)
        packed = self.learner.pack(samples.prompts, samples.actions)
        critic = self.options.advantage == "gae"
        logps, values = None, None
        if critic or not self.own_logps:
            logps, values = self.learner.infer(packed, logps=not self.own_logps, values=critic)
        with self.actors.as_reference():
            reference = self.learner.logps_of(self.actors.reference, packed)
        weights = None
        if logps is not None and self.options.importance_weights == "truncated":
            weights = truncated_weights(logps, samples.logps, self.options.importance_cap)
        logps = samples.logps if logps is None else logps
        return Rollout(samples, scores, packed, logps, reference, values, weights)

    def _report(self, rollout: Rollout) -> dict[str, float]:
        """Numbers of a rollout before the update."""
        slots = sum(distributed.gather(sum(batch.slots for batch in rollout.packed.whole)))
        report = rollout_report(rollout)
        if not self.own_logps:  # otherwise the first minibatch will measure the gap
            report |= sampler_report(rollout, self.options.importance_cap)
        report["padding"] = 1.0 - rollout.packed.tokens / slots
        report["kl_coef"] = self.progress.kl_coef
        return report

    def _check_kl(self, number: int, rollout: Rollout, kl: float) -> None:
        """Raise Diverged for a KL above kl_stop, and UserError if the KL should be 0 and is not."""
        if not kl <= self.options.kl_stop:
            raise Diverged(
                f"update {number + 1}: KL to the reference is {kl:.2f} nats per completion, above "
                f"kl_stop {self.options.kl_stop:g}; raise kl_coef or lower learning_rate"
            )
        if number == 0 and self.actors.starts_at_reference:
            mask = rollout.samples.mask
            gaps = (rollout.logps - rollout.reference_logps).abs() * mask
            gap = LogProbGap(float(gaps.double().sum() / mask.sum()), float(gaps.max()))
            if difference := gap.beyond_rounding(self.learner.bf16):
                raise UserError(
                    "PPO: the policy and its reference are the same model, but their log-probs "
                    f"differ {difference}"
                )

    def _batch(self, rollout: Rollout) -> UpdateBatch:
        """Whitened advantages, and all other arrays that the update reads."""
        mask, options = rollout.samples.mask, self.options
        rewards = self._token_rewards(rollout)
        advantages, targets = self._advantages(rewards, rollout.values, mask)
        in_loss = options.kl != "reward"
        return UpdateBatch(
            rollout.packed,
            rollout.logps,
            adv.WHITENINGS[options.whiten_advantages](advantages, mask),
            reference_logps=rollout.reference_logps if in_loss else None,
            kl_coef=self.progress.kl_coef if in_loss else 0.0,
            old_values=rollout.values,
            targets=targets,
            weights=rollout.weights,
        )

    def _token_rewards(self, rollout: Rollout) -> Tensor:
        """Credit minus the KL penalty, clipped or scaled: (B, T)."""
        options, mask = self.options, rollout.samples.mask
        rewards = rollout.scores.credit
        if options.kl == "reward":
            # arXiv:1909.08593 eq. 2: r_t = credit_t - kl_coef * k1_t
            log_ratio = k1(rollout.logps, rollout.reference_logps) * mask
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

    def _record(self, record: dict[str, Any]) -> None:
        """Write an update's record, and log alarms that the previous record did not have."""
        recent = self.progress.recent
        before = {_kind(alarm) for alarm in (recent[-1]["alarms"] if recent else ())}
        recent = self.progress.recent = [*recent, record][-WINDOW:]
        record["alarms"] = find_alarms(recent, self.options)
        for alarm in record["alarms"]:
            if _kind(alarm) not in before:
                logger.warning("%s: update %d: %s", self.training.label, record["update"], alarm)
        self.metrics.write([record])
        numbers = {name: value for name, value in record.items() if isinstance(value, float)}
        self.learner.accelerator.log(numbers, step=record["update"])

    def _autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 for sampling on a GPU, where it is faster."""
        if self.training.device.type != "cuda":
            return contextlib.nullcontext()
        accelerator: Any = self.learner.accelerator
        context: AbstractContextManager[Any] = accelerator.autocast()
        return context


def _kind(alarm: str) -> str:
    """The kind of an alarm: its first words, which hold no numbers."""
    return " ".join(alarm.split()[:3])
