"""The recipe: one tree of options, each documented once, next to its field.

The groups of options have modules of their own. :mod:`irl_align.config.recipe` reads recipes from
YAML and explains mistakes. The ``args`` fields pass options to TRL's trainers under TRL's names.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from irl_align.config.data import DataOptions
from irl_align.config.generation import GenerationOptions
from irl_align.config.loop import EvaluationOptions, LoopOptions
from irl_align.config.model import ModelOptions, SFTOptions
from irl_align.config.policy_update import (
    BestOfNOptions,
    PolicyPromptOptions,
    PolicyUpdateOptions,
    PPOOptions,
)
from irl_align.config.reward import PairOptions, RewardOptions
from irl_align.config.types import Options, PathText


class Recipe(Options):
    """Everything that determines a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run. Its folder is output_dir/NAME-seedSEED."""
    description: str = ""
    """What the recipe is for, and the numbers it is expected to reach."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of all random numbers."""
    output_dir: PathText = "runs"
    """Folder of the runs and of the store of stages that they share."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Trackers: tensorboard, wandb, trackio. They receive the trainers' losses and the loop's
    numbers for every policy: KL, entropy, gold, pairs and reward."""
    data: DataOptions
    """Demonstrations."""
    model: ModelOptions
    """Start model."""
    sft: SFTOptions = SFTOptions()
    """Supervised fine-tuning."""
    generation: GenerationOptions = GenerationOptions()
    """Sampling."""
    pairs: PairOptions = PairOptions()
    """Pairs."""
    reward: RewardOptions = RewardOptions()
    """Reward level."""
    policy_update: PolicyUpdateOptions = Field(
        default=BestOfNOptions(kind="best_of_n"), union_mode="smart"
    )
    """Policy level."""
    loop: LoopOptions = LoopOptions()
    """Outer loop."""
    evaluation: EvaluationOptions = EvaluationOptions()
    """Evaluation."""

    @model_validator(mode="after")
    def _groups_agree(self) -> Recipe:
        problem = (
            self._lora_problem()
            or self._quantization_problem()
            or self._reward_adapter_problem()
            or self._data_problem()
            or (self._loop_problem() if self.loop.iterations else None)
        )
        if problem is not None:
            raise ValueError(problem)
        return self

    def _lora_problem(self) -> str | None:
        lora, sft = self.model.lora, self.sft
        if sft.full and lora is None:
            return "sft.full is an option of model.lora: without it SFT trains all weights anyway"
        if lora is not None and self.model.from_scratch is not None and not sft.full:
            return "model.lora needs a trained model: with model.from_scratch give sft.full"
        if getattr(self.policy_update, "backbone", "separate") == "shared":
            absent = "model.lora" if lora is None else "reward.lora"
            if lora is None or self.reward.lora is None:
                return f"policy_update.backbone shared needs adapters on one model: give {absent}"
        return None

    def _quantization_problem(self) -> str | None:
        if self.model.quantization is None:
            return None
        if self.model.lora is None:
            return "model.quantization needs model.lora: weights of 4 bits are not trained"
        if self.sft.full:
            return "sft.full trains all weights, but model.quantization leaves none to train"
        if self.generation.backend.startswith("vllm"):
            return (
                f"generation.backend {self.generation.backend} does not sample the 4-bit model "
                "of model.quantization: use transformers"
            )
        return None

    def _reward_adapter_problem(self) -> str | None:
        """The reward's adapter starts from SFT's adapter, so both need the same shape."""
        lora, reward = self.model.lora, self.reward.lora
        if lora is None or reward is None or not self.sft.enabled or self.sft.full:
            return None
        for name in ("r", "lora_alpha", "target_modules", "use_rslora"):
            if getattr(reward, name) != getattr(lora, name):
                return (
                    f"reward.lora.{name} is {getattr(reward, name)}, but the reward starts from "
                    f"SFT's adapter, whose {name} is {getattr(lora, name)}: give the same value, "
                    "or sft.full"
                )
        return None

    def _data_problem(self) -> str | None:
        update, generation = self.policy_update, self.generation
        edited = isinstance(update, PolicyPromptOptions) and update.edited_prompts > 0
        if self.data.edit is not None and not edited and self.pairs.contrast != "edit":
            return (
                "data.edit is for pairs.contrast edit and policy_update.edited_prompts, "
                "but neither is set"
            )
        whole = generation.top_p == 1.0 and generation.top_k == 0
        if self.evaluation.match_entropy and not whole:
            return (
                "evaluation.match_entropy compares entropies of whole distributions: expected "
                "generation.top_p 1 and generation.top_k 0 with it"
            )
        return None

    @property
    def offset(self) -> str:
        """reward.offset, or what its null stands for."""
        reward, update = self.reward, self.policy_update
        if reward.offset is not None:
            return reward.offset
        trains = isinstance(update, BestOfNOptions) and update.use != "select"
        from_start = isinstance(update, PPOOptions) and update.reference == "initial"
        possible = reward.kind == "explicit" and reward.loss == "bradley_terry"
        return "log_ratio" if possible and (trains or from_start) else "none"

    def contradictions(self) -> list[str]:
        """Settings of several iterations under which the loop leaves the demonstrations, and why.

        They are allowed, because papers use them. tests/integration/test_oracle.py computes them.
        """
        reward, update = self.reward, self.policy_update
        leashed = isinstance(update, PPOOptions) and update.reference == "initial"
        moves = isinstance(update, BestOfNOptions | PPOOptions)
        if reward.kind != "explicit" or self.loop.iterations < 2 or not moves:
            return []
        if self.offset != "none":
            if not (isinstance(update, PPOOptions) and update.kl_coef > reward.beta):
                return []
            return [
                f"policy_update.kl_coef {update.kl_coef:g} is above reward.beta {reward.beta:g}: "
                "the policy stops between pi_0 and the demonstrations"
            ]
        if leashed:
            return [
                "policy_update.reference initial with reward.offset none: each reward is relative "
                "to the samples that it was fitted on, so that under a penalty to pi_0 it undoes "
                "what earlier iterations learned; set reward.offset log_ratio, or reference current"
            ]
        if self.pairs.window != "latest":
            return [
                f"pairs.window {self.pairs.window} with reward.offset none: the reward is relative "
                "to a mixture of policies, and the step from the current one goes too far; set "
                "reward.offset, or pairs.window latest"
            ]
        return []

    def _offset_problem(self) -> str | None:
        """What contradicts a cumulative reward, which is relative to pi_0."""
        offset, update = self.offset, self.policy_update
        if offset != "none" and getattr(update, "reference", "initial") == "current":
            return (
                f"reward.offset {offset} accumulates the reward from pi_0 on, but "
                "policy_update.reference is current, which would count it twice: use initial"
            )
        if offset == "log_ratio" and getattr(update, "use", None) == "select":
            return (
                "reward.offset log_ratio needs log pi_k, but policy_update.use select makes "
                "policies without log-probs: use offset reward"
            )
        return None

    def _ratio_problem(self) -> str | None:
        """What contradicts an implicit reward, or an update that needs one."""
        reward, update = self.reward, self.policy_update
        fitted = reward.kind == "implicit" and reward.numerator == "fitted"
        if update.kind == "identity" and not fitted:
            return (
                "policy_update.kind identity takes the model that the fit of an implicit reward "
                "has trained: expected reward.kind implicit with numerator fitted"
            )
        if reward.kind != "implicit":
            return None
        name = reward.first_set("endogenous", "mean")
        if update.kind == "identity" and name:
            return f"reward.{name} has no effect with policy_update.kind identity"
        models = [reward.numerator, reward.reference]
        if "checkpoint" in models and self.sft.checkpoint is None:
            return "reward compares SFT's checkpoint, but sft.checkpoint is null: give a share"
        same = {"previous": "initial", "mixture": "initial", "older": "start"}  # in iteration 0
        first = {same.get(model, model) for model in models}
        if len(first) == 1 or (first == {"initial", "start"} and not self.sft.enabled):
            return (
                f"reward.numerator {models[0]} and reward.reference {models[1]} are the same model "
                "in iteration 0: the reward is 0"
            )
        if isinstance(update, PPOOptions):
            if update.credit == "abc" or update.eos_prefixes:
                name = "credit abc" if update.credit == "abc" else "eos_prefixes"
                return f"policy_update.{name} needs an explicit reward: use credit red or sparse"
            if (update.advantage, update.critic, update.critic_init) == (
                "gae",
                "separate",
                "reward",
            ):
                return "policy_update.critic_init reward needs an explicit reward: use zero"
        return None

    def _loop_problem(self) -> str | None:
        kind, update = self.reward.kind, self.policy_update.kind
        credit = getattr(self.policy_update, "credit", None)
        if self.reward.echo and credit in ("red", "abc"):
            return f"reward.echo gives no rewards of prefixes, which credit {credit} needs"
        if self.loop.iterations > 1 and (problem := self._offset_problem()):
            return problem
        if problem := self._ratio_problem():
            return problem
        if kind in ("none", "functions") and self.loop.pick == "nearest":
            return f"loop.pick nearest needs a learned reward, but reward.kind is {kind}"
        if kind == "none" and update in ("best_of_n", "ppo"):
            return f"policy_update.kind {update} needs a reward, but reward.kind is none"
        return self._composition_problem()

    def _composition_problem(self) -> str | None:
        """Functions and ensembles, where the policy update has no use for them."""
        reward, update = self.reward, self.policy_update
        if reward.functions and update.kind in ("identity", "sft", "iqlearn"):
            return f"policy_update.kind {update.kind} does not read reward.functions"
        if not isinstance(update, PPOOptions):
            return None
        if reward.kind == "functions" and update.credit != "sparse":
            return (
                f"policy_update.credit {update.credit} distributes the learned part of a reward, "
                "and reward.kind functions has none: use sparse"
            )
        name = "functions" if reward.functions else "ensemble"
        composed = bool(reward.functions or reward.ensemble)
        if composed and update.backbone == "shared":
            return f"reward.{name} does not go with policy_update.backbone shared: use separate"
        if composed and update.critic_init == "reward":
            return f"reward.{name} does not go with policy_update.critic_init reward: use zero"
        return None
