"""The recipe's groups ``loop`` and ``evaluation``: the outer loop and what is measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from irl_align.config.types import Options, Share


class SignOptions(Options):
    """Bounds whose violation is a sign that an iteration went wrong, and what to do then. All of
    them are measured on demonstrations only."""

    action: Literal["warn", "stop"] = "warn"
    """What to do when a policy update passes a bound, or when the reward forgets: log a warning, or
    stop and keep the policy before the update."""
    unfit_accuracy: Share = 0.5
    """A reward is unfit, and the loop stops, if the 95% interval of its held-out accuracy does not
    lie above this bound. With fewer than 30 prompts only the accuracy itself must, and a warning
    says what cannot be told. If only the pairs with policy samples do not pass, a warning is
    logged. 0 turns this off."""
    unfit_loss: NonNegativeFloat = 0.0
    """An unfit reward also has at least this held-out pair loss. 0 judges only the ranking."""
    saturated_accuracy: Share = 0.95
    """Training accuracy that a reward should not reach in the first half of its fit: then hardly a
    pair has a gradient, and the reward orders the policy's samples by noise. 1 turns this off."""
    two_sample_accuracy: Share = 0.55
    """If the 95% interval of a fresh discriminator's accuracy on held-out demonstrations against
    the policy's samples ends at or below this bound, nothing is left to learn. A wider interval
    that includes 50% decides nothing: more held-out prompts are needed. 0 turns this off."""
    older_drop: Share = 0.05
    """Largest fall of the held-out accuracy on earlier iterations' pairs after a refit. A larger
    fall means that the reward forgets."""
    entropy_low: NonNegativeFloat = 0.75
    """Least entropy of the policy, as a multiple of pi_0's."""
    entropy_high: PositiveFloat = 1.25
    """Largest entropy of the policy, as a multiple of pi_0's."""
    kl: PositiveFloat = 3.0
    """Largest KL(pi || pi_0) per completion, in nats."""
    length_change: PositiveFloat = 0.25
    """Largest relative change of the mean completion length against pi_0's."""
    missing_eos: Share = 0.02
    """Largest share of samples without EOS above pi_0's."""
    outliers: Share = 0.25
    """Largest share of the policy's samples that are outliers to a reward, which counts 5% of
    pi_0's as such; see the guide."""
    demonstration_log_prob: PositiveFloat = 5.0
    """Largest fall of the held-out demonstrations' mean log-prob below pi_0's, in nats."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> SignOptions:
        if self.entropy_low > self.entropy_high:
            raise ValueError(
                f"entropy_low is {self.entropy_low:g}, above entropy_high {self.entropy_high:g}"
            )
        return self


class LoopOptions(Options):
    """The outer loop."""

    iterations: NonNegativeInt = 2
    """Outer iterations. 0 is SFT only."""
    signs: SignOptions = SignOptions()
    """Bounds that are watched."""
    pick: Literal["last", "nearest"] = "last"
    """Policy that the run returns: the last one, or the one whose samples the last reward
    distinguishes least from held-out demonstrations."""


class EvaluationOptions(Options):
    """What is measured of every policy. The loop never acts on these numbers."""

    split: Literal["validation", "test"] = "validation"
    """Split of the card whose prompts are answered. Tune on validation, report on test."""
    prompts: PositiveInt | None = None
    """Number of distinct prompts, chosen by hash. Null uses all."""
    temperatures: Annotated[list[NonNegativeFloat], Field(min_length=1)] = Field(
        default_factory=lambda: [1.0, 0.0]
    )
    """Sampling temperatures. 0 is greedy. Length, entropy and KL are measured at the first."""
    gold: bool = True
    """Compute the gold metric that the card names, where it names one."""
    match_entropy: bool = False
    """Also judge the first policy, sampled at the temperature at which its entropy equals that of
    each later policy at 1. What a policy gains beyond that is more than lower entropy."""
    held_out_prompts: PositiveInt = 500
    """Largest number of held-out prompts for reward accuracy and demonstration log-prob."""

    @field_validator("temperatures")
    @classmethod
    def _temperatures_start_at_one(cls, temperatures: list[float]) -> list[float]:
        if len(set(temperatures)) != len(temperatures):
            raise ValueError("a temperature is given twice")
        if temperatures[0] != 1.0:
            raise ValueError("the first temperature is 1.0: KL and entropy are measured there")
        return temperatures

    @model_validator(mode="after")
    def _match_needs_gold(self) -> EvaluationOptions:
        if self.match_entropy and not self.gold:
            raise ValueError("match_entropy compares gold, but gold is false")
        return self
