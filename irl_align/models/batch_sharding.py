"""Each training step's batch split among processes, as one process would compute it.

A recipe's per_device_train_batch_size x gradient_accumulation_steps is the batch of one step, for
any number of processes. In one process a step takes micro-batches of B rows, and its loss is the
mean of their means. Several processes cut each micro-batch into pieces, and take the pieces in
turn. A piece's weight is its share of that mean. All processes must take part in a backward pass,
so a process that gets no piece, at the end of an epoch, computes some piece with weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from irl_align.errors import UserError

FACTOR = "piece_factor"  # key of a batch: what its loss is multiplied by


@dataclass(frozen=True)
class BatchSplit:
    """Rows of a micro-batch and micro-batches of a step: in one process, and in each of several."""

    whole_rows: int
    whole_steps: int
    rows: int
    steps: int

    @property
    def batch(self) -> int:
        """Rows of a step."""
        return self.whole_rows * self.whole_steps


def split_batch(rows: int, steps: int, processes: int, config: str) -> BatchSplit:
    """Fewer micro-batches for each process where that is enough, otherwise smaller ones too.

    Raises UserError where the processes cannot share the batch; config: name of the trainer's
    config, for the message.
    """
    common = math.gcd(steps, processes)
    pieces = processes // common
    if rows % pieces:
        raise UserError(
            f"recipe: args of {config}: found per_device_train_batch_size {rows} x "
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


def pieces_of_step(rows: Sequence[int], split: BatchSplit, processes: int) -> list[list[Piece]]:
    """Every process's pieces of one step's rows, the same number for each process."""
    wholes = [rows[i : i + split.whole_rows] for i in range(0, len(rows), split.whole_rows)]
    cut = [
        (list(whole[i : i + split.rows]), len(whole[i : i + split.rows]) / len(whole) / len(wholes))
        for whole in wholes
        for i in range(0, len(whole), split.rows)
    ]
    each = -(-len(cut) // processes)
    cut += [(cut[0][0], 0.0)] * (each * processes - len(cut))
    return [
        [Piece(numbers, weight * processes * each) for numbers, weight in cut[rank::processes]]
        for rank in range(processes)
    ]


class PieceSampler:
    """Batch sampler of one process: its pieces of every step of an epoch.

    order: the epoch's row numbers, the same in every process. count: how many rows there are.
    drop_last: leave out a last micro-batch with fewer rows than the others.
    """

    def __init__(
        self,
        order: Any,
        count: int,
        split: BatchSplit,
        *,
        rank: int,
        processes: int,
        drop_last: bool,
    ) -> None:
        self.order, self.split, self.rank, self.processes = order, split, rank, processes
        self.count = count - count % split.whole_rows if drop_last else count

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch to the order, where its numbers depend on it."""
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)

    def __len__(self) -> int:
        full, rest = divmod(self.count, self.split.batch)
        last = pieces_of_step(range(rest), self.split, self.processes)[0] if rest else []
        return full * self.split.steps + len(last)

    def __iter__(self) -> Iterator[Piece]:
        order = list(self.order)[: self.count]
        for start in range(0, len(order), self.split.batch):
            step = order[start : start + self.split.batch]
            yield from pieces_of_step(step, self.split, self.processes)[self.rank]


class PieceDataset(Dataset[Any]):
    """A dataset that a DataLoader asks for one Piece at a time."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, piece: Piece) -> tuple[list[Any], float]:
        return self.rows.__getitems__(piece.rows), piece.factor


@dataclass(frozen=True)
class PieceCollator:
    """A collator whose batches carry their factor; at a factor of 0 labels do not count."""

    collate: Callable[[list[Any]], Mapping[str, Any]]

    def __call__(self, piece: tuple[list[Any], float]) -> dict[str, Any]:
        rows, factor = piece
        batch = {**self.collate(rows), FACTOR: torch.tensor(factor)}
        if not factor and "labels" in batch:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        return batch


class PieceLoader(DataLoader[Any]):
    """A DataLoader of pieces that passes the epoch to the order of the rows."""

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers' Trainer, as on accelerate's loaders."""
        sampler: Any = self.batch_sampler
        sampler.set_epoch(epoch)
