"""The interface of reward functions, and the request and result of one scoring pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from irl_align.data.encoding import Templated, encode_completions, encode_prompts
from irl_align.data.rows import Completion, Prompt, completion_text, exchanges
from irl_align.errors import UserError
from irl_align.models.packing import Ids
from irl_align.reward.conversations import encode_conversations, encode_samples


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
    terminal: Tensor | None = None
    """Part of `rewards` that belongs to the last token and is not distributed, such as that of a
    user's functions: (B,). `prefixes` are without it."""


@runtime_checkable
class TokenScorer(Protocol):
    """A reward that does the whole pass itself, such as one with a tokenizer of its own."""

    def score_tokens(self, request: ScoreRequest) -> TokenScores:
        """Scores of the request, as :func:`irl_align.reward.scoring.score_tokens` returns them."""


@dataclass(frozen=True)
class TextFormat:
    """How a reward reads texts as token ids."""

    tokenizer: PreTrainedTokenizerBase
    template: Templated
    foreign: bool = False
    """Whether the reward was not fitted here: a chat template then renders prompt and answer at
    once, and the reward reads all that it writes."""
    pad: int | None = None
    """Pad token of a reward that was not fitted here: transformers reads no score at it."""

    def encode(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Completion],
        finished: Sequence[bool] | None = None,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and answers as token ids.

        finished: whether a sampled answer has an end; nothing follows one that has none. None for
        texts of data, which are finished and hold no special token. Raises UserError: the template
        cannot render a row, or a text of data holds a special token.
        """
        if self.foreign and self.template.template == "chat":
            every = [True] * len(answers)
            given = finished or every
            return encode_conversations(prompts, answers, given, self.tokenizer, self.pad)
        if finished is not None:
            texts = [completion_text(answer) for answer in answers]
            return encode_samples(prompts, texts, finished, self.tokenizer, self.template)
        prompt_ids = encode_prompts(prompts, self.tokenizer, self.template)
        ids = encode_completions(prompts, answers, prompt_ids, self.tokenizer, self.template)
        return prompt_ids, ids


class TextScoring(RewardFunction, Protocol):
    """Mixin that adds rewards of texts to a function that scores token ids."""

    def text_format(self) -> TextFormat:
        """How texts are read."""

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion] | None = None
    ) -> Tensor:
        """Reward of completions after prompts, which are texts or lists of messages: (B,).

        Without completions each prompt is a conversation that ends with the answer. The reward's
        template is applied with the end of the answer: a text counts as finished. Raises UserError:
        a row has no answer, or the template cannot render it.
        """
        return self.score_ids(*self.text_format().encode(*exchanges(prompts, completions)))

    def prefix_scores(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion] | None = None
    ) -> list[Tensor]:
        """Reward after every token of each text, the empty completion first: (T + 1,) per row."""
        return self.prefix_scores_ids(*self.text_format().encode(*exchanges(prompts, completions)))


def require_finite(name: str, values: Tensor) -> None:
    """Raise UserError if scores (B, ...) are not finite; the error names the first such row."""
    if not values.isfinite().all():
        row = int((~values.reshape(len(values), -1).isfinite()).any(1).nonzero()[0])
        raise UserError(
            f"reward: {name} of completion {row} are not finite; expected finite ones: "
            "lower learning_rate in reward.args, or load the reward in float32"
        )
