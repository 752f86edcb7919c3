"""The recipe's group ``policy_update``: options of every policy update."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from irl_align.config.types import ImportPath, Options, PathText, Share


class PolicyPromptOptions(Options):
    """Prompts of the policy level in addition to those of the demonstrations."""

    edited_prompts: NonNegativeInt = 0
    """For every prompt, add one prompt without a demonstration, made by this many of the card's
    edits in a row. 0 adds none. Prompts that occur in any split of the data are left out."""
    prompts_from: PathText | None = None
    """File of prompts without demonstrations, in the card's prompt column: jsonl, json, csv,
    parquet or .gz."""


PROMPT_OPTIONS = set(PolicyPromptOptions.model_fields)
"""Demonstrations.checksum covers these prompts, so the keys of stages leave these options out."""


class BestOfNOptions(PolicyPromptOptions):
    """Best-of-N: sample N completions per prompt, score them, use the best."""

    kind: Literal["best_of_n"]
    """Name of the update."""
    n: Annotated[int, Field(ge=2)] = 8
    """Samples per prompt."""
    use: Literal["select", "sft", "dpo"] = "sft"
    """select: the policy stays, and whenever it is sampled the best of N samples is taken. sft:
    fine-tune on the best. dpo: train best against worst."""
    score: Literal["reward", "logprob", "both"] = "reward"
    """Rank by the reward, by the policy's mean log-prob, or by their standardised sum."""
    keep: PositiveInt = 1
    """Number of best samples of each prompt to train on. With use=dpo, against as many of the
    worst."""
    prompts: PositiveInt | None = None
    """Number of prompts that are sampled, chosen by hash. Null uses all of the reward's prompts."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of the N candidates."""
    start: Literal["current", "initial"] = "current"
    """Model that is fine-tuned: pi_k or pi_0."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Fields of trl.SFTConfig (use=sft) or trl.DPOConfig (use=dpo)."""

    @model_validator(mode="after")
    def _is_consistent(self) -> BestOfNOptions:
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
    """No policy step: the fit of the implicit reward has already moved the policy (SPIN)."""

    kind: Literal["identity"]
    """Name of the update."""


class MoreSFTOptions(Options):
    """Control: more SFT on the demonstrations, without a reward."""

    kind: Literal["sft"]
    """Name of the update."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Fields of trl.SFTConfig."""


class IQLearnOptions(Options):
    """Baseline: offline IQLearn on the demonstrations (arXiv:2409.01369), no reward model."""

    kind: Literal["iqlearn"]
    """Name of the update."""
    coef: NonNegativeFloat = 0.1
    """Weight of the square of the reward that the policy's logits imply. 0 is SFT."""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Discount of the next token's value."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Fields of trl.SFTConfig."""

    @model_validator(mode="after")
    def _has_its_own_loss(self) -> IQLearnOptions:
        for name in ("loss_type", "label_smoothing_factor"):
            if name in self.args:
                raise ValueError(f"args.{name} belongs to another loss: iqlearn has its own")
        return self


DENSE = ("uniform", "red", "abc", "abc_policy", "random")
"""Kinds of credit that put a reward on every token."""


