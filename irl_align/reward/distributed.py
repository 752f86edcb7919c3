"""A reward whose rows the processes of a run share: each scores some, and all get all scores."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from irl_align.models.packing import Ids
from irl_align.reward.protocol import RewardFunction, ScoreRequest, TokenScores
from irl_align.reward.scoring import score_tokens
from irl_align.utils import distributed


def spread(reward: RewardFunction) -> RewardFunction:
    """The reward in a form that all processes may call at once with the same rows."""
    return reward if distributed.count() == 1 else SpreadReward(reward)


class SpreadReward:
    """A RewardFunction and TokenScorer that spreads the rows over the processes."""

    def __init__(self, reward: RewardFunction) -> None:
        self.reward = reward

    def score_ids(self, prompts: Ids, completions: Ids) -> Tensor:
        """Reward of whole completions: (B,)."""
        return torch.tensor(
            distributed.over_sequences(
                lambda p, c: self.reward.score_ids(p, c).tolist(), prompts, completions
            )
        )

    def prefix_scores_ids(self, prompts: Ids, completions: Ids) -> list[Tensor]:
        """Reward of every prefix of each completion, the empty one first: (T + 1,) per row."""
        return distributed.over_sequences(self.reward.prefix_scores_ids, prompts, completions)

    def score_tokens(self, request: ScoreRequest) -> TokenScores:
        """As :func:`irl_align.reward.scoring.score_tokens`."""

        def work(prompts: Ids, completions: Ids) -> list[tuple[Tensor | None, ...]]:
            own = replace(request, prompts=prompts, completions=completions)
            scores = score_tokens(self.reward, own)
            arrays = (scores.rewards, scores.prefixes, scores.attention, scores.terminal)
            # Copies of the rows: pickling a view would send all of the tensor behind it.
            return [
                tuple(None if array is None else array[i].clone() for array in arrays)
                for i in range(len(prompts))
            ]

        rows = distributed.over_sequences(work, request.prompts, request.completions)
        rewards, prefixes, attention, terminal = zip(*rows, strict=True)
        return TokenScores(
            torch.stack(rewards),
            pad_sequence(list(prefixes), batch_first=True) if request.prefixes else None,
            pad_sequence(list(attention), batch_first=True) if request.attention else None,
            None if terminal[0] is None else torch.stack(terminal),
        )
