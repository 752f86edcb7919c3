"""The recipe: one tree of options, each documented once, beside its field.

Reading a recipe from YAML, overrides and error messages are in :mod:`irl_align.recipe`.
Options of TRL's trainers are passed through under TRL's own names in the ``args`` fields.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PairSource = Literal[
    "demonstration/policy", "demonstration/contrast", "demonstration/init", "sft/init"
]


class Options(BaseModel):
    """Base of every group of options: strict types, unknown keys fail, values never change."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )


class DataOptions(Options):
    """Demonstrations: where they come from and how they are divided."""

    card: str
    """Name of a card in data_cards/, or the path of a card of your own."""
    path: str | None = None
    """Local file or folder in place of the card's source."""
    task: dict[str, Any] = {}
    """Arguments of the card's task when the card names a procedural task (size, noise)."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the training prompts that are used, chosen by a hash of the prompt."""
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the training prompts that neither SFT nor the reward sees: for selection."""
    reward_data: Literal["same", "disjoint"] = "same"
    """Whether the reward is fitted on SFT's own demonstrations or on others (by prompt)."""
    reward_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """With reward_data=disjoint: share of the prompts that go to the reward."""
    max_prompt_tokens: Positive = 512
    """Longest prompt, in tokens, template included."""
    max_completion_tokens: Positive = 512
    """Longest demonstration, in tokens, EOS included."""
    overlong: Literal["error", "drop"] = "error"
    """A row longer than the limits stops the run, or is dropped and counted."""

    @model_validator(mode="after")
    def _share_is_used(self) -> DataOptions:
        if self.reward_data == "same" and self.reward_share != 0.5:
            raise ValueError("reward_share is an option of reward_data disjoint, not of same")
        return self


class ScratchOptions(Options):
    """A small model from random weights, its tokenizer trained on the demonstrations."""

    architecture: Literal["llama", "gpt_neox"] = "llama"
    """Transformer family."""
    vocab_size: Positive = 1200
    """Size of the byte-level BPE vocabulary, special tokens included."""
    hidden_size: Positive = 192
    """Width H."""
    intermediate_size: Positive = 512
    """Width of the feed-forward layers."""
    num_hidden_layers: Positive = 4
    """Depth."""
    num_attention_heads: Positive = 6
    """Attention heads; divides hidden_size."""
    num_key_value_heads: Positive | None = None
    """Key-value heads (llama only); null means as many as attention heads."""
    max_position_embeddings: Positive = 512
    """Context length in tokens."""
    tie_word_embeddings: bool = True
    """Whether input and output embeddings are one matrix."""

    @model_validator(mode="after")
    def _heads_fit(self) -> ScratchOptions:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.num_key_value_heads is not None:
            if self.architecture != "llama":
                raise ValueError("num_key_value_heads is for architecture llama only")
            if self.num_attention_heads % self.num_key_value_heads:
                raise ValueError(
                    f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                    f"num_key_value_heads {self.num_key_value_heads}"
                )
        return self


class ModelOptions(Options):
    """The policy's start: an existing model, or a small one from scratch."""

    path: str | None = None
    """Hub id or folder of a causal language model with its tokenizer."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    from_scratch: ScratchOptions | None = None
    """Make a small model instead of loading one."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Leave it off unless you have read that code."""
    chat_template: str | None = None
    """Jinja file with a chat template, for a tokenizer that has none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the stored weights."""

    @model_validator(mode="after")
    def _one_start(self) -> ModelOptions:
        if (self.path is None) == (self.from_scratch is None):
            raise ValueError("give exactly one of path and from_scratch")
        return self


class SFTOptions(Options):
    """Supervised fine-tuning on the demonstrations: gives policy pi_0."""

    enabled: bool = True
    """False: the model given is taken as pi_0 as it is."""
    args: dict[str, Any] = {}
    """Fields of trl.SFTConfig."""


class GenerationOptions(Options):
    """How the policy is sampled for pairs, Best-of-N and evaluation."""

    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """Temperature of the negatives; 0 is greedy, and warned of."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling for the negatives; 1 is off."""
    top_k: Count = 0
    """Top-k sampling for the negatives; 0 is off."""
    max_new_tokens: Positive = 128
    """Longest sample, in tokens, EOS included."""
    samples_per_prompt: Positive = 1
    """Policy samples per prompt for the pairs."""
    max_batch_tokens: Positive = 16384
    """Cache positions (prompt and sample, all rows) in one batch."""


