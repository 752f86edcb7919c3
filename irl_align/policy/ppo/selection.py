"""Which policy is kept: the best by held-out demonstrations, or the last valid one."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from irl_align.config.policy_update import PPOOptions
from irl_align.errors import UserError
from irl_align.models.lm_head import completion_logprobs
from irl_align.models.loading import save_model
from irl_align.models.logprobs import k1
from irl_align.models.lora import has_adapter
from irl_align.models.trl import Training
from irl_align.policy.ppo.actors import Actors
from irl_align.policy.ppo.checkpoint import Progress, checkpoints, load_checkpoint, updates_of
from irl_align.policy.ppo.faults import Diverged
from irl_align.policy.ppo.learner import Learner
from irl_align.policy.ppo.rollout import below_finished, collate, sample
from irl_align.reward.distributed import spread
from irl_align.reward.protocol import ScoreRequest
from irl_align.reward.scoring import score_tokens
from irl_align.utils import distributed
from irl_align.utils.files import SEAL, atomic_folder, seal

logger = logging.getLogger("irl_align.policy.ppo")


class Selection:
    """Compares policies on held-out demonstrations, never on gold, and saves the best."""

    def __init__(
        self, actors: Actors, learner: Learner, options: PPOOptions, training: Training
    ) -> None:
        self.actors, self.learner = actors, learner
        self.options, self.training = options, training
        self.scratch = training.work / "scratch"
        self.model = training.work / "model"
        self.demonstrated: float | None = None

    def evaluate(self, progress: Progress) -> dict[str, float]:
        """Compare held-out demonstrations with fresh samples; save the policy if it is the best.

        held_out_gap: mean reward of the demonstrations minus that of one sample per prompt, see
        reward_gap, and left out if no sample has EOS; held_out_log_prob: mean log-prob of a
        demonstration at temperature 1; held_out_kl: of the samples to the reference;
        held_out_truncated: share of samples without EOS. Every call samples with the same random
        numbers. Raises Diverged: one of them is not finite.
        """
        held_out, actors = self.actors.held_out, self.actors
        if self.demonstrated is None:
            scores = self._rewards(held_out.prompts, held_out.completions)
            self.demonstrated = mean_by_prompt(held_out.prompts, scores)
        prompts = held_out.distinct_prompts()
        sampling = replace(actors.sampling, n=1, seed=self.training.seed)
        samples = collate(prompts, sample(actors.generator, prompts, sampling))
        rewards = self._rewards(samples.prompts, samples.completions)
        logps = distributed.over_sequences(
            lambda p, c: completion_logprobs(actors.policy, p, c),
            held_out.prompts,
            held_out.completions,
        )
        packed = self.learner.pack(samples.prompts, samples.actions)
        own, _ = self.learner.infer(packed, logps=True, values=False)
        assert own is not None
        with actors.as_reference():
            reference = self.learner.logps_of(actors.reference, packed)
        kl = (k1(own, reference) * samples.mask).double().sum(1)
        report = {
            "held_out_log_prob": sum(float(row.sum(dtype="float64")) for row in logps) / len(logps),
            "held_out_kl": float(kl.mean()),
            "held_out_truncated": float(samples.truncated.double().mean()),
        }
        if self.options.missing_eos == "ignore":
            report["held_out_gap"] = self.demonstrated - float(rewards.double().mean())
        elif not bool(samples.truncated.all()):
            report["held_out_gap"] = reward_gap(self.demonstrated, rewards, samples.truncated)
        if bad := [name for name, value in report.items() if not math.isfinite(value)]:
            raise Diverged(f"update {progress.updates}: {bad[0]} is {report[bad[0]]}")
        self._save_if_best(report, progress)
        return report

    def finish(self, progress: Progress) -> int:
        """Put the policy that is kept into work/model; returns the number of its updates."""
        if self.options.keep == "last":
            self._replace_model()
            return progress.updates
        best = progress.best_update
        if best == 0:
            why = f"by {self.options.keep} no update was better than the start"
            if progress.best is None:
                why = (
                    f"{self.options.keep} could judge no policy: the KL of each was above kl_stop "
                    f"{self.options.kl_stop:g}, or none of its held-out samples had EOS"
                )
            logger.warning("%s: %s; the start is kept", self.training.label, why)
        if distributed.is_main():
            shutil.rmtree(self.model, ignore_errors=True)
            unsealed = shutil.ignore_patterns(SEAL)
            shutil.copytree(self.scratch / f"best-{best}", self.model, ignore=unsealed)
        return best

    def fall_back(self, fault: Diverged, progress: Progress) -> tuple[str, int]:
        """After a divergence keep the best policy, or else that of the last valid checkpoint.

        Returns the reason for the end and the updates of the kept policy. The best may be the
        start. A checkpoint is valid once an update on a rollout from it has succeeded. Raises
        UserError if there is no policy to keep, or if no update succeeded: the settings are wrong.
        """
        if self.options.keep != "last":
            if not progress.recent:
                raise UserError(f"PPO: {fault}; no update succeeded before it, nothing was trained")
            kept = self.finish(progress)
        else:
            folders = distributed.on_main(lambda: checkpoints(self.scratch))
            valid = [folder for folder in folders if updates_of(folder) < progress.updates]
            if not valid:
                raise UserError(f"PPO: {fault}; there is no checkpoint of an earlier policy")
            load_checkpoint(valid[-1], self.learner.accelerator)
            self.learner.publish()
            kept = updates_of(valid[-1])
            self._replace_model()
        policy = f"the policy after update {kept}" if kept else "the start"
        return f"stopped at {fault}; {policy} is kept", kept

    def forget_older(self, progress: Progress) -> None:
        """Delete best policies that the checkpoint just written does not name."""
        if not distributed.is_main():
            return
        for folder in self.scratch.glob("best-*"):
            if folder.name != f"best-{progress.best_update}":
                shutil.rmtree(folder)

    def _save_if_best(self, report: dict[str, float], progress: Progress) -> None:
        """Save the best policy so far, and the start in any case: no other may be worth keeping."""
        if self.options.keep == "last":
            return
        by_gap = self.options.keep == "reward_gap"
        result = -abs(report.get("held_out_gap", math.inf))
        result = result if by_gap else report["held_out_log_prob"]
        valid = math.isfinite(result) and report["held_out_kl"] <= self.options.kl_stop
        better = valid and (progress.best is None or result > progress.best)
        if better:
            progress.best, progress.best_update = result, progress.updates
        if not (better or progress.updates == 0) or not distributed.is_main():
            return
        folder = self.scratch / f"best-{progress.updates}"
        shutil.rmtree(folder, ignore_errors=True)
        with atomic_folder(folder) as partial:
            self._save(partial)
            seal(partial)

    def _rewards(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> Tensor:
        scores = score_tokens(spread(self.actors.reward), ScoreRequest(prompts, completions))
        return scores.rewards.float()

    def _replace_model(self) -> None:
        if distributed.is_main():
            shutil.rmtree(self.model, ignore_errors=True)
            self._save(self.model)

    def _save(self, folder: Path) -> None:
        policy, tokenizer, dtype = self.actors.policy, self.actors.tokenizer, self.actors.dtype
        if dtype == torch.float32 or has_adapter(policy):
            save_model(policy, tokenizer, folder)
            return
        weights = {name: weight.to(dtype) for name, weight in policy.state_dict().items()}
        policy.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


def reward_gap(demonstrated: float, rewards: Tensor, truncated: Tensor) -> float:
    """Demonstrations' mean reward D minus that of samples (B,), of which at least one has EOS.

    Samples without EOS widen the gap: with the mean F of the finished samples, and A of all where
    those without EOS are below the finished ones, the gap is D - F, and F - A further from 0. Where
    the samples score above the demonstrations, D - A alone would shrink with every sample that
    never stops.
    """
    finished = float(rewards[~truncated].double().mean())
    lost = finished - float(below_finished(rewards, truncated, 1.0).double().mean())
    gap = demonstrated - finished
    return gap + math.copysign(lost, gap)


def mean_by_prompt(prompts: Sequence[Sequence[int]], scores: Tensor) -> float:
    """Mean over prompts of the mean score of a prompt's demonstrations."""
    groups: dict[tuple[int, ...], list[float]] = {}
    for prompt, value in zip(prompts, scores.tolist(), strict=True):
        groups.setdefault(tuple(prompt), []).append(value)
    return sum(sum(group) / len(group) for group in groups.values()) / len(groups)
