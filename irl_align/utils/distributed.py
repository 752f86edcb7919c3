"""The processes of one run: which one this is, and how they share work and exchange results.

`accelerate launch` starts the processes, and :func:`joined` connects them. All of them run the same
code. Work for one process only is done by the main one (:func:`is_main`). Rows are divided among
all, and their results are gathered in order, so that every process has the same results and makes
the same decisions. With one process, none of this costs anything.
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
"""Environment variable and default: longest wait in seconds for another process's result."""
SILENCE = ("IRL_ALIGN_SILENCE", 120.0)
"""Environment variable and default: seconds without a heartbeat from a process after which the
others end."""


@dataclass
class _State:
    rank: int = 0
    count: int = 1
    reports: bool | None = None
    """Whether this process reports the error, and not another; None before there is an error."""
    group: Any = field(default=None, repr=False)
    """Process group of Python objects, apart from the group of gradients."""


_here = _State()


def rank() -> int:
    """Number of this process, from 0."""
    return _here.rank


def count() -> int:
    """Number of processes that share the work; 1 inside :func:`alone`."""
    return _here.count


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return _here.rank == 0


def reports_errors() -> bool:
    """Whether this process is the one that prints an error."""
    return launched()[0] == 0 if _here.reports is None else _here.reports


def launched() -> tuple[int, int]:
    """Rank and number of processes that the launcher has set; (0, 1) without a launcher."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(os.environ.get(name) for name in names):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def own_device(device: torch.device) -> torch.device:
    """This process's own device of the same kind as `device`."""
    import torch

    if launched()[1] == 1 or device.type == "cpu":
        return device
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Connect the launched processes for the block. A nested block has no effect.

    device: where this process's models run. An error in one process ends all of them, and the first
    one that fails reports it.
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
        _here.reports = watch.fault()
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
    """Seconds given by an environment variable. Raises UserError unless they are above 0."""
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
    """A block that one process runs while the others wait elsewhere: its work is not divided."""
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
    result: T = box[0]
    return result


def gather(value: T) -> list[T]:
    """The values of all processes by rank, in every process."""
    if _here.count == 1:
        return [value]
    import torch.distributed

    values: list[Any] = [None] * _here.count
    torch.distributed.all_gather_object(values, value, group=_here.group)
    return values


def on_main(work: Callable[[], T]) -> T:
    """Run `work` in the main process only. Every process gets its result, or raises its error."""
    if _here.count == 1:
        return work()
    with alone():
        outcome: Any = _outcome(work) if is_main() else None
    result: T = _result(broadcast(outcome))
    return result


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum over the processes, in place and returned; a tensor of any shape on their device."""
    if _here.count > 1:
        import torch.distributed

        own = _here.group if values.device.type == "cpu" else None  # NCCL sums on GPUs only
        torch.distributed.all_reduce(values, group=own)
    return values


def shares(weights: Sequence[float], parts: int) -> list[list[int]]:
    """Divide rows into parts of about equal weight; gives the rows' numbers, in order in a part.

    The heaviest row that is left goes to the part that is lightest so far.
    """
    loads, rows = [0.0] * parts, [list[int]() for _ in range(parts)]
    for number in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        lightest = min(range(parts), key=lambda p: (loads[p], p))
        rows[lightest].append(number)
        loads[lightest] += weights[number]
    return [sorted(part) for part in rows]


def over_rows(work: Callable[[list[int]], Sequence[T]], weights: Sequence[float]) -> list[T]:
    """Divide rows among the processes; every process gets all results, in the order of the rows.

    work: gets the numbers of this process's rows and returns one result for each. weights: the
    amount of work of each row.
    """
    if _here.count == 1:
        return list(work(list(range(len(weights)))))
    return _over_parts(work, shares(weights, _here.count))


def over_sequences(
    work: Callable[[list[list[int]], list[list[int]]], Sequence[T]], prompts: Ids, completions: Ids
) -> list[T]:
    """Divide prompts and completions among the processes by their tokens; as :func:`over_rows`.

    Rows of one prompt stay together. work: gets prompts and completions, and returns one result for
    each row.
    """

    def work_on(rows: Sequence[int]) -> Sequence[T]:
        return work([list(prompts[i]) for i in rows], [list(completions[i]) for i in rows])

    if _here.count == 1:
        return list(work_on(range(len(prompts))))
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_prompt.setdefault(tuple(prompt), []).append(row)
    groups = list(by_prompt.values())
    weights = [sum(len(prompts[i]) + len(completions[i]) for i in rows) for rows in groups]
    parts = shares(weights, _here.count)
    return _over_parts(
        work_on, [[row for group in part for row in groups[group]] for part in parts]
    )


def _over_parts(work: Callable[[list[int]], Sequence[T]], parts: list[list[int]]) -> list[T]:
    """Run `work` on this process's part; all results in the order of the rows."""
    mine = parts[_here.rank]
    outcomes = gather(_outcome(lambda: list(work(mine)) if mine else []))
    results: dict[int, T] = {}
    for part, outcome in zip(parts, outcomes, strict=True):
        results.update(zip(part, _result(outcome), strict=True))
    return [results[row] for row in range(len(results))]


def _outcome(work: Callable[[], T]) -> T | UserError | TryAgain:
    """The result of `work`, or its error as a value, so that every process can raise it."""
    try:
        return work()
    except (UserError, TryAgain) as error:
        return error


def _result(outcome: T | UserError | TryAgain) -> T:
    if isinstance(outcome, UserError | TryAgain):
        raise outcome
    return outcome
