"""What of a store of stages can be deleted, and its deletion.

Kept are the stages that a run beside the store links, with all that went into them, and what an
unfinished run would go on from. Nothing here imports torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irl_align.errors import UserError
from irl_align.training.run_folder import Run, RunView, is_run
from irl_align.training.store import DAMAGED, RECORD, SCRATCH, WORK
from irl_align.utils.files import files_of, is_sealed, locked, read_json

MEND = "run prune again when the file has been mended or deleted"


@dataclass(frozen=True)
class Waste:
    """Something that can be deleted."""

    path: Path
    bytes: int
    why: str


@dataclass(frozen=True)
class Findings:
    """What prune found below a folder of runs."""

    waste: list[Waste]
    kept: int
    """Bytes of the store that are needed."""
    runs: list[str]
    """Names of the runs that were looked at; an unfinished one is marked so."""

    @property
    def bytes(self) -> int:
        """Of all that can be deleted."""
        return sum(waste.bytes for waste in self.waste)


def runs_folder(path: Path) -> Path:
    """The folder of runs that is meant: it, or its store. UserError where there is no store."""
    folder = path.parent if path.name == "store" else path
    if not (folder / "store").is_dir():
        raise UserError(f"{path}: found no store of stages, expected the folder of runs beside one")
    return folder


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Keep every run of the folder from starting; UserError where one is under way."""

    def refuse(name: str) -> Callable[[str], None]:
        def busy(holder: str) -> None:
            raise UserError(f"run {name} is in use by {holder}: prune when it is done")

        return busy

    with ExitStack() as stack:
        for path in sorted(folder.iterdir()):
            if is_run(path):
                stack.enter_context(locked(path / ".lock", refuse(path.name)))
        yield


def find_waste(folder: Path) -> Findings:
    """What in the store of a folder of runs no run needs. UserError: a run or a record is damaged,
    so that it cannot be told what is needed."""
    views = [Run.load(path) for path in sorted(folder.iterdir()) if is_run(path)]
    store = folder / "store"
    committed = {path.name: path for path in sorted(store.glob("[!.]*")) if path.is_dir()}
    needed = _with_inputs({name for view in views for name in _linked(view)}, committed)
    unfinished = [view for view in views if view.summary is None]
    waste = [
        Waste(path, _size(path), "no run beside the store links it")
        for name, path in committed.items()
        if name not in needed
    ]
    for path in sorted((store / WORK).glob("*")):
        if path.is_dir():
            waste += _unfinished(path, committed, bool(unfinished))
    total = _size(store)
    names = [v.folder.name + (" (unfinished)" if v in unfinished else "") for v in views]
    return Findings(waste, total - sum(one.bytes for one in waste), names)


def delete(found: Findings) -> None:
    """Delete what was found. Hold the runs meanwhile; a stage that is being built is left alone."""
    for waste in found.waste:
        lock = waste.path.parent / f"{waste.path.name}.lock"
        if waste.path.parent.name == WORK and lock.exists():
            with _unless_held(lock) as free:
                if free:
                    shutil.rmtree(waste.path)
        else:
            shutil.rmtree(waste.path)


def _linked(view: RunView) -> Iterator[str]:
    for stage in view.stages.values():
        yield Path(str(stage.get("path", ""))).name


def _with_inputs(names: set[str], committed: dict[str, Path]) -> set[str]:
    """Names of stages and, by the keys in their records, of all that they were made from."""
    by_key = {name.rpartition("-")[2]: name for name in committed}
    found, left = set[str](), [name for name in names if name in committed]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        record: Any = read_json(committed[name] / RECORD, "the record of a finished stage", MEND)
        inputs = record.get("inputs", {})
        for value in inputs.values() if isinstance(inputs, dict) else ():
            parts = str(value).replace("+", " ").replace("/", " ").replace("@", " ").split()
            left += [by_key[part] for part in parts if part in by_key]
    return found


def _unfinished(path: Path, committed: dict[str, Path], wanted: bool) -> Iterator[Waste]:
    """Waste of a folder of work; `wanted`: a run beside it is to go on."""
    if path.name.endswith(DAMAGED):
        yield Waste(path, _size(path), "damaged, and built anew")
    elif path.name in committed:
        yield Waste(path, _size(path), "left over: the stage is finished")
    elif not wanted:
        yield Waste(path, _size(path), "unfinished, and no run beside it is")
    else:
        sealed = [c for c in (path / SCRATCH).glob("checkpoint-*") if is_sealed(c)]
        newest = max(sealed, key=lambda c: int(c.name.split("-")[1]), default=None)
        for checkpoint in sorted((path / SCRATCH).glob("checkpoint-*")):
            if newest is not None and checkpoint != newest:
                yield Waste(checkpoint, _size(checkpoint), f"superseded by {newest.name}")


@contextmanager
def _unless_held(lock: Path) -> Iterator[bool]:
    """Hold a lock that is free; False where another process has it."""

    class Held(Exception):
        pass

    def busy(holder: str) -> None:
        raise Held

    try:
        with locked(lock, busy):
            yield True
    except Held:
        yield False


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in files_of(folder))