class PairOptions(Options):
    """What the reward is fitted on: (x, preferred, rejected) made without any preference label."""

    sources: Annotated[list[PairSource], Field(min_length=1)] = ["demonstration/policy"]
    """Preferred/rejected: policy sample, the same text under another prompt (contrast), samples of
    the model before SFT (init)."""
    contrast: Literal["neighbour", "edit"] = "neighbour"
    """Other prompt of a contrast pair: a near neighbour by word overlap, or the task's own edit."""
    contrast_per_demonstration: Positive = 1
    """Contrast pairs per demonstration."""
    window: Annotated[str, Field(pattern=r"^(latest|all|last-[1-9][0-9]*)$")] = "all"
    """Iterations whose pairs are used: latest, last-k or all."""
    truncated: Literal["drop", "keep"] = "drop"
    """Policy samples without EOS: leave their pairs out, or keep them (without EOS)."""
    demonstrations_per_prompt: Positive | None = None
    """At most so many demonstrations of one prompt make pairs; null is all of them."""


class PreferenceOptions(Options):
    """Human preferences mixed into the reward's loss. Off in everything called IRL."""

    card: str
    """Card of a preference set."""
    split: str = "train"
    """Split of the card."""
    path: str | None = None
    """Local file or folder in place of the card's source."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Weight of a preference pair against a demonstration pair."""


class RewardOptions(Options):
    """The reward level: fit r_phi on pairs, or SPIN's implicit reward beta log(pi/pi_ref)."""

    kind: Literal["explicit", "implicit", "none"] = "explicit"
    """A reward model, the policy's own log-ratio (SPIN, DPO), or no reward (SFT as a control)."""
    loss: Literal["bradley_terry", "linear"] = "bradley_terry"
    """Pair loss of the explicit reward: -log sigmoid(r_E - r_hat), or -(r_E - r_hat)."""
    bound: Annotated[float, Field(gt=0.0)] | None = None
    """Largest |r|, by bound * tanh(r / bound); the linear loss needs one."""
    init: Literal["cold", "warm"] = "cold"
    """Start of each iteration's fit: the SFT model, or the reward of the iteration before."""
    lm_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """a in r = head + a * (mean log-prob of the completion under the reward's own backbone)."""
    max_pairs: Positive | None = None
    """At most so many pairs of the window are trained on, drawn by the seed; null is all."""
    reference: Literal["previous", "initial", "mixture"] = "previous"
    """Opponent of the implicit reward: pi_k, pi_0, or their geometric mixture."""
    mixture: Share = 0.5
    """With reference=mixture: weight of pi_0; pi_k has the rest."""
    preferences: PreferenceOptions | None = None
    """Human preference pairs to mix in (explicit reward only)."""
    args: dict[str, Any] = {}
    """Fields of trl.RewardConfig (explicit) or trl.DPOConfig (implicit)."""
    schedule: dict[str, list[Any]] = {}
    """Per-iteration values of fields of args, e.g. beta: [0.1, 0.1, 0.1, 5.0]; the last repeats."""

    @model_validator(mode="after")
    def _consistent(self) -> RewardOptions:
        if self.loss == "linear" and self.bound is None:
            raise ValueError("loss linear is unbounded: give bound, the largest |r|")
        if self.kind != "explicit":
            for name in ("loss", "bound", "init", "lm_coef", "preferences"):
                if getattr(self, name) != type(self).model_fields[name].get_default():
                    raise ValueError(f"{name} is an option of kind explicit, not of {self.kind}")
        if self.kind != "implicit":
            for name in ("reference", "mixture"):
                if getattr(self, name) != type(self).model_fields[name].get_default():
                    raise ValueError(f"{name} is an option of kind implicit, not of {self.kind}")
        for name in ("args", "schedule"):
            if self.kind == "none" and getattr(self, name):
                raise ValueError(f"{name} is for kind explicit or implicit: none trains nothing")
        if self.reference != "mixture" and self.mixture != 0.5:
            raise ValueError(f"mixture is an option of reference mixture, not of {self.reference}")
        both = sorted(set(self.args) & set(self.schedule))
        if both:
            raise ValueError(f"{both[0]} is both in args and in schedule: give one")
        empty = [name for name, values in self.schedule.items() if not values]
        if empty:
            raise ValueError(f"schedule.{empty[0]} is empty: give one value per iteration")
        return self


