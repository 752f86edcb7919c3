"""The interface of reward functions, and the request and result of one scoring pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from irl_align.data.encoding import Templated, encode_completions, encode_prompts
from irl_align.errors import UserError
from irl_align.models.packing import Ids


class RewardFunction(Protocol):
    """What Best-of-N and PPO need of a reward. Token ids in, float32 tensors on the CPU out."""

    def score_ids(self, prompts: Ids, completions: Ids) -> Tensor:
        """Reward of whole completions: (B,)."""

    def prefix_scores_ids(self, prompts: Ids, completions: Ids) -> list[Tensor]:
        """Reward of every prefix of each completion, the empty one first: (T + 1,) per row."""


@dataclass(frozen=True)
class ScoreRequest:
    """B completions to score, and what to return besides the reward of each."""

    prompts: Ids
    completions: Ids
    prefixes: bool = False
    """Whether to return the reward of every prefix."""
    attention: bool = False
    """Whether to return the attention of the pooled token."""
    eos_prefixes: bool = False
    """Whether prefixes are scored with EOS appended; needs `prefixes`."""

    @property
    def longest(self) -> int:
        """Tokens of the longest completion, Tmax."""
        return max(map(len, self.completions), default=0)


@dataclass(frozen=True)
class TokenScores:
    """Result of one reward pass over B completions: float32 on the CPU, 0 on padding."""

    rewards: Tensor
    """R(x, y) of each completion: (B,)."""
    prefixes: Tensor | None = None
    """R(x, y_<t), the empty prefix first and R(x, y) last: (B, Tmax + 1)."""
    attention: Tensor | None = None
    """Last layer's attention of the pooled (last) token on the completion's tokens, mean over
    heads, not renormalised: (B, Tmax)."""


@runtime_checkable
class TokenScorer(Protocol):
    """A reward that does the whole pass itself, such as one with a tokenizer of its own."""

    def score_tokens(self, request: ScoreRequest) -> TokenScores:
        """Scores of the request, as :func:`irl_align.reward.scoring.score_tokens` returns them."""


class TextScoring(RewardFunction, Protocol):
    """Mixin that adds rewards of texts to a function that scores token ids."""

    def text_format(self) -> tuple[PreTrainedTokenizerBase, Templated]:
        """The tokenizer of texts, and the template of prompts."""

    def score(self, prompts: Sequence[Any], completions: Sequence[str]) -> Tensor:
        """Reward of texts: prompts (strings or message lists) and completions; (B,).

        The recipe's template is applied, and EOS is appended: a text counts as finished.
        """
        return self.score_ids(*self.encode_texts(prompts, completions))

    def prefix_scores(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[Tensor]:
        """Reward after every token of each text, the empty completion first: (T + 1,) per row."""
        return self.prefix_scores_ids(*self.encode_texts(prompts, completions))

    def encode_texts(
        self, prompts: Sequence[Any], completions: Sequence[str]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and completions as token ids."""
        tokenizer, template = self.text_format()
        prompt_ids = encode_prompts(prompts, tokenizer, template)
        ids = encode_completions(prompts, completions, prompt_ids, tokenizer, template)
        return prompt_ids, ids


def require_finite(name: str, values: Tensor) -> None:
    """Raise UserError if scores (B, ...) are not finite; the error names the first such row."""
    if not values.isfinite().all():
        row = int((~values.reshape(len(values), -1).isfinite()).any(1).nonzero()[0])
        raise UserError(
            f"reward: {name} of completion {row} are not finite; expected finite ones: "
            "lower learning_rate in reward.args, or load the reward in float32"
        )
