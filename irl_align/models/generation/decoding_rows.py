"""The samples that are being drawn, one per row: their state, on the CPU.

Dimensions: B rows in a batch, P prompt tokens, T completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from irl_align.errors import UserError
from irl_align.models.generation.protocol import Completion, completed


@dataclass
class DecodingRows:
    """State of the samples of a batch."""

    prompt: np.ndarray  # (B,) index of the prompt
    sample: np.ndarray  # (B,) index of the sample
    prompt_length: np.ndarray  # (B,) P
    limit: np.ndarray  # (B,) most completion tokens
    count: np.ndarray  # (B,) completion tokens so far
    live: np.ndarray  # (B,) bool
    uniforms: np.ndarray  # (B, T) float64
    tokens: np.ndarray  # (B, T) int64
    logprobs: np.ndarray  # (B, T) float32

    def __len__(self) -> int:
        return len(self.prompt)

    def take(self, rows: np.ndarray) -> DecodingRows:
        """The rows with these numbers."""
        return DecodingRows(*(getattr(self, field.name)[rows] for field in fields(self)))

    @staticmethod
    def concatenate(parts: list[DecodingRows]) -> DecodingRows:
        """All rows of the parts, in order."""
        names = [field.name for field in fields(DecodingRows)]
        return DecodingRows(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in names)
        )

    @property
    def cached(self) -> np.ndarray:
        """(B,) cache columns in use: the prompt and all tokens but the newest."""
        columns: np.ndarray = self.prompt_length + self.count - 1
        return columns

    def append(self, tokens: np.ndarray, logprobs: np.ndarray, eos: Sequence[int]) -> np.ndarray:
        """Add one token (B,) to each live row; return the numbers of the rows that it completes.

        Raises UserError where a log-prob is not finite.
        """
        live = np.flatnonzero(self.live)
        tokens, logprobs = tokens[live], logprobs[live]
        if not np.isfinite(logprobs).all():
            worst = live[np.flatnonzero(~np.isfinite(logprobs))[0]]
            raise UserError(
                f"prompt {self.prompt[worst]}: the policy's logits are NaN or infinite at "
                f"completion token {self.count[worst]}, expected finite ones; did training diverge?"
            )
        self.tokens[live, self.count[live]] = tokens
        self.logprobs[live, self.count[live]] = logprobs
        self.count[live] += 1
        stopped = np.isin(tokens, eos)
        done: np.ndarray = live[stopped | (self.count[live] == self.limit[live])]
        self.live[done] = False
        return done

    def completion(self, row: int, eos: Sequence[int]) -> Completion:
        """The completion of a row that is done."""
        count = self.count[row]
        tokens = self.tokens[row, :count].tolist()
        return completed(tokens, self.logprobs[row, :count].copy(), eos)