class BestOfNOptions(Options):
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
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Sampling temperature of the N candidates."""
    start: Literal["current", "initial"] = "current"
    """Model that is fine-tuned: pi_k or pi_0."""
    args: dict[str, Any] = {}
    """Fields of trl.SFTConfig (use=sft) or trl.DPOConfig (use=dpo)."""

    @model_validator(mode="after")
    def _consistent(self) -> BestOfNOptions:
        if self.keep > self.n:
            raise ValueError(f"keep {self.keep} is more than n {self.n}")
        if self.use == "select" and self.args:
            raise ValueError("args are for use sft or dpo: select trains nothing")
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
    args: dict[str, Any] = {}
    """Fields of trl.SFTConfig."""


class CustomUpdateOptions(Options):
    """A policy update of your own."""

    kind: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]
    """Import path module:callable of an irl_align.policy.PolicyUpdate factory."""
    options: dict[str, Any] = {}
    """Keyword arguments of the factory."""


PolicyUpdateOptions = BestOfNOptions | IdentityOptions | MoreSFTOptions | CustomUpdateOptions


class SignOptions(Options):
    """Signs that an iteration went wrong, all seen on demonstrations alone, and what to do."""

    action: Literal["warn", "stop"] = "warn"
    """On a sign after a policy update: say so, or stop and keep the policy before it."""
    unfit_loss: Annotated[float, Field(gt=0.0)] = 0.6931471805599453
    """Held-out pair loss at or above this (ln 2): the reward is unfit and is not optimised on."""
    fresh_accuracy: Share = 0.52
    """Demonstrations against fresh samples at or below this accuracy: nothing left to learn."""
    older_drop: Share = 0.05
    """Fall of the held-out accuracy on earlier iterations' pairs after a refit: forgetting."""
    entropy_low: Annotated[float, Field(ge=0.0)] = 0.75
    """Least entropy of the policy, as a multiple of pi_0's."""
    entropy_high: Annotated[float, Field(gt=0.0)] = 1.25
    """Largest entropy of the policy, as a multiple of pi_0's."""
    kl: Annotated[float, Field(gt=0.0)] = 3.0
    """Largest KL(pi || pi_0) per completion, in nats."""
    length_change: Annotated[float, Field(gt=0.0)] = 0.25
    """Largest relative change of the mean completion length against pi_0's."""
    missing_eos: Share = 0.02
    """Largest share of samples without EOS above pi_0's."""
    demonstration_log_prob: Annotated[float, Field(gt=0.0)] = 5.0
    """Largest fall of the held-out demonstrations' mean log-prob below pi_0's, in nats."""


class LoopOptions(Options):
    """The outer loop."""

    iterations: Count = 2
    """Outer iterations; 0 is SFT alone."""
    signs: SignOptions = SignOptions()
    """Bounds that are watched."""
    pick: Literal["last", "nearest"] = "last"
    """Policy of the run: the last, or the one whose samples the last reward tells least from
    held-out demonstrations."""


class EvaluationOptions(Options):
    """What is measured of every policy. Never used for selection."""

    split: Literal["validation", "test"] = "validation"
    """Split of the card whose prompts are answered; tune on validation, report on test."""
    prompts: Positive | None = None
    """Number of distinct prompts, chosen by hash; null is all."""
    temperatures: Annotated[list[Annotated[float, Field(ge=0.0)]], Field(min_length=1)] = [1.0, 0.0]
    """Sampling temperatures; 0 is greedy. The first gives length, entropy and KL."""
    gold: bool = True
    """Compute the gold metric that the card names, where it names one."""
    held_out_prompts: Positive = 500
    """At most so many held-out prompts for reward accuracy and demonstration log-prob."""

    @field_validator("temperatures")
    @classmethod
    def _distinct(cls, temperatures: list[float]) -> list[float]:
        if len(set(temperatures)) != len(temperatures):
            raise ValueError("the same temperature twice")
        if temperatures[0] != 1.0:
            raise ValueError("the first temperature is 1.0: KL and entropy are measured there")
        return temperatures


class Recipe(Options):
    """Everything that determines a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; its folder is output_dir/NAME-seedSEED."""
    description: str = ""
    """What the recipe is for and the numbers it is expected to reach."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of everything random."""
    output_dir: str = "runs"
    """Folder of the runs and of the store of stages that they share."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Trackers: tensorboard, wandb, trackio."""
    data: DataOptions
    """Demonstrations."""
    model: ModelOptions
    """Policy start."""
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
    def _levels_agree(self) -> Recipe:
        kind, update = self.reward.kind, self.policy_update.kind
        if self.loop.iterations == 0:
            return self
        if (kind == "implicit") != (update == "identity"):
            raise ValueError(
                f"reward.kind {kind} does not go with policy_update.kind {update}: the implicit "
                "reward moves the policy itself, so it goes with identity, and only it does"
            )
        if kind == "none" and update == "best_of_n":
            raise ValueError("policy_update.kind best_of_n needs a reward: reward.kind is none")
        return self
