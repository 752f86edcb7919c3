"""A reward whose rows the processes of a run share: each scores some, and all know all scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from irl_align.reward.model import Ids, RewardFunction
from irl_align.reward.scoring import TokenScores, score_tokens
from irl_align.utils import distributed


def spread(reward: RewardFunction) -> RewardFunction:
    """The reward as every process may ask it, all of them at once and for the same rows."""
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

    def score_tokens(
        self,
        prompts: Ids,
        completions: Ids,
        *,
        prefixes: bool,
        attention: bool,
        eos_prefixes: bool = False,
    ) -> TokenScores:
        """As :func:`irl_align.reward.scoring.score_tokens`."""

        def work(p: Ids, c: Ids) -> list[tuple[Tensor | None, ...]]:
            found = score_tokens(
                self.reward,
                p,
                c,
                prefixes=prefixes,
                attention=attention,
                eos_prefixes=eos_prefixes,
            )
            arrays = (found.rewards, found.prefixes, found.attention)
            # Copies of the rows: a view would be sent with all that it is a view of.
            return [
                tuple(None if a is None else a[i].clone() for a in arrays) for i in range(len(p))
            ]

        rewards, *arrays = zip(*distributed.over_sequences(work, prompts, completions), strict=True)
        return TokenScores(
            torch.stack(rewards),
            *(pad_sequence(list(rows), batch_first=True) if asked else None
              for rows, asked in zip(arrays, (prefixes, attention), strict=True)),
        )  # fmt: skip
