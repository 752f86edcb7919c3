"""Find and delete the parts of a store that no run needs.

A stage stays if a run next to the store links it or linked it before its recipe was replaced, if
such a stage was made from it, or if an unfinished run would resume from it. Nothing here imports
torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irl_align.errors import UserError
from irl_align.training.run_folder import REPLACED, Run, RunView, is_run, read_replaced
from irl_align.training.store import DAMAGED, RECORD, SCRATCH, WORK
from irl_align.utils.files import files_of, is_sealed, locked, read_json

ONLY_REPLACED = "only replaced runs linked it"
REPAIR = "repair or delete the file, then run prune again"


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
    """Names of the runs; unfinished ones are marked."""
    replaced: int = 0
    """Bytes that are kept only because replaced runs linked them."""
    forgets: Sequence[Path] = ()
    """Run folders whose list of replaced stages is deleted too."""

    @property
    def bytes(self) -> int:
        """Bytes that can be deleted."""
        return sum(waste.bytes for waste in self.waste)


def runs_folder(path: Path) -> Path:
    """The folder of runs, given itself or its store. Raises UserError: there is no store."""
    folder = path.parent if path.name == "store" else path
    if not (folder / "store").is_dir():
        raise UserError(
            f"{path}: found no store of stages, expected the folder of runs that has one"
        )
    return folder


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Lock every run of the folder for the block. Raises UserError: a run is in progress."""

    def refuse(name: str) -> Callable[[str], None]:
        def busy(holder: str) -> None:
            raise UserError(f"run {name} is in use by {holder}; run prune when it has ended")

        return busy

    with ExitStack() as stack:
        for path in sorted(folder.iterdir()):
            if is_run(path):
                stack.enter_context(locked(path / ".lock", refuse(path.name)))
        yield


def find_waste(folder: Path, replaced: bool = False) -> Findings:
    """The parts of a store that no run of the folder needs.

    replaced: stages that only replaced runs linked are not needed. Raises UserError: a run or a
    record is damaged, so that its needs are unknown.
    """
    views = [Run.load(path) for path in sorted(folder.iterdir()) if is_run(path)]
    store = folder / "store"
    committed = {path.name: path for path in sorted(store.glob("[!.]*")) if path.is_dir()}
    linked = _with_inputs({name for view in views for name in _linked(view)}, committed)
    before = {Path(path).name for view in views for path in read_replaced(view.folder)}
    kept = _with_inputs(before, committed) - linked
    unfinished = [view for view in views if view.summary is None]
    waste = [
        Waste(path, _size(path), ONLY_REPLACED if name in kept else "no run links it")
        for name, path in committed.items()
        if name not in linked and (replaced or name not in kept)
    ]
    for path in sorted((store / WORK).glob("*")):
        if path.is_dir():
            waste += _unfinished(path, committed, bool(unfinished))
    total = _size(store)
    names = [v.folder.name + (" (unfinished)" if v in unfinished else "") for v in views]
    size = 0 if replaced else sum(_size(committed[name]) for name in kept)
    runs = (
        [] if not replaced else [view.folder for view in views if (view.folder / REPLACED).exists()]
    )
    return Findings(waste, total - sum(one.bytes for one in waste), names, size, runs)


def delete(findings: Findings) -> None:
    """Delete the waste, except of a stage that is being built. Call it inside ``holding``."""
    for run in findings.forgets:
        (run / REPLACED).unlink()
    for waste in findings.waste:
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
    """Names of stages and of all stages that they were made from, by the keys in their records."""
    by_key = {name.rpartition("-")[2]: name for name in committed}
    needed, left = set[str](), [name for name in names if name in committed]
    while left:
        name = left.pop()
        if name in needed:
            continue
        needed.add(name)
        record: Any = read_json(committed[name] / RECORD, "the record of a finished stage", REPAIR)
        inputs = record.get("inputs", {})
        for value in inputs.values() if isinstance(inputs, dict) else ():
            parts = str(value).replace("+", " ").replace("/", " ").replace("@", " ").split()
            left += [by_key[part] for part in parts if part in by_key]
    return needed


def _unfinished(path: Path, committed: dict[str, Path], wanted: bool) -> Iterator[Waste]:
    """Waste in the folder of a stage that is not committed; wanted: a run may resume it."""
    if path.name.endswith(DAMAGED):
        yield Waste(path, _size(path), "damaged, and built again")
    elif path.name in committed:
        yield Waste(path, _size(path), "left over from a finished stage")
    elif not wanted:
        yield Waste(path, _size(path), "unfinished, and every run is finished")
    else:
        sealed = [c for c in (path / SCRATCH).glob("checkpoint-*") if is_sealed(c)]
        newest = max(sealed, key=lambda c: int(c.name.split("-")[1]), default=None)
        for checkpoint in sorted((path / SCRATCH).glob("checkpoint-*")):
            if newest is not None and checkpoint != newest:
                yield Waste(checkpoint, _size(checkpoint), f"superseded by {newest.name}")


@contextmanager
def _unless_held(lock: Path) -> Iterator[bool]:
    """Take a lock if it is free; False if another process has it."""

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