class PPOOptions(PolicyPromptOptions):
    """PPO with token-level credit (arXiv:1707.06347, 2403.17031, 2411.08302, 2402.00782)."""

    used_with = (
        (
            "advantage",
            ("gae",),
            ("lam", "critic", "critic_init", "critic_learning_rate", "vf_coef", "value_clip"),
        ),
        ("advantage", ("gae", "reinforce"), ("gamma", "center_rewards")),
        ("advantage", ("reinforce",), ("baseline_decay",)),
        ("critic", ("separate",), ("critic_init", "critic_learning_rate")),
        ("credit", ("red",), ("beta_c", "dynamic_initialisation", "eos_prefixes")),
        ("credit", ("abc", "abc_policy", "random"), ("beta",)),
        ("credit", ("random",), ("concentration",)),
        ("missing_eos", ("relative", "replace", "subtract"), ("missing_eos_value",)),
        ("importance_weights", ("truncated",), ("importance_cap",)),
    )

    kind: Literal["ppo"]
    """Name of the update."""
    # --- what is maximised
    credit: Literal["sparse", "uniform", "red", "abc", "abc_policy", "random"] = "sparse"
    """How a completion's reward R is distributed over its tokens. sparse: all on the last one.
    uniform: the same on all. red: differences between the rewards of prefixes, which of an implicit
    reward are the tokens' own log-ratios. abc: by the reward's attention. abc_policy: by the
    policy's attention, which takes one more pass of the policy. random: the control of abc. Only
    sparse and red keep the policy gradient under gae."""
    beta: Share = 0.8
    """With credit abc, abc_policy, random: share of R that is distributed. The rest is on the last
    token."""
    beta_c: NonNegativeFloat = 1.0
    """With credit red: scale of the potential."""
    dynamic_initialisation: bool = True
    """With credit red: the potential of the start is the reward of the empty completion, not 0."""
    eos_prefixes: bool = False
    """With credit red: append EOS to prefixes before they are scored, for rewards trained at EOS
    only. This doubles a completion's positions in the reward's pass: scoring took about 1.85 times
    as long as sparse and 0.95 times the memory (tests/benchmarks/credit.py, a loaded AMD EPYC)."""
    concentration: PositiveFloat = 1.0
    """With credit random: concentration of the Dirichlet distribution."""
    missing_eos: Literal["relative", "replace", "subtract", "ignore"] = "relative"
    """Reward R of a sample without EOS. relative: at most that of the rollout's worst sample with
    EOS, minus missing_eos_value standard deviations of the samples with EOS. replace: the number
    missing_eos_value, which pays for never stopping where samples score below it. subtract:
    missing_eos_value less. ignore: no change, for texts that need no EOS."""
    missing_eos_value: float | None = None
    """Null: 1 with relative and subtract, -1 with replace. Not negative with relative."""
    clip_reward: PositiveFloat | None = None
    """Largest |R|, before credit."""
    center_rewards: bool = False
    """With advantage gae or reinforce: subtract the rollout's mean R from every R before credit.
    This does not change rankings. But where credit biases rewards-to-go (uniform, abc, random), the
    sign of R decides whether a longer completion pays."""
    clip_token_rewards: PositiveFloat | None = None
    """Largest |r_t| of credit and KL together. Only with credit sparse."""
    whiten_rewards: bool = False
    """Divide token rewards by their standard deviation. Only with credit sparse."""
    kl: Literal["reward", "loss", "grpo"] = "reward"
    """KL penalty to the reference policy. reward: -kl_coef * k1 in each token's reward. loss:
    kl_coef * ratio * k3 in the loss, whose gradient is that of KL(pi || reference). grpo: kl_coef *
    k3 in the loss, as in GRPO (arXiv:2402.03300), whose gradient is that of KL(reference || pi)."""
    kl_coef: NonNegativeFloat = 0.05
    """Weight of the KL penalty. With kl_target it is the first weight."""
    kl_target: PositiveFloat | None = None
    """Adapt the weight (arXiv:1909.08593) towards this KL per completion, in nats."""
    kl_horizon: PositiveInt = 10_000
    """With kl_target: the weight changes by at most a fifth over this many episodes, and by at most
    a fifth in one update."""
    reference: Literal["initial", "current"] = "initial"
    """Reference policy of the KL penalty: pi_0, or pi_k, from which this update starts."""
    # --- advantages
    advantage: Literal["gae", "rloo", "grpo", "reinforce"] = "gae"
    """gae: generalised advantages with a critic. rloo, grpo: leave-one-out or group-normalised sums
    over n samples of a prompt. reinforce: rewards-to-go minus their running mean."""
    n: PositiveInt = 1
    """Samples per prompt in a rollout. rloo and grpo need 2 or more."""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Discount, with advantage gae or reinforce."""
    lam: Share = 0.95
    """Lambda of gae."""
    baseline_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """With advantage reinforce: decay of the running mean, per update."""
    whiten_advantages: Literal["standardize", "scale_only", "none"] = "standardize"
    """Over all tokens of a rollout: mean 0 and variance 1 (standardize), only variance 1
    (scale_only), or no change (none)."""
    # --- critic, with advantage gae
    critic: Literal["separate", "shared"] = "separate"
    """separate: a model of its own. shared: a head on the policy's trunk."""
    critic_init: Literal["reward", "zero"] = "zero"
    """Separate critic: start from the reward model, whose values are its prefix scores, or from
    pi_k's trunk with a head of zeros."""
    critic_learning_rate: PositiveFloat | None = None
    """Null means learning_rate."""
    vf_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""
    value_clip: PositiveFloat | None = 0.2
    """Largest move of a value that its loss rewards. Null turns clipping off."""
    # --- sampling
    episodes: PositiveInt = 20_000
    """Total number of samples."""
    batch_size: PositiveInt = 512
    """Samples per rollout, a multiple of n. One update follows each rollout."""
    temperature: PositiveFloat = 1.0
    """Temperature of sampling and of the log-probs of policy and reference. PPO always samples from
    all tokens: generation.top_p and top_k have no effect on it."""
    importance_weights: Literal["off", "truncated"] = "off"
    """For a sampler whose log-probs differ from the learner's (vLLM, bf16). truncated weighs each
    token's policy loss by pi_learner / pi_sampler, at most importance_cap."""
    importance_cap: PositiveFloat = 2.0
    """With importance_weights truncated: the largest weight."""
    sampler_gap_alarm: PositiveFloat = 0.05
    """A mean |log pi_learner - log pi_sampler| per token above this logs a warning."""
    # --- the update
    start: Literal["current", "initial"] = "current"
    """Model that is trained: pi_k or pi_0."""
    epochs: PositiveInt = 4
    """Passes over a rollout."""
    minibatches: PositiveInt = 1
    """Optimiser steps per epoch. The completions of a rollout are divided among them."""
    clip: PositiveFloat = 0.2
    """Largest move of the ratio that the loss rewards."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    learning_rate: PositiveFloat = 3e-6
    """Learning rate of AdamW (eps 1e-5)."""
    lr_schedule: Literal["linear", "constant"] = "linear"
    """Linear to 0 over the updates, or constant."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Largest gradient norm, for policy and critic separately."""
    epoch_kl: PositiveFloat | None = 0.05
    """An update's epochs end when its mean KL per token (k3) passes this bound. Null turns it
    off."""
    max_batch_tokens: PositiveInt = 16_384
    """Tokens in one forward pass. The gradient does not depend on it."""
    bf16: bool = False
    """Autocast to bfloat16. Weights, log-softmax, differences and advantages stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    backbone: Literal["separate", "shared"] = "separate"
    """separate: policy, reference, reward and critic are models of their own. shared (with
    model.lora and reward.lora): they are adapters of one model in memory."""
    # --- which policy the update returns, and when it stops
    keep: Literal["reward_gap", "log_prob", "last"] = "reward_gap"
    """Policy that the update returns. By held-out demonstrations: the one whose samples' mean
    reward is nearest theirs (reward_gap; samples without EOS widen the gap, unless missing_eos is
    ignore), or that gives them the highest log-prob (log_prob). last: the last one."""
    evaluate_every: PositiveInt = 10
    """Updates between two evaluations on held-out demonstrations."""
    held_out_prompts: PositiveInt = 128
    """Largest number of held-out prompts."""
    kl_alarm: PositiveFloat = 10.0
    """A KL to the reference per completion, in nats, above this logs a warning."""
    kl_stop: PositiveFloat = 50.0
    """A KL above this stops the training, and an earlier policy is returned."""
    checkpoint_every: PositiveInt = 10
    """Updates between two checkpoints. An interrupted run resumes from the last one."""
    samples_kept: NonNegativeInt = 4
    """Samples per update that are stored with their tokens' credit."""

    @property
    def eos_value(self) -> float:
        """missing_eos_value, or its default."""
        if self.missing_eos_value is not None:
            return self.missing_eos_value
        return -1.0 if self.missing_eos == "replace" else 1.0

    @model_validator(mode="after")
    def _never_stopping_does_not_pay(self) -> PPOOptions:
        if self.missing_eos == "relative" and self.eos_value < 0.0:
            raise ValueError(
                f"missing_eos_value is {self.eos_value:g}: with missing_eos relative it is a "
                "margin, which is at least 0; for a reward below 0 use missing_eos replace"
            )
        return self

    @property
    def updates(self) -> int:
        """Number of rollouts, each followed by an update."""
        return -(-self.episodes // self.batch_size)

    @model_validator(mode="after")
    def _credit_composes(self) -> PPOOptions:
        if self.credit in DENSE:
            if self.advantage in ("rloo", "grpo"):
                raise ValueError(
                    f"credit {self.credit} cancels under advantage {self.advantage}, which takes "
                    "sums over completions: use gae or reinforce, or credit sparse"
                )
            if name := self.first_set("whiten_rewards", "clip_token_rewards"):
                raise ValueError(
                    f"{name} does not go with credit {self.credit}: it would change what a "
                    "completion's tokens sum to; use clip_reward, or credit sparse"
                )
        if self.advantage == "grpo" and self.kl == "reward":
            raise ValueError(
                "advantage grpo divides by each prompt's deviation, and kl reward would be "
                "rescaled with it: use kl loss or grpo"
            )
        if self.kl_target is not None and self.kl_coef == 0.0:
            raise ValueError("kl_target multiplies kl_coef, which is 0: give a kl_coef above 0")
        if self.kl_target is None and self.first_set("kl_horizon"):
            raise ValueError("kl_horizon is an option of kl_target, which is null")
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
