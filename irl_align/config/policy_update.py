"""The options of every policy update, the recipe's ``policy_update``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from irl_align.config.types import (
    Above,
    AtLeast,
    Count,
    ImportPath,
    Options,
    PathText,
    Positive,
    Share,
)


class PolicyPromptOptions(Options):
    """What the prompts of the policy level are, beside those of the demonstrations."""

    edited_prompts: Count = 0
    """Every prompt brings one more without a demonstration, by so many of the card's edits in a
    row; 0: none. Those that any split of the data asks for are left out."""
    prompts_from: PathText | None = None
    """File of prompts without demonstrations, in the card's prompt column: jsonl, json, csv,
    parquet or .gz."""


PROMPT_OPTIONS = set(PolicyPromptOptions.model_fields)
"""What they add is in Demonstrations.checksum, so that keys of stages leave their names out."""


class BestOfNOptions(PolicyPromptOptions):
    """Best-of-N: sample N completions per prompt, score them, use the best."""

    kind: Literal["best_of_n"]
    """Name of the update."""
    n: Annotated[int, Field(ge=2)] = 8
    """Samples per prompt."""
    use: Literal["select", "sft", "dpo"] = "sft"
    """select: the policy stays, its samples are ranked when it is used; sft: fine-tune on the best;
    dpo: train best against worst."""
    score: Literal["reward", "logprob", "both"] = "reward"
    """Rank by the reward, by the policy's mean log-prob, or by their standardised sum."""
    keep: Positive = 1
    """So many of each prompt's best are trained on; with use=dpo, against as many of the worst."""
    prompts: Positive | None = None
    """Prompts that are sampled, chosen by hash; null is all of the reward's prompts."""
    temperature: Above = 1.0
    """Sampling temperature of the N candidates."""
    start: Literal["current", "initial"] = "current"
    """Model that is fine-tuned: pi_k or pi_0."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Fields of trl.SFTConfig (use=sft) or trl.DPOConfig (use=dpo)."""

    @model_validator(mode="after")
    def _consistent(self) -> BestOfNOptions:
        if self.keep > self.n:
            raise ValueError(f"keep {self.keep} is more than n {self.n}")
        if self.use == "select" and self.args:
            raise ValueError("args are for use sft or dpo: select trains nothing")
        if self.use == "select" and (self.edited_prompts or self.prompts_from):
            raise ValueError(
                "edited_prompts, prompts_from are for use sft or dpo: select only ranks"
            )
        if self.use == "select" and self.keep != 1:
            raise ValueError("keep is for use sft or dpo: select keeps the best one")
        if self.use == "dpo" and 2 * self.keep > self.n:
            raise ValueError(f"keep {self.keep} best and as many worst are more than n {self.n}")
        return self


class IdentityOptions(Options):
    """No policy step of its own: fitting the implicit reward has moved the policy (SPIN)."""

    kind: Literal["identity"]
    """Name of the update."""


class MoreSFTOptions(Options):
    """Control: go on with SFT on the demonstrations, no reward."""

    kind: Literal["sft"]
    """Name of the update."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Fields of trl.SFTConfig."""


class IQLearnOptions(Options):
    """Baseline: offline IQLearn on the demonstrations (arXiv:2409.01369), no reward model."""

    kind: Literal["iqlearn"]
    """Name of the update."""
    coef: AtLeast = 0.1
    """Weight of the square of the reward that the policy's logits imply; 0 is SFT."""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Discount of the next token's value."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Fields of trl.SFTConfig."""

    @model_validator(mode="after")
    def _own_loss(self) -> IQLearnOptions:
        for name in ("loss_type", "label_smoothing_factor"):
            if name in self.args:
                raise ValueError(f"args.{name} is of another loss: iqlearn has its own")
        return self


DENSE = ("uniform", "red", "abc", "abc_policy", "random")
"""Kinds of credit that put a reward on every token."""


