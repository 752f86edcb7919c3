"""One training's batches split among processes: every row once, each with its weight."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accelerate.data_loader import skip_first_batches

from irl_align.errors import UserError
from irl_align.models.batch_sharding import (
    FACTOR,
    BatchSplit,
    Piece,
    PieceCollator,
    PieceDataset,
    PieceLoader,
    PieceSampler,
    pieces_of_step,
    split_batch,
)
from irl_align.models.trl import LengthGroups


@pytest.mark.parametrize(
    ("rows", "steps", "processes", "expected"),
    [
        (16, 4, 2, (16, 2)),  # fewer steps first
        (16, 1, 2, (8, 1)),
        (16, 2, 4, (8, 1)),
        (6, 4, 8, (3, 1)),
        (5, 3, 3, (5, 1)),
    ],
)
def test_split_batch_takes_fewer_micro_batches_then_smaller_ones(
    rows: int, steps: int, processes: int, expected: tuple[int, int]
) -> None:
    split = split_batch(rows, steps, processes, "SFTConfig")
    assert (split.rows, split.steps) == expected
    assert split.rows * split.steps * processes == split.batch == rows * steps


def test_split_batch_refuses_a_batch_that_processes_cannot_share() -> None:
    with pytest.raises(UserError, match=r"SFTConfig: found per_device_train_batch_size 3 x .* 2"):
        split_batch(3, 1, 2, "SFTConfig")


def mean_of_means(values: Sequence[float], rows: int) -> float:
    parts = [values[i : i + rows] for i in range(0, len(values), rows)]
    return sum(sum(part) / len(part) for part in parts) / len(parts)


def test_pieces_of_step_weigh_as_the_micro_batches_of_one_process() -> None:
    """Loss over accumulation steps and processes, as trainer and DDP divide it."""
    draw = random.Random(1)
    for _ in range(200):
        rows, steps = draw.choice([2, 4, 6, 12]), draw.choice([1, 2, 3, 4])
        processes = draw.choice([1, 2, 3, 4])
        if rows * steps % processes or rows % (processes // divisor(steps, processes)):
            continue
        split = split_batch(rows, steps, processes, "x")
        losses = [draw.random() for _ in range(draw.randint(1, split.batch))]
        shared = pieces_of_step(range(len(losses)), split, processes)
        each = len(shared[0])
        assert all(len(pieces) == each <= split.steps for pieces in shared)
        total = sum(
            piece.factor * sum(losses[i] for i in piece.rows) / len(piece.rows) / each
            for pieces in shared
            for piece in pieces
        )
        assert total / processes == pytest.approx(mean_of_means(losses, rows))
        counted = [i for pieces in shared for p in pieces if p.factor for i in p.rows]
        assert sorted(counted) == list(range(len(losses)))


def divisor(a: int, b: int) -> int:
    return a if b == 0 else divisor(b, a % b)


def loaders(split: BatchSplit, processes: int, rows: int, drop_last: bool = False) -> list[Any]:
    class Table:
        def __len__(self) -> int:
            return rows

        def __getitems__(self, numbers: list[int]) -> list[dict[str, int]]:
            return [{"row": number} for number in numbers]

    def collate(actual: list[dict[str, int]]) -> dict[str, Any]:
        numbers = torch.tensor([row["row"] for row in actual])
        return {"rows": numbers, "labels": numbers.clone()}

    def order() -> LengthGroups:
        return LengthGroups(split.batch, list(range(rows)), 7, lambda: 0)

    return [
        PieceLoader(
            PieceDataset(Table()),
            batch_sampler=PieceSampler(
                order(), rows, split, rank=rank, processes=processes, drop_last=drop_last
            ),
            collate_fn=PieceCollator(collate),
        )
        for rank in range(processes)
    ]


def test_piece_loader_gives_every_row_once_and_fillers_without_labels() -> None:
    split = split_batch(4, 2, 2, "x")
    both = [list(loader) for loader in loaders(split, 2, 8 + 8 + 3)]
    assert [len(batches) for batches in both] == [3, 3] == [len(x) for x in loaders(split, 2, 19)]
    counted = [b for batches in both for b in batches if b[FACTOR]]
    assert sorted(int(i) for b in counted for i in b["rows"]) == list(range(19))
    (filler,) = [b for batches in both for b in batches if not b[FACTOR]]
    assert set(filler["labels"].tolist()) == {-100}
    # A step's rows are those of one process.
    order = list(LengthGroups(8, list(range(19)), 7, lambda: 0))
    first = sorted(int(i) for batches in both for i in batches[0]["rows"])
    assert first == sorted(order[:8])


def test_piece_loader_resumes_in_the_middle_of_an_epoch() -> None:
    (loader, *_) = loaders(split_batch(4, 2, 2, "x"), 2, 19)
    rest = list(skip_first_batches(loader, 2))
    assert len(rest) == 1
    assert rest[0]["rows"].tolist() == list(loader)[2]["rows"].tolist()


def test_piece_sampler_drop_last_leaves_complete_micro_batches() -> None:
    both = [list(loader) for loader in loaders(split_batch(4, 2, 2, "x"), 2, 14, drop_last=True)]
    assert sum(len(b["rows"]) for batches in both for b in batches if b[FACTOR]) == 12


def test_piece_factor_undoes_what_the_trainer_divides_by() -> None:
    split = BatchSplit(whole_rows=4, whole_steps=1, rows=2, steps=1)
    assert pieces_of_step([8, 9, 7], split, 2) == [
        [Piece([8, 9], pytest.approx(4 / 3))],
        [Piece([7], pytest.approx(2 / 3))],
    ]
