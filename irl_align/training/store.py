"""The store of stages: looked up by content, committed whole or not at all, and resumed.

A stage is a function of its settings and its inputs. Its key is a hash of both, its folder in the
store is ``<name>-<key>``, and runs whose recipes agree up to it share it. Nothing here imports
torch.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irl_align.errors import TryAgain, UserError
from irl_align.utils.files import (
    atomic_write,
    content_hash,
    explains_full_disk,
    files_of,
    fsync,
    fsync_tree,
    locked,
    partial_name,
    read_json,
    text_hash,
    to_json,
)
from irl_align.utils.hardware import environment, peak_memory, reset_peak_memory

logger = logging.getLogger(__name__)

FORMAT = 2  # of a stage's folder; part of every key, so a change here rebuilds everything
RECORD = "stage.json"
SCRATCH = "scratch"
WORK = ".work"  # in the store: stages being built, their locks, and damaged ones
DAMAGED = ".damaged"


@dataclass(frozen=True)
class Stage:
    """A committed stage: its folder holds the artefacts and ``stage.json``, which is ``record``."""

    name: str
    key: str
    path: Path
    metrics: dict[str, Any]
    record: dict[str, Any]
    reused: bool
    missing: bool = False
    """Whether the stage was only looked up and is not there: it has a key, but no files."""


class Store:
    """The stages under one folder, which all runs next to it share."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        build: Callable[[Path], Mapping[str, Any] | None],
    ) -> Stage:
        """Return the committed stage of these settings and inputs, building it if there is none.

        ``settings`` is plain JSON data, without NaN; ``inputs`` maps a role to the key of another
        stage or to a checksum. ``build(work)`` writes the artefacts into ``work`` and returns
        metrics. After a kill it is called again with the files that it left there, so that it can
        resume from checkpoints. Checkpoints belong in ``work/scratch``, which is deleted at the
        commit.

        A second process that asks for the same stage waits for the first, then reuses the result.
        A committed stage whose files have changed is set aside and built again.

        Raises:
            UserError: the disk is full.
        """
        key = stage_key(name, settings, inputs)
        final = self.root / f"{name}-{key}"
        if final.exists():
            with suppress(Damaged):
                return _read_stage(final, key, reused=True)
        work = self.root / WORK / final.name
        with explains_full_disk(f"stage {name}", self.root):
            work.parent.mkdir(parents=True, exist_ok=True)
            with locked(work.with_name(f"{final.name}.lock"), _say_waiting(name)):
                if final.exists():
                    try:
                        return _read_stage(final, key, reused=True)
                    except Damaged as fault:
                        _put_aside(final, work.with_name(final.name + DAMAGED), fault)
                if not _is_whole(work, key):
                    record = {"name": name, "key": key, "settings": settings, "inputs": inputs}
                    _build(work, record, build)
                _commit(work, final)
        return _read_stage(final, key, reused=False)


class Damaged(UserError):
    """The files of a committed stage have changed."""


def _put_aside(final: Path, aside: Path, fault: Damaged) -> None:
    """Move a damaged stage out of the way; only the last damaged copy of a stage is kept."""
    logger.warning("%s; the stage is built again, and the damaged one is moved to %s", fault, aside)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(final, aside)


def _say_waiting(name: str) -> Callable[[str], None]:
    def say(holder: str) -> None:
        print(f"stage {name}: waiting for {holder}, which builds it", file=sys.stderr, flush=True)

    return say


def stage_key(name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON of the arguments and the format."""
    content = {"format": FORMAT, "inputs": inputs, "name": name, "settings": settings}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:16]


def _build(
    work: Path,
    record: dict[str, Any],
    build: Callable[[Path], Mapping[str, Any] | None],
) -> None:
    """Run ``build`` in ``work`` and write the stage's record, the last file to appear there."""
    work.mkdir(exist_ok=True)
    # A record that an earlier try wrote, whole or in part, is no artefact.
    for name in (RECORD, partial_name(RECORD)):
        (work / name).unlink(missing_ok=True)
    resumed = any(work.iterdir())
    reset_peak_memory()
    start = time.monotonic()
    metrics = _built(work, record["name"], build)
    fsync_tree(work)  # before the record, which says that the files are complete
    artefacts = [path for path in files_of(work) if path.relative_to(work).parts[0] != SCRATCH]
    record = {
        "format": FORMAT,
        **record,
        "metrics": metrics,
        "resumed": resumed,
        "seconds": round(time.monotonic() - start, 3),  # of the last try, if it was resumed
        **peak_memory(),
        "environment": environment(),
        "files": {path.relative_to(work).as_posix(): path.stat().st_size for path in artefacts},
        "xxh3": {path.relative_to(work).as_posix(): content_hash(path) for path in artefacts},
    }
    atomic_write(work / RECORD, to_json({**record, "check": _check_of(record)}, indent=2) + "\n")


def _check_of(record: Mapping[str, Any]) -> str:
    """Hash of a record's content, which shows a later change."""
    content = {name: value for name, value in record.items() if name != "check"}
    return text_hash(to_json(content))


def _built(
    work: Path, name: str, build: Callable[[Path], Mapping[str, Any] | None]
) -> Mapping[str, Any]:
    """Metrics of a build; the build is called again after a fault that may not happen again."""
    while True:
        try:
            return build(work) or {}
        except TryAgain as fault:
            logger.warning("stage %s: %s; trying again from its last checkpoint", name, fault)


def _commit(work: Path, final: Path) -> None:
    # Once the record is there, the stage is whole: a kill here loses nothing (see _is_whole).
    shutil.rmtree(work / SCRATCH, ignore_errors=True)
    os.rename(work, final)
    fsync(final.parent)


def _is_whole(work: Path, key: str) -> bool:
    """Whether the build in ``work`` was killed after it wrote the record."""
    if not (work / RECORD).is_file():
        return False
    try:
        _read_stage(work, key, reused=True)
    except Damaged:
        return False
    return True


def verify_stage(folder: Path) -> Stage:
    """The committed stage in a folder of a store. Raises Damaged: its files have changed."""
    return _read_stage(folder, folder.name.rpartition("-")[2], reused=True)


def _read_stage(folder: Path, key: str, reused: bool) -> Stage:
    """The stage in a folder. If it is to be reused, every file's bytes are checked.

    Raises:
        Damaged: the files are not those that were committed.
    """
    path = folder / RECORD
    try:
        record = read_json(path, "the record of a finished stage", "it is lost")
    except UserError as error:
        raise Damaged(str(error)) from error
    if record.get("check") != _check_of(record) or record.get("key") != key:
        raise Damaged(f"{path}: found a record that is not that of stage {key}")
    for name, size in record["files"].items():
        artefact = folder / name
        here = artefact.is_file() and not artefact.is_symlink()
        actual = f"{artefact.stat().st_size} bytes" if here else "no such file"
        if actual != f"{size} bytes":
            raise Damaged(f"{artefact}: found {actual}, expected {size} bytes")
        if reused and content_hash(artefact) != record["xxh3"][name]:
            raise Damaged(f"{artefact}: found other bytes than the stage wrote")
    return Stage(record["name"], key, folder, record["metrics"], record, reused)