class PPOOptions(PolicyPromptOptions):
    """PPO with token-level credit (arXiv:1707.06347, 2403.17031, 2411.08302, 2402.00782)."""

    kind: Literal["ppo"]
    """Name of the update."""
    # --- what is maximised
    credit: Literal["sparse", "uniform", "red", "abc", "abc_policy", "random"] = "sparse"
    """How a completion's reward R is put on its tokens: all on the last; alike on all; differences
    of the reward of prefixes (red); by the reward's (abc) or the policy's attention (abc_policy,
    one more pass of the policy over each rollout); at random, the control of abc. Only sparse and
    red keep the policy gradient under gae."""
    beta: Share = 0.8
    """With credit abc, abc_policy, random: share of R that is split; the rest is on the last
    token."""
    beta_c: AtLeast = 1.0
    """With credit red: scale of the potential."""
    dynamic_initialisation: bool = True
    """With credit red: the reward of the empty completion is the potential of the start, not 0."""
    eos_prefixes: bool = False
    """With credit red: prefixes are scored with EOS appended, for heads trained at EOS only. It
    doubles a completion's positions in the reward's pass: scoring took about 1.85 times as long as
    sparse, at 0.95 times the memory (tests/benchmarks/credit.py, a loaded AMD EPYC)."""
    concentration: Above = 1.0
    """With credit random: of the Dirichlet distribution."""
    missing_eos: Literal["replace", "subtract", "ignore"] = "replace"
    """A sample without EOS: its R becomes missing_eos_value, loses that much, or stays."""
    missing_eos_value: float | None = None
    """Null: -1 with replace, 1 with subtract."""
    clip_reward: Above | None = None
    """Largest |R|, before credit."""
    center_rewards: bool = False
    """With advantage gae or reinforce: take the rollout's mean R off every R before credit. It
    orders no completions anew, but where credit biases rewards-to-go (uniform, abc, random) the
    sign of R decides whether a longer completion pays."""
    clip_token_rewards: Above | None = None
    """Largest |r_t| of credit and KL together; with credit sparse only."""
    whiten_rewards: bool = False
    """Divide token rewards by their standard deviation; with credit sparse only."""
    kl: Literal["reward", "loss"] = "reward"
    """Leash to the reference: -kl_coef * k1 in each token's reward, or kl_coef * k3 in the loss."""
    kl_coef: AtLeast = 0.05
    """Its weight, where it is adaptive the first one."""
    kl_target: Above | None = None
    """Adaptive weight (arXiv:1909.08593): the KL per completion, in nats, that is aimed at."""
    kl_horizon: Positive = 10_000
    """With kl_target: at its fastest the weight changes by a fifth over so many episodes."""
    reference: Literal["initial", "current"] = "initial"
    """The leash's other end: pi_0, or pi_k, where this update starts."""
    # --- advantages
    advantage: Literal["gae", "rloo", "grpo", "reinforce"] = "gae"
    """Generalised advantages with a critic; leave-one-out or group-normalised sums over n samples
    of a prompt; rewards-to-go less their running mean."""
    n: Positive = 1
    """Samples per prompt in a rollout; rloo and grpo need 2 or more."""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Discount, with advantage gae or reinforce."""
    lam: Share = 0.95
    """Lambda of gae."""
    baseline_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """With advantage reinforce: decay of the running mean, per update."""
    whiten_advantages: Literal["standardize", "scale_only", "none"] = "standardize"
    """Over all tokens of a rollout: mean 0 and variance 1, variance 1 alone, or as they are."""
    # --- critic, with advantage gae
    critic: Literal["separate", "shared"] = "separate"
    """A model of its own, or a head on the policy's trunk."""
    critic_init: Literal["reward", "zero"] = "zero"
    """Separate critic: the reward model, whose values are its prefix scores, or pi_k's trunk with a
    head of zeros."""
    critic_learning_rate: Above | None = None
    """Null: learning_rate."""
    vf_coef: AtLeast = 0.1
    """Weight of the value loss."""
    value_clip: Above | None = 0.2
    """Largest move of a value that its loss rewards; null is off."""
    # --- sampling
    episodes: Positive = 20_000
    """Samples drawn in all."""
    batch_size: Positive = 512
    """Samples per rollout, a multiple of n; each rollout is followed by one update."""
    temperature: Above = 1.0
    """Of sampling, and of the log-probs of policy and reference alike."""
    importance_weights: Literal["off", "truncated"] = "off"
    """Of a sampler whose log-probs are not the learner's (vLLM, bf16, top-p): truncated weighs the
    policy loss of each token by pi_learner / pi_sampler, at most importance_cap."""
    importance_cap: Above = 2.0
    """With importance_weights truncated: the largest weight."""
    sampler_gap_alarm: Above = 0.05
    """Mean |log pi_learner - log pi_sampler| per token above which a warning is told."""
    # --- the update
    start: Literal["current", "initial"] = "current"
    """Model that is trained: pi_k or pi_0."""
    epochs: Positive = 4
    """Passes over a rollout."""
    minibatches: Positive = 1
    """Optimiser steps per epoch."""
    clip: Above = 0.2
    """Largest move of the ratio that the loss rewards."""
    entropy_coef: AtLeast = 0.0
    """Weight of the entropy bonus."""
    learning_rate: Above = 3e-6
    """Of AdamW (eps 1e-5)."""
    lr_schedule: Literal["linear", "constant"] = "linear"
    """Linear to 0 over the updates, or constant."""
    weight_decay: AtLeast = 0.0
    """Of AdamW."""
    max_grad_norm: Above = 1.0
    """Of policy and critic, each by itself."""
    epoch_kl: Above | None = 0.05
    """An update's epochs end when its own mean KL per token (k3) passes this; null is off."""
    max_batch_tokens: Positive = 16_384
    """Tokens in one forward pass; the gradient does not depend on it."""
    bf16: bool = False
    """Autocast to bfloat16; weights, log-softmax, differences and advantages stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    backbone: Literal["separate", "shared"] = "separate"
    """Policy, reference, reward and critic as models of their own or, with model.lora and
    reward.lora, as adapters of one model in memory."""
    # --- which policy is kept, and when to stop
    keep: Literal["reward_gap", "log_prob", "last"] = "reward_gap"
    """The best policy by held-out demonstrations: its samples' mean reward nearest theirs, or their
    log-prob highest; or the last."""
    evaluate_every: Positive = 10
    """Updates between two looks at held-out demonstrations."""
    held_out_prompts: Positive = 128
    """At most so many held-out prompts."""
    kl_alarm: Above = 10.0
    """KL to the reference per completion, in nats, above which a warning is told."""
    kl_stop: Above = 50.0
    """... above which training stops, and a policy before it is kept."""
    checkpoint_every: Positive = 10
    """Updates between two checkpoints, from which a killed run goes on."""
    samples_kept: Count = 4
    """Samples per update that are stored with their tokens' credit."""

    @property
    def eos_value(self) -> float:
        """missing_eos_value, or its default."""
        if self.missing_eos_value is not None:
            return self.missing_eos_value
        return -1.0 if self.missing_eos == "replace" else 1.0

    @property
    def updates(self) -> int:
        """Rollouts, each followed by an update."""
        return -(-self.episodes // self.batch_size)

    @model_validator(mode="after")
    def _credit_composes(self) -> PPOOptions:
        if self.credit in DENSE:
            if self.advantage in ("rloo", "grpo"):
                raise ValueError(
                    f"credit {self.credit} cancels under advantage {self.advantage}, which takes "
                    "sums over completions: use gae or reinforce, or credit sparse"
                )
            for name in ("whiten_rewards", "clip_token_rewards"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} does not go with credit {self.credit}: it would change what a "
                        "completion's tokens sum to; use clip_reward, or credit sparse"
                    )
        if self.advantage == "grpo" and self.kl == "reward":
            raise ValueError(
                "advantage grpo divides by each prompt's deviation, and kl reward would be "
                "rescaled with it: use kl loss"
            )
        if self.kl_target is not None and self.kl_coef == 0.0:
            raise ValueError("kl_target multiplies kl_coef, which is 0: give a kl_coef above 0")
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> PPOOptions:
        if self.advantage in ("rloo", "grpo") and self.n < 2:
            raise ValueError(f"n is {self.n}, but advantage {self.advantage} needs 2 or more")
        if self.batch_size % self.n:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of n {self.n}")
        if self.minibatches > self.batch_size:
            raise ValueError(
                f"minibatches {self.minibatches} are more than batch_size {self.batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _options_are_read(self) -> PPOOptions:
        def only(holds: bool, of: str, *names: str) -> None:
            for name in names:
                if not holds and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is an option of {of}")

        gae = self.advantage == "gae"
        only(gae, "advantage gae", "lam", "critic", "critic_init", "critic_learning_rate")
        only(gae, "advantage gae", "vf_coef", "value_clip")
        to_go = gae or self.advantage == "reinforce"
        only(to_go, "advantage gae or reinforce", "gamma", "center_rewards")
        only(self.advantage == "reinforce", "advantage reinforce", "baseline_decay")
        only(self.critic == "separate", "critic separate", "critic_init", "critic_learning_rate")
        only(self.credit == "red", "credit red", "beta_c", "dynamic_initialisation", "eos_prefixes")
        split = self.credit in ("abc", "abc_policy", "random")
        only(split, "credit abc, abc_policy or random", "beta")
        only(self.credit == "random", "credit random", "concentration")
        only(self.missing_eos != "ignore", "missing_eos replace or subtract", "missing_eos_value")
        only(self.kl_target is not None, "kl_target", "kl_horizon")
        weighted = self.importance_weights == "truncated"
        only(weighted, "importance_weights truncated", "importance_cap")
        return self


class CustomUpdateOptions(Options):
    """A policy update of your own."""

    kind: ImportPath
    """Import path module:callable of an irl_align.policy.PolicyUpdate factory."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the factory."""


PolicyUpdateOptions = (
    BestOfNOptions
    | PPOOptions
    | IdentityOptions
    | MoreSFTOptions
    | IQLearnOptions
    | CustomUpdateOptions
)
