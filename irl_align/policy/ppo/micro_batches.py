"""Micro-batches of a rollout: completions packed into rows, and cut by a budget of tokens.

Letters beyond the package's legend of shapes: R rows, M completion tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from irl_align.models.packing import Ids, model_inputs, pack_rows, row_lengths, share_prompts
from irl_align.utils import distributed

_PADDING = 0.03  # largest share of a micro-batch's slots that may be padding
_FEW = 512  # slots below which one more row is cheaper than another forward pass


@dataclass(frozen=True)
class MicroBatch:
    """Packed rows on the device, and the columns of their completion tokens."""

    inputs: dict[str, Any]
    """Arguments of the models' forward."""
    state_index: Tensor
    """(M,) index of the state s_t in (R * L): the token before y_t."""
    targets: Tensor
    """(M,) y_t."""
    token_index: Tensor
    """(M,) index of y_t in the rollout's (B, T), flattened."""
    slots: int
    """R * L, padding included."""
    counted: bool = True
    """False for a copy of another process's rows: all processes must take part in every pass."""


class PackedRollout:
    """A rollout's completions in packed rows, which `batches` cuts into micro-batches.

    share: whether completions of one prompt share a row. even: whether every process must get the
    same number of micro-batches.
    """

    def __init__(
        self,
        prompts: Ids,
        completions: Ids,
        *,
        share: bool,
        pad: int,
        max_tokens: int,
        device: torch.device,
        even: bool = False,
    ) -> None:
        self.prompts, self.completions, self.share = prompts, completions, share
        self.shape = (len(completions), max(map(len, completions)))
        self.pad, self.max_tokens, self.device, self.even = pad, max_tokens, device, even

    @cached_property
    def whole(self) -> list[MicroBatch]:
        """Micro-batches of all completions."""
        return self.batches(range(len(self.completions)))

    @cached_property
    def tokens(self) -> int:
        """Tokens of the rows of all completions, without padding."""
        return sum(row_lengths(self.prompts, self.completions, self._rows(range(self.shape[0]))))

    def batches(self, numbers: Sequence[int]) -> list[MicroBatch]:
        """Micro-batches of the completions with these numbers, sorted by the length of their rows:
        this process's share.

        With `even` some processes get copies at the end, which do not count.
        """
        rows = self._rows(numbers)
        lengths = row_lengths(self.prompts, self.completions, rows)
        cuts = []
        for share in distributed.shares(lengths, distributed.count()):
            batches = padded_batches([lengths[r] for r in share], self.max_tokens)
            cuts.append([[rows[share[i]] for i in batch] for batch in batches])
        own = cuts[distributed.rank() % len(cuts)]
        out = [self._micro_batch(cut) for cut in own]
        if idle := max(map(len, cuts)) - len(own) if self.even else 0:
            filler = replace(self._micro_batch(own[-1] if own else cuts[0][0]), counted=False)
            out += [filler] * idle
        return out

    def _rows(self, numbers: Sequence[int]) -> list[list[int]]:
        """The completions with these numbers in packed rows."""
        prompts, completions = self.prompts, self.completions
        chosen = [prompts[i] for i in numbers], [completions[i] for i in numbers]
        return [[numbers[i] for i in row] for row in share_prompts(*chosen, self.share)]

    def _micro_batch(self, members: Sequence[Sequence[int]]) -> MicroBatch:
        packed = pack_rows(self.prompts, self.completions, members, self.pad)
        inputs = model_inputs(packed)
        if packed.position_ids is None:
            # Every row has one completion, and padding comes last: causal attention needs no mask,
            # and is faster without one.
            del inputs["attention_mask"]
        places = packed.places()  # (b, T + 1)
        step = torch.arange(places.shape[1] - 1)
        real = step < packed.length[:, None]
        row = packed.row[:, None].expand_as(real)[real]
        numbers = torch.tensor([number for member in members for number in member])
        return MicroBatch(
            {n: v.to(self.device) if isinstance(v, Tensor) else v for n, v in inputs.items()},
            (row * packed.input_ids.shape[1] + places[:, :-1][real]).to(self.device),
            packed.input_ids[row, places[:, 1:][real]].to(self.device),
            (numbers[:, None] * self.shape[1] + step)[real].to(self.device),
            packed.input_ids.numel(),
        )


def padded_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length: at most max_tokens slots, little of it padding.

    A row longer than max_tokens is a batch of its own.
    """
    batch: list[int] = []
    longest = real = 0
    for number in np.argsort(-np.asarray(lengths), kind="stable"):
        length = int(lengths[number])
        slots = (len(batch) + 1) * longest
        wasted = slots - real - length
        if batch and (slots > max_tokens or (slots > _FEW and wasted > _PADDING * slots)):
            yield batch
            batch, real = [], 0
        if not batch:
            longest = length
        batch.append(int(number))
        real += length
    if batch:
        yield batch
