"""The parts of a run in several processes that one process can be asked about."""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.data_loader import skip_first_batches

from irl_align.errors import TryAgain, UserError
from irl_align.models.batch_sharding import (
    SHARE,
    BatchSplit,
    Collated,
    Piece,
    Pieces,
    PiecesLoader,
    Rows,
    divide,
    pieces_of_step,
)
from irl_align.models.trl import LengthGroups
from irl_align.utils import distributed

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"


def test_shares_lose_nothing_and_are_about_equal() -> None:
    draw = random.Random(0)
    for _ in range(50):
        weights = [draw.randint(1, 200) for _ in range(draw.randint(0, 40))]
        parts = distributed.shares(weights, count := draw.randint(1, 6))
        assert sorted(i for part in parts for i in part) == list(range(len(weights)))
        loads = [sum(weights[i] for i in part) for part in parts]
        assert len(parts) == count
        assert max(loads) - min(loads) <= max(weights, default=0)
    assert distributed.shares([3, 1, 2], 1) == [[0, 1, 2]]
    assert distributed.shares([5, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5]]
    assert distributed.shares([7], 3) == [[0], [], []]


def test_one_process_is_all_there_is() -> None:
    assert (distributed.rank(), distributed.count(), distributed.is_main()) == (0, 1, True)
    assert distributed.broadcast("a") == "a"
    assert distributed.gather(2) == [2]
    assert distributed.on_main(lambda: 3) == 3
    found = distributed.over_sequences(lambda p, c: [len(x) for x in c], [[1], [2]], [[1, 2], [3]])
    assert found == [2, 1]
    numbers = torch.arange(3)
    assert distributed.total(numbers) is numbers and numbers.tolist() == [0, 1, 2]
    with distributed.joined(torch.device("cpu")):
        distributed.barrier()
        assert distributed.count() == 1


def test_a_launcher_is_seen_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.launched() == (0, 1)
    cuda = torch.device("cuda")
    assert distributed.own_device(cuda) == cuda
    launch = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}
    for name, value in {**launch, "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.launched() == (3, 4)
    assert distributed.own_device(cuda) == torch.device("cuda:1")
    assert not distributed.reports_errors()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert distributed.own_device(cuda) == torch.device("cpu")


def test_seconds_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IRL_ALIGN_WAIT", raising=False)
    assert distributed.seconds("IRL_ALIGN_WAIT", 5.0) == 5.0
    monkeypatch.setenv("IRL_ALIGN_WAIT", "2.5")
    assert distributed.seconds("IRL_ALIGN_WAIT", 5.0) == 2.5
    for bad in ("soon", "0", "nan"):
        monkeypatch.setenv("IRL_ALIGN_WAIT", bad)
        with pytest.raises(UserError, match=re.escape(f"IRL_ALIGN_WAIT: found '{bad}'")):
            distributed.seconds("IRL_ALIGN_WAIT", 5.0)


@pytest.mark.parametrize("error", [UserError("mend it"), TryAgain("once more")])
def test_an_error_that_all_are_to_raise_is_a_value_on_its_way(error: Exception) -> None:
    def fail() -> None:
        raise error

    outcome = distributed._outcome(fail)
    assert outcome is error
    with pytest.raises(type(error), match=str(error)):
        distributed._result(outcome)


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
def test_a_step_is_divided(
    rows: int, steps: int, processes: int, expected: tuple[int, int]
) -> None:
    how = divide(rows, steps, processes, "SFTConfig")
    assert (how.rows, how.steps) == expected
    assert how.rows * how.steps * processes == how.batch == rows * steps


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UserError, match=r"SFTConfig: found per_device_train_batch_size 3 x .* 2"):
        divide(3, 1, 2, "SFTConfig")


def mean_of_means(values: Sequence[float], rows: int) -> float:
    parts = [values[i : i + rows] for i in range(0, len(values), rows)]
    return sum(sum(part) / len(part) for part in parts) / len(parts)


