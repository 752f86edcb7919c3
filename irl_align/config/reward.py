"""The recipe's groups ``pairs`` and ``reward``: what the reward is fitted on, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from irl_align.config.model import LoraOptions
from irl_align.config.types import ImportPath, Options, PathText, Share

PairSource = Literal[
    "demonstration/policy",
    "demonstration/contrast",
    "demonstration/init",
    "sft/init",
    "policy/sft",
    "policy/older",
]


LoopModel = Literal["initial", "previous", "older", "start", "checkpoint"]
"""Models of a run that a log-ratio compares."""


class PairOptions(Options):
    """The pairs (x, preferred, rejected), made without any preference label."""

    used_with = (("contrast", ("edit",), ("contrast_edits", "contrast_crossed")),)

    sources: Annotated[list[PairSource], Field(min_length=1)] = Field(
        default_factory=lambda: list[PairSource](["demonstration/policy"])
    )
    """Preferred/rejected sides. policy: a sample of pi_k; contrast: the demonstration under another
    prompt; sft: a sample of pi_0; init: a sample of the model before SFT; older: one of pi_(k-1).
    policy/sft and policy/older begin in iteration 1."""
    shares: list[PositiveFloat] | None = None
    """Relative number of pairs of each source, such as [70, 20, 10]: pairs of sources that have too
    many are left out at random. Null uses all pairs."""
    contrast: Literal["neighbour", "edit"] = "neighbour"
    """The other prompt of a contrast pair: a near neighbour by word overlap, or an edit of the
    prompt by the card's edit."""
    contrast_per_demonstration: PositiveInt = 1
    """Contrast pairs per demonstration."""
    contrast_edits: PositiveInt = 1
    """With contrast=edit: number of edits in a row. For the same text, each prompt of the row is
    preferred to the next one."""
    contrast_crossed: bool = False
    """With contrast=edit: add pairs in which the edited prompt is preferred, with a demonstration
    that fits it. Edited prompts are then preferred as often as rejected, so the reward cannot learn
    merely which prompts look edited."""
    window: Annotated[str, Field(pattern=r"^(latest|all|last-[1-9][0-9]*)$")] = "all"
    """Iterations whose pairs the reward is fitted on: latest, all, or last-K for the last K."""
    truncated: Literal["drop", "keep"] = "drop"
    """What to do with a policy sample that has no end of text: drop its pair, or keep it as it is.
    A demonstration longer than generation.max_new_tokens makes no pair in either case, since no
    sample can be as long."""
    demonstrations_per_prompt: PositiveInt | None = None
    """Largest number of demonstrations of one prompt that make pairs. Null uses all of them."""

    @model_validator(mode="after")
    def _sources_fit(self) -> PairOptions:
        if all(source.startswith("policy/") for source in self.sources):
            raise ValueError("sources: iteration 0 needs one that is not of the policy's samples")
        if self.shares is not None and len(self.shares) != len(self.sources):
            raise ValueError(
                f"shares has {len(self.shares)} numbers, sources {len(self.sources)}: give one each"
            )
        repeated = [source for source in self.sources if self.sources.count(source) > 1]
        if repeated:
            raise ValueError(f"sources: {repeated[0]} is given twice")
        contrast = ("contrast", "contrast_per_demonstration", "contrast_edits", "contrast_crossed")
        name = self.first_set(*contrast)
        if "demonstration/contrast" not in self.sources and name:
            raise ValueError(
                f"{name} is an option of the source demonstration/contrast, which sources lacks"
            )
        return self


class PreferenceOptions(Options):
    """Human preferences in the reward's loss. Runs that are called IRL do not use them."""

    used_with = (("use", ("beside",), ("weight",)),)

    card: PathText
    """Card of a preference set."""
    split: str = "train"
    """Split of the card."""
    path: PathText | None = None
    """Local file or folder that replaces the card's source."""
    use: Literal["beside", "alone"] = "beside"
    """beside: add the preferences to the demonstration pairs. alone: fit on the preferences only,
    which is the reward of RLHF, for comparison."""
    weight: PositiveFloat = 1.0
    """With use=beside: weight of a preference pair, where a demonstration pair has weight 1."""


class FunctionOptions(Options):
    """A reward function of your own, called as TRL's GRPO calls reward functions."""

    path: ImportPath
    """Import path module:callable."""
    weight: FiniteFloat = 1.0
    """What its value is multiplied by before it is added to the reward."""


