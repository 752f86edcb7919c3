"""PPO as a policy update of the loop: pi_{k+1} maximises r_k under a KL penalty."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from irl_align.config.policy_update import PROMPT_OPTIONS, PPOOptions
from irl_align.errors import UserError
from irl_align.models.trl import Training
from irl_align.policy import Demonstrations, Policy, Reward, UpdateContext, UpdateRequest
from irl_align.policy.ppo.actors import Actors
from irl_align.policy.ppo.backbone import adapter_critic, share_backbone
from irl_align.policy.ppo.critic import make_critic
from irl_align.policy.ppo.distributed import make_accelerator
from irl_align.policy.ppo.learner import Learner
from irl_align.policy.ppo.monitors import Judge
from irl_align.policy.ppo.network import Network
from irl_align.policy.ppo.trainer import PPOTrainer
from irl_align.policy.roles import Role, signs_key
from irl_align.reward.protocol import RewardFunction
from irl_align.utils.hardware import use_bf16

logger = logging.getLogger("irl_align.policy.ppo")


@dataclass(frozen=True)
class PPO:
    """pi_{k+1} from PPO on the demonstrations' prompts, with one reward from start to end.

    held_out: demonstrations of other prompts, which choose the best policy; judge: gold
    metrics of the rollouts, for reporting only; gold: import path of the gold metric.
    """

    options: PPOOptions
    held_out: Demonstrations
    judge: Judge | None = None
    gold: str | None = None

    def __call__(self, context: UpdateContext, request: UpdateRequest) -> Policy:
        """Train pi_k (or pi_0) in one stage, which resumes from its own checkpoints."""
        options, reward = self.options, request.reward
        if reward is None:
            raise UserError("policy_update.kind: ppo needs a reward")
        start = request.policy if options.start == "current" else request.initial
        reference = request.policy if options.reference == "current" else request.initial
        wanted = context.sampler.sampling(options.n, options.temperature)
        sampling = wanted.all_tokens  # what rollouts are drawn with

        def build(work: Path) -> dict[str, Any]:
            if not request.demonstrations.prompts:
                raise UserError("PPO: there are no prompts to roll out; expected at least one")
            if not self.held_out.prompts:
                raise UserError("PPO: there are no held-out demonstrations; raise data.held_out")
            if sampling != wanted:
                logger.warning(
                    "PPO %d: generation.top_p %g and top_k %d are not used: ratios and KL need "
                    "samples of the whole policy",
                    request.iteration,
                    wanted.top_p,
                    wanted.top_k,
                )
            actors = self._actors(context, request, start, reference, reward)
            training = context.training(work, f"PPO {request.iteration}")
            return train_ppo(actors, options, training)

        stage = context.stage(
            request.role,
            "ppo",
            {
                "sampling": vars(sampling),
                "options": options.model_dump(exclude=PROMPT_OPTIONS),
                "iteration": request.iteration,
                "gold": self.gold,
                **context.models.adapted,
            },
            {
                "start": start.key,
                "reference": reference.key,
                "reward": reward.key,
                "demonstrations": request.demonstrations.checksum,
                "held_out": self.held_out.checksum,
            },
            build,
        )
        history = stage.metrics.get("history")
        summary = {name: value for name, value in stage.metrics.items() if name != "history"}
        last = history[-1] if history else None
        context.log(Role.ppo(request.iteration), {**summary, "last": last})
        if last is not None:
            signs = Role.parse(signs_key("ppo", request.iteration))
            context.log(signs, {"signs": last["alarms"]})
        return Policy(stage.path / "model", stage.key)

    def _actors(
        self,
        context: UpdateContext,
        request: UpdateRequest,
        start: Policy,
        reference: Policy,
        reward: Reward,
    ) -> Actors:
        """Load the models; policy and reference become float32 unless their weights have 4 bits."""
        options, models = self.options, context.models
        model = models.load_trainable(start.path)
        stored = model.dtype
        model = _float32(model)
        backbone = None
        if options.backbone == "shared":
            backbone = share_backbone(model, start.path, reference.path, reward.path)
        return Actors(
            policy=model,
            reference=model if backbone else self._reference(context, reference),
            reward=backbone.reward if backbone else self._reward(context, reward),
            generator=context.sampler.generator(model),
            tokenizer=context.tokenizer,
            prompts=request.demonstrations.distinct_prompts(),
            held_out=self.held_out,
            sampling=context.sampler.sampling(options.n, options.temperature),
            starts_at_reference=start.key == reference.key,
            judge=self.judge,
            backbone=backbone,
            dtype=stored,
        )

    def _reference(self, context: UpdateContext, reference: Policy) -> PreTrainedModel:
        """The reference in the policy's precision: in another it would be another function."""
        return _float32(context.models.load_policy(reference.path)).requires_grad_(False)

    def _reward(self, context: UpdateContext, reward: Reward) -> RewardFunction:
        """The reward; its adapter is not merged if a critic starts from it and trains it."""
        merge = self.options.advantage != "gae" or self.options.critic_init != "reward"
        return context.models.load_reward(reward, merge)


def _float32(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float32; a 4-bit model is not changed."""
    return model if getattr(model, "is_quantized", False) else model.float()


def train_ppo(actors: Actors, options: PPOOptions, training: Training) -> dict[str, Any]:
    """Train actors.policy in place; the selected policy, metrics and samples go to training.work.

    Returns the training's metrics; `history` has one record per update.
    Raises UserError: the tokenizer's pad token is missing or equals its EOS.
    """
    pad, eos = actors.tokenizer.pad_token_id, actors.tokenizer.eos_token_id
    if pad is None or pad == eos:
        raise UserError(
            f"PPO: the tokenizer's pad token is {pad} and its EOS {eos}; expected a pad token of "
            "its own, or the end of a completion cannot be told from padding"
        )
    if actors.backbone is not None:
        critic = adapter_critic(options, actors.policy, actors.backbone)
    else:
        critic = make_critic(options, actors.policy, actors.reward, actors.tokenizer)
    trackers: dict[str, Any] = {}
    if training.report_to:
        folder = str(training.tensorboard or training.work / "tensorboard")
        trackers = {"log_with": list(training.report_to), "project_dir": folder}
    bf16 = use_bf16(options.bf16, training.device.type == "cpu")
    accelerator = make_accelerator(training.device, bf16, **trackers)
    if training.report_to:
        accelerator.init_trackers(training.run_name or "ppo")
    network = Network(actors.policy, critic, options.temperature)
    learner = Learner(network, options, training.device, training.seed, int(pad), accelerator)
    metrics = PPOTrainer(actors, learner, options, training).run()
    for tracker in accelerator.trackers:
        tracker.finish()  # end_training would end the process group, which vLLM's here is too
    actors.policy.eval()
    return metrics