def test_the_pieces_of_a_step_weigh_as_its_micro_batches() -> None:
    """Loss over accumulation steps and processes, as trainer and DDP divide it."""
    draw = random.Random(1)
    for _ in range(200):
        rows, steps = draw.choice([2, 4, 6, 12]), draw.choice([1, 2, 3, 4])
        processes = draw.choice([1, 2, 3, 4])
        if rows * steps % processes or rows % (processes // divisor(steps, processes)):
            continue
        how = divide(rows, steps, processes, "x")
        losses = [draw.random() for _ in range(draw.randint(1, how.batch))]
        shared = pieces_of_step(range(len(losses)), how, processes)
        each = len(shared[0])
        assert all(len(pieces) == each <= how.steps for pieces in shared)
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


def loaders(how: BatchSplit, processes: int, rows: int, drop_last: bool = False) -> list[Any]:
    class Table:
        def __len__(self) -> int:
            return rows

        def __getitems__(self, numbers: list[int]) -> list[dict[str, int]]:
            return [{"row": number} for number in numbers]

    def collate(found: list[dict[str, int]]) -> dict[str, Any]:
        numbers = torch.tensor([row["row"] for row in found])
        return {"rows": numbers, "labels": numbers.clone()}

    def order() -> LengthGroups:
        return LengthGroups(how.batch, list(range(rows)), 7, lambda: 0)

    return [
        PiecesLoader(
            Rows(Table()),
            batch_sampler=Pieces(order(), rows, how, rank, processes, drop_last),
            collate_fn=Collated(collate),
        )
        for rank in range(processes)
    ]


def test_every_row_is_seen_once_and_fillers_do_not_count() -> None:
    how = divide(4, 2, 2, "x")
    both = [list(loader) for loader in loaders(how, 2, 8 + 8 + 3)]
    assert [len(batches) for batches in both] == [3, 3] == [len(x) for x in loaders(how, 2, 19)]
    counted = [b for batches in both for b in batches if b[SHARE]]
    assert sorted(int(i) for b in counted for i in b["rows"]) == list(range(19))
    (filler,) = [b for batches in both for b in batches if not b[SHARE]]
    assert set(filler["labels"].tolist()) == {-100}
    # A step's rows are those of one process.
    order = list(LengthGroups(8, list(range(19)), 7, lambda: 0))
    first = sorted(int(i) for batches in both for i in batches[0]["rows"])
    assert first == sorted(order[:8])


def test_a_resumed_epoch_goes_on_where_it_was() -> None:
    (loader, *_) = loaders(divide(4, 2, 2, "x"), 2, 19)
    rest = list(skip_first_batches(loader, 2))
    assert len(rest) == 1
    assert rest[0]["rows"].tolist() == list(loader)[2]["rows"].tolist()


def test_dropping_the_last_leaves_whole_micro_batches() -> None:
    both = [list(loader) for loader in loaders(divide(4, 2, 2, "x"), 2, 14, drop_last=True)]
    assert sum(len(b["rows"]) for batches in both for b in batches if b[SHARE]) == 12


def test_a_piece_is_scaled_by_what_the_trainer_divides_by() -> None:
    how = BatchSplit(whole_rows=4, whole_steps=1, rows=2, steps=1)
    assert pieces_of_step([8, 9, 7], how, 2) == [
        [Piece([8, 9], pytest.approx(4 / 3))],
        [Piece([7], pytest.approx(2 / 3))],
    ]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed-zero2", "deepspeed-zero3"])
def test_accelerate_knows_the_configs(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    config = ClusterConfig.from_yaml_file(yaml_file=str(path))
    assert config.num_processes == 8 and config.mixed_precision == "no"
    plain = yaml.safe_load(path.read_text())
    assert set(plain) <= set(ClusterConfig.__dataclass_fields__)
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    if name.startswith("deepspeed"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
