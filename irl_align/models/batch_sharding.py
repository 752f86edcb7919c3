"""One training's batches divided among processes, so that every step sees the rows it would see in
one process, each with the same weight.

A recipe's per_device_train_batch_size x gradient_accumulation_steps is the batch of one step, on
any number of processes. In one process a step takes micro-batches of B rows, and its loss is the
mean of their means. Here each is cut into pieces that the processes take in turn. A piece's weight
is its share of that mean; a process that gets none, at the end of an epoch, computes some piece
with weight 0, for all of them must take part in a backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from irl_align.errors import UserError

SHARE = "share"  # of a batch: what its loss is multiplied by


@dataclass(frozen=True)
class BatchSplit:
    """How a step's batch is divided: rows of a micro-batch and micro-batches of a step, before
    (in one process) and after (in each)."""

    whole_rows: int
    whole_steps: int
    rows: int
    steps: int

    @property
    def batch(self) -> int:
        """Rows of a step."""
        return self.whole_rows * self.whole_steps


def divide(rows: int, steps: int, processes: int, of: str) -> BatchSplit:
    """Fewer micro-batches for each process where that is enough, and else smaller ones too.

    Raises UserError where `of`, the trainer's config, has a batch that cannot be divided.
    """
    common = math.gcd(steps, processes)
    pieces = processes // common
    if rows % pieces:
        raise UserError(
            f"recipe: args of {of}: found per_device_train_batch_size {rows} x "
            f"gradient_accumulation_steps {steps}, expected a batch that {processes} processes can "
            f"share: a multiple of {processes}, each with as many rows at once"
        )
    return BatchSplit(rows, steps, rows // pieces, steps // common)


@dataclass(frozen=True)
class Piece:
    """Row numbers of one micro-batch of a process, and what its loss is multiplied by.

    The trainer divides a loss by the micro-batches of its process's step, and gradients by the
    number of processes: `factor` is the piece's weight in the step's mean times both.
    """

    rows: list[int]
    factor: float


def pieces_of_step(rows: Sequence[int], how: BatchSplit, processes: int) -> list[list[Piece]]:
    """Every process's pieces of one step's rows, as many for each."""
    wholes = [rows[i : i + how.whole_rows] for i in range(0, len(rows), how.whole_rows)]
    cut = [
        (list(whole[i : i + how.rows]), len(whole[i : i + how.rows]) / len(whole) / len(wholes))
        for whole in wholes
        for i in range(0, len(whole), how.rows)
    ]
    each = -(-len(cut) // processes)
    cut += [(cut[0][0], 0.0)] * (each * processes - len(cut))
    return [
        [Piece(numbers, weight * processes * each) for numbers, weight in cut[rank::processes]]
        for rank in range(processes)
    ]


class Pieces:
    """Batch sampler of one process: its pieces of every step of an epoch.

    order: the epoch's rows, the same in every process; drop_last: leave out a micro-batch that is
    not whole.
    """

    def __init__(
        self, order: Any, count: int, how: BatchSplit, rank: int, processes: int, drop_last: bool
    ) -> None:
        self.order, self.how, self.rank, self.processes = order, how, rank, processes
        self.count = count - count % how.whole_rows if drop_last else count

    def set_epoch(self, epoch: int) -> None:
        """Tell the order, where it does not know by itself."""
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)

    def __len__(self) -> int:
        full, rest = divmod(self.count, self.how.batch)
        last = pieces_of_step(range(rest), self.how, self.processes)[0] if rest else []
        return full * self.how.steps + len(last)

    def __iter__(self) -> Iterator[Piece]:
        order = list(self.order)[: self.count]
        for start in range(0, len(order), self.how.batch):
            step = order[start : start + self.how.batch]
            yield from pieces_of_step(step, self.how, self.processes)[self.rank]


class Rows(Dataset[Any]):
    """A dataset whose batches are asked for by a Piece."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, piece: Piece) -> tuple[list[Any], float]:
        return self.rows.__getitems__(piece.rows), piece.factor


@dataclass(frozen=True)
class Collated:
    """A collator's batch with its share; the labels of a share of 0 do not count."""

    collate: Callable[[list[Any]], Mapping[str, Any]]

    def __call__(self, found: tuple[list[Any], float]) -> dict[str, Any]:
        rows, factor = found
        batch = {**self.collate(rows), SHARE: torch.tensor(factor)}
        if not factor and "labels" in batch:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        return batch


class PiecesLoader(DataLoader[Any]):
    """A DataLoader of pieces that passes the epoch on to the order of the rows."""

    def set_epoch(self, epoch: int) -> None:
        """As accelerate's loaders."""
        sampler: Any = self.batch_sampler
        sampler.set_epoch(epoch)