def _named_function(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class EnsembleOptions(Options):
    """Several explicit rewards: r = mean - penalty * standard deviation over them."""

    members: Annotated[int, Field(ge=2)]
    """Number of rewards, two at least."""
    kind: Literal["heads", "models"] = "heads"
    """heads: one backbone with several heads, which one pass scores. They differ by their start and
    by random weights of the pairs. models: separate fits, which also differ by the pairs' order."""
    penalty: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """Weight of the standard deviation over the members."""


class RewardOptions(Options):
    """The reward level: fit r_phi on pairs, or a log-ratio beta log(pi/pi_ref) of two models."""

    used_with = (
        (
            "kind",
            ("explicit",),
            (
                *("loss", "label_smoothing", "margin_cap", "train_layers", "offset", "bound"),
                *("echo", "init", "lm_coef", "preferences", "lora"),
            ),
        ),
        ("kind", ("implicit",), ("numerator", "reference", "mixture", "endogenous", "mean")),
        ("kind", ("explicit", "implicit"), ("beta", "args", "schedule", "max_pairs")),
        ("numerator", ("fitted",), ("args", "schedule", "max_pairs")),
        ("loss", ("bradley_terry",), ("label_smoothing",)),
        ("reference", ("mixture",), ("mixture",)),
        ("offset", (None, "log_ratio", "reward"), ("offset_coef", "offset_clip")),
        ("offset", (None, "log_ratio"), ("offset_per_token",)),
        ("kind", ("explicit",), ("ensemble",)),
        ("kind", ("explicit", "implicit", "functions"), ("functions",)),
    )

    kind: Literal["explicit", "implicit", "functions", "none"] = "explicit"
    """explicit: a reward model. implicit: a log-ratio of two language models, see numerator. With
    policy_update identity the model that is fitted is the next policy (SPIN, DPO). functions: only
    those of the option functions; nothing is fitted. none: no reward."""
    functions: list[Annotated[FunctionOptions, BeforeValidator(_named_function)]] = Field(
        default_factory=list
    )
    """Functions of your own that are added to the reward: [module:callable, ...], or [{path:
    module:callable, weight: 0.5}, ...] in the reward's unit. They are called as TRL's GRPO calls
    reward functions, with lists of prompts, completions, completion_ids and the card's extra
    columns, and of each prompt's demonstrations, and return a number or None (0) for each
    completion. Their source file is part of the stages' keys; what they import is not."""
    ensemble: EnsembleOptions | None = None
    """Several explicit rewards in place of one."""
    loss: Literal["bradley_terry", "linear"] = "bradley_terry"
    """Pair loss of the explicit reward: -log sigmoid(r_E - r_hat), or -(r_E - r_hat)."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """With bradley_terry: probability that a pair counts as the other way round (R-AIRL: 0.1). It
    bounds logits, so that a reward that tells almost all pairs apart still orders samples."""
    margin_cap: PositiveFloat | None = None
    """Pairs whose logit is larger have no gradient. Null has no cap."""
    train_layers: NonNegativeInt | None = None
    """Train only the head and this many last layers of the backbone; 0 is a linear head on frozen
    features. Null trains all weights."""
    beta: PositiveFloat = 1.0
    """Explicit reward: the logit of a pair is (r_E - r_hat) / beta, in nats. The policy level with
    a KL weight of beta then ends at the demonstrations; a smaller weight goes further. Implicit
    reward: the factor of the log-ratio; with numerator fitted it is args.beta instead."""
    offset: Literal["log_ratio", "reward", "none"] | None = None
    """What the logit of a text subtracts, so that one reward accumulates over the iterations and
    the policy level starts from pi_0. log_ratio: log pi_k/pi_0, so that the pairs of all iterations
    have the same best reward. reward: the last iteration's reward, which makes this one a sum.
    none: each reward is relative to the samples in the window. Null is log_ratio where that is
    possible: with loss bradley_terry, and Best-of-N that trains or PPO with reference initial."""
    offset_coef: NonNegativeFloat = 1.0
    """Factor of the offset."""
    offset_clip: PositiveFloat | None = None
    """Largest |offset| of a text, in nats. Null does not clip."""
    offset_per_token: bool = False
    """With offset=log_ratio: divide a text's log-ratio by its number of tokens."""
    bound: PositiveFloat | None = None
    """Largest |r|, by bound * tanh(r / bound). The linear loss needs one."""
    init: Literal["cold", "warm"] = "warm"
    """Start of each iteration's fit: the SFT model (cold), or the previous iteration's reward
    (warm)."""
    echo: bool = False
    """Explicit reward: append a copy of the prompt after the completion and read the reward at its
    end, so that the reward can check every part of the prompt against the text. Such a reward gives
    no rewards of prefixes, so it does not go with credit red or abc."""
    lm_coef: NonNegativeFloat = 0.0
    """a in r = head + a * (mean log-prob of the completion under the reward's own backbone)."""
    max_pairs: PositiveInt | None = None
    """Largest number of the window's pairs that the fit uses, drawn by the seed. Null uses all."""
    numerator: LoopModel | Literal["fitted"] = "fitted"
    """pi of the implicit reward beta log(pi/pi_ref). fitted: pi_k after a fit to the pairs with
    SPIN's loss. Without a fit: pi_0 (initial), pi_k (previous), pi_(k-1) (older, in iteration 0 the
    model before SFT), the model before SFT (start), or SFT's checkpoint (sft.checkpoint)."""
    reference: LoopModel | Literal["mixture", "none"] = "previous"
    """pi_ref of the implicit reward, and the opponent of its fit: a model as in numerator, the
    geometric mixture of pi_0 and pi_k, or none, which makes the reward log pi."""
    mixture: Share = 0.5
    """With reference=mixture: weight of pi_0. pi_k has the rest."""
    endogenous: bool = False
    """Implicit reward: a token's reward is beta (log pi/pi_ref + V(s) - V(s')), V the log-sum-exp
    of pi's logits (arXiv:2506.23235). It is a denser credit for the same ranking of a prompt's
    texts: the V terms sum to V of the prompt."""
    mean: bool = False
    """Implicit reward: the mean over a text's tokens, not their sum."""
    preferences: PreferenceOptions | None = None
    """Human preference pairs to mix in (explicit reward only)."""
    lora: LoraOptions | None = None
    """Train an adapter and the head instead of all weights (explicit reward only)."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Fields of trl.RewardConfig (explicit) or trl.DPOConfig (implicit)."""
    schedule: dict[str, list[Any]] = Field(default_factory=dict)
    """Per-iteration values of fields of args, e.g. beta: [0.1, 0.1, 0.1, 5.0]. Later iterations use
    the last value."""

    @property
    def is_learned(self) -> bool:
        """Whether the reward level fits a model."""
        return self.kind == "explicit" or (self.kind == "implicit" and self.numerator == "fitted")

    @property
    def named_functions(self) -> tuple[tuple[str, float], ...]:
        """Import path and weight of each function."""
        return tuple((function.path, function.weight) for function in self.functions)

    @model_validator(mode="after")
    def _ratio_is_consistent(self) -> RewardOptions:
        if self.kind != "implicit":
            return self
        if self.numerator == self.reference:
            raise ValueError(f"reference {self.reference} is the numerator too: the reward is 0")
        if self.numerator == "fitted" and self.reference == "none":
            raise ValueError("reference none is for a numerator that is not fitted")
        if self.numerator == "fitted" and self.first_set("beta"):
            raise ValueError("beta is args.beta where the numerator is fitted")
        if self.endogenous and self.mean:
            raise ValueError(
                "mean would divide V of the prompt by a text's length: drop endogenous"
            )
        return self

    @model_validator(mode="after")
    def _is_consistent(self) -> RewardOptions:
        paths = [function.path for function in self.functions]
        if self.kind == "functions" and not paths:
            raise ValueError("kind functions needs functions: give [module:callable]")
        if repeated := [path for path in paths if paths.count(path) > 1]:
            raise ValueError(f"functions: {repeated[0]} is given twice")
        if self.train_layers is not None and self.lora is not None:
            raise ValueError("train_layers is for weights of the backbone: lora trains an adapter")
        if self.loss == "linear" and self.bound is None:
            raise ValueError("loss linear is unbounded: give bound, the largest |r|")
        if self.loss == "linear" and self.offset not in (None, "none"):
            raise ValueError(f"offset {self.offset} has no effect on loss linear")
        both = sorted(set(self.args) & set(self.schedule))
        if both:
            raise ValueError(f"{both[0]} is both in args and in schedule: give one")
        empty = [name for name, values in self.schedule.items() if not values]
        if empty:
            raise ValueError(f"schedule.{empty[0]} is empty: give one value per iteration")
        return self
