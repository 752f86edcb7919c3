"""What an iteration of the loop reads: data, policies and a reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from datasets import Dataset

from irl_align.data.cards import Card
from irl_align.data.columns import column
from irl_align.data.rows import Demonstration, Preference, Prompt
from irl_align.policy import Demonstrations, Offset, Policy, Reward


@dataclass(frozen=True)
class RawData:
    """The texts that a recipe reads, before any model is loaded."""

    card: Card
    rows: Mapping[str, list[Demonstration]]
    """Demonstrations by use: sft, reward, held_out and evaluation."""
    checksums: Mapping[str, str]
    """Checksum of each use's texts."""
    counts: Mapping[str, int]
    """Rows and prompts by use."""
    noisy: Mapping[str, int]
    """Rows by use whose completions were corrupted on purpose."""
    preferences: list[Preference]
    """Preference pairs for the reward."""
    extra_prompts: list[Prompt]
    """Prompts without demonstrations that the policy update uses."""
    unread_prompts: list[Prompt]
    """Prompts of the splits that this run does not read. The extra prompts must be none of these,
    so that the policy is the same whichever split is evaluated. Empty without extra prompts."""


@dataclass(frozen=True)
class Data:
    """Encoded demonstrations by use; see encoding.encode_demonstrations for the columns."""

    raw: RawData
    sft: Dataset
    reward: Dataset
    held_out: Dataset
    evaluation: Dataset
    checksums: dict[str, str]
    """Checksum of each use's token ids; the stages that read the rows are keyed by it."""
    context: int | None
    """Most tokens of prompt and completion together: the model's positions."""

    @property
    def card(self) -> Card:
        """Card of the demonstrations."""
        return self.raw.card

    def demonstrations(self, use: str) -> Demonstrations:
        """Token ids of the rows of one use."""
        rows = getattr(self, use)
        return Demonstrations(
            column(rows, "prompt_ids"), column(rows, "completion_ids"), self.checksums[use]
        )


@dataclass(frozen=True)
class Iteration:
    """Where the loop stands: pi_k and the last reward."""

    k: int
    policy: Policy
    initial: Policy
    """pi_0, the policy after SFT."""
    reward: Reward | None
    """The last fitted reward: r_{k-1} before the reward level of iteration k, r_k after it."""
    data: Data
    earlier: tuple[Policy, ...] = ()
    """The start model, and pi_0 to pi_(k-1)."""
    offset: Offset | None = None
    """o_k of a cumulative reward; None in iteration 0 and without reward.offset."""
