"""The processes of one run: which one this is, and what they tell each other.

`accelerate launch` starts them, and :func:`joined` brings them together. All of them run the same
code. What one alone must do, the first does (:func:`is_main`); rows are spread over all, and what
comes of them is gathered in order, so that every process knows the same and decides the same. A
run of one process pays nothing for any of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from irl_align.errors import TryAgain, UserError
from irl_align.utils.watchdog import Watch

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Ids = Sequence[Sequence[int]]

WAIT = ("IRL_ALIGN_WAIT", 7200.0)
"""Seconds that a process waits for another's part of the work, at most."""
SILENCE = ("IRL_ALIGN_SILENCE", 120.0)
"""Seconds without a sign of life from a process after which the others end."""


@dataclass
class _State:
    rank: int = 0
    count: int = 1
    told: bool | None = None
    """Whether an error is told by this process and not by another; None before there is one."""
    group: Any = field(default=None, repr=False)
    """Of messages, beside the group of gradients."""


_here = _State()


def rank() -> int:
    """Number of this process, from 0."""
    return _here.rank


def count() -> int:
    """How many processes share the work; 1 inside :func:`alone`."""
    return _here.count


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return _here.rank == 0


def reports_errors() -> bool:
    """Whether this process is the one that tells what went wrong."""
    return launched()[0] == 0 if _here.told is None else _here.told


def launched() -> tuple[int, int]:
    """Rank and number of processes that a launcher has given this one; (0, 1) without one."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(os.environ.get(name) for name in names):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def own_device(device: torch.device) -> torch.device:
    """The device of this process among those of its machine, for a kind of device."""
    import torch

    if launched()[1] == 1 or device.type == "cpu":
        return device
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Bring the launched processes together for the block; inside another such block, nothing.

    device: of this one's models. An error in one process ends all of them: the first tells it.
    """
    if _here.count > 1 or launched()[1] == 1:
        yield
        return
    _join(device.type == "cpu")
    watch = Watch(_here.rank, _here.count, seconds(*SILENCE))
    try:
        yield
        barrier()
    except BaseException:
        _here.told = watch.fault()
        raise
    finally:
        watch.end()
        _here.rank, _here.count, _here.group = 0, 1, None


def _join(cpu: bool) -> None:
    import torch.distributed
    from accelerate import PartialState

    wait = timedelta(seconds=seconds(*WAIT))
    PartialState(cpu=cpu, timeout=wait)
    _here.group = torch.distributed.new_group(backend="gloo", timeout=wait)
    _here.rank, _here.count = torch.distributed.get_rank(), torch.distributed.get_world_size()


def seconds(name: str, default: float) -> float:
    """Value of an environment variable that holds seconds."""
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not value > 0.0:
        raise UserError(f"environment: {name}: found {text!r}, expected seconds above 0")
    return value


@contextmanager
def alone() -> Iterator[None]:
    """A block that one process runs while the others wait elsewhere: nothing in it is spread."""
    before = _here.count
    _here.count = 1
    try:
        yield
    finally:
        _here.count = before


def barrier() -> None:
    """Wait until every process is here."""
    if _here.count > 1:
        import torch.distributed

        torch.distributed.barrier(group=_here.group)


def broadcast(value: T) -> T:
    """The main process's value, in every process."""
    if _here.count == 1:
        return value
    import torch.distributed

    box: list[Any] = [value if is_main() else None]
    torch.distributed.broadcast_object_list(box, src=0, group=_here.group)
    found: T = box[0]
    return found


def gather(value: T) -> list[T]:
    """The values of all processes by rank, in every process."""
    if _here.count == 1:
        return [value]
    import torch.distributed

    found: list[Any] = [None] * _here.count
    torch.distributed.all_gather_object(found, value, group=_here.group)
    return found


def on_main(work: Callable[[], T]) -> T:
    """What `work` returns in the main process, which alone runs it, in every process."""
    if _here.count == 1:
        return work()
    with alone():
        found = _outcome(work) if is_main() else None
    return _result(broadcast(found))


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum over the processes, in place and returned; a tensor of any shape on their device."""
    if _here.count > 1:
        import torch.distributed

        own = _here.group if values.device.type == "cpu" else None  # NCCL knows GPUs alone
        torch.distributed.all_reduce(values, group=own)
    return values


def shares(weights: Sequence[float], parts: int) -> list[list[int]]:
    """Numbers of the rows in as many parts of about equal weight; in a part they are in order.

    The heaviest row that is left goes to the part that is lightest so far.
    """
    loads, found = [0.0] * parts, [list[int]() for _ in range(parts)]
    for number in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        lightest = min(range(parts), key=lambda p: (loads[p], p))
        found[lightest].append(number)
        loads[lightest] += weights[number]
    return [sorted(part) for part in found]


def over_rows(work: Callable[[list[int]], Sequence[T]], weights: Sequence[float]) -> list[T]:
    """What `work` makes of each row: it gets the numbers of this process's rows, one result each.

    All results, in the order of the rows, in every process; weights: of the rows' work.
    """
    if _here.count == 1:
        return list(work(list(range(len(weights)))))
    parts = shares(weights, _here.count)
    mine = parts[_here.rank]
    found: list[Any] = [None] * len(weights)
    outcomes = gather(_outcome(lambda: list(work(mine)) if mine else []))
    for part, values in zip(parts, map(_result, outcomes), strict=True):
        for number, value in zip(part, values, strict=True):
            found[number] = value
    return found


def _outcome(work: Callable[[], T]) -> T | UserError | TryAgain:
    """What work returns, or the error that it raises: then every process is to raise it."""
    try:
        return work()
    except (UserError, TryAgain) as error:
        return error


def _result(outcome: Any) -> Any:
    if isinstance(outcome, UserError | TryAgain):
        raise outcome
    return outcome


def over_sequences(
    work: Callable[[list[list[int]], list[list[int]]], Sequence[T]], prompts: Ids, completions: Ids
) -> list[T]:
    """What `work` makes of prompts and completions, a result per row, in every process.

    Each gets rows of about as many tokens; those of one prompt stay together.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(number)
    rows = list(groups.values())
    if _here.count == 1:
        return list(work([list(p) for p in prompts], [list(c) for c in completions]))

    def of_groups(numbers: list[int]) -> list[list[T]]:
        mine = [row for number in numbers for row in rows[number]]
        values = iter(work([list(prompts[i]) for i in mine], [list(completions[i]) for i in mine]))
        return [[next(values) for _ in rows[number]] for number in numbers]

    weights = [sum(len(prompts[i]) + len(completions[i]) for i in row) for row in rows]
    found = over_rows(of_groups, weights)
    order = {i: value for row, values in zip(rows, found, strict=True)
             for i, value in zip(row, values, strict=True)}  # fmt: skip
    return [order[i] for i in range(len(prompts))]
