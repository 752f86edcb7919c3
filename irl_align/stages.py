"""The run folder: stages found by content, committed whole or not at all, and resumed.

A stage is a function of its settings and its inputs. Its key is a hash of both, its folder in the
store is ``<name>-<key>``, and runs with the same recipe so far share it. Nothing here imports
torch.
"""

import hashlib
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from irl_align import __version__
from irl_align.errors import UserError
from irl_align.files import (
    atomic_write,
    files_of,
    fsync,
    fsync_tree,
    full_disk_told,
    locked,
    partial_name,
    read_json,
    read_lines,
    to_json,
    to_lines,
)

FORMAT = 1  # of a stage's folder; part of every key, so a change here rebuilds everything
RECORD = "stage.json"
SCRATCH = "scratch"
RERUN = "delete this file and run the recipe again, which writes it anew from finished stages"


@dataclass(frozen=True)
class Stage:
    """A committed stage: its folder holds the artefacts and ``stage.json``, which is ``record``."""

    name: str
    key: str
    path: Path
    metrics: dict[str, Any]
    record: dict[str, Any]
    reused: bool


class Store:
    """The stages under one folder, shared by all runs beside it."""

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
        metrics. After a kill it is called again with what it had left there, so it can go on from
        checkpoints; it should keep those in ``work/scratch``, which is deleted at the commit.

        A second process that wants the same stage waits for the first, then reuses the result.

        Raises:
            UserError: a committed stage is damaged, or the disk is full.
        """
        key = stage_key(name, settings, inputs)
        final = self.root / f"{name}-{key}"
        if final.exists():
            return _read_stage(final, key, reused=True)
        work = self.root / ".work" / final.name
        with full_disk_told(f"stage {name}", self.root):
            work.parent.mkdir(parents=True, exist_ok=True)
            with locked(work.with_name(f"{final.name}.lock"), _say_waiting(name)):
                if final.exists():
                    return _read_stage(final, key, reused=True)
                if not _is_whole(work, key):
                    record = {"name": name, "key": key, "settings": settings, "inputs": inputs}
                    _build(work, record, build)
                _commit(work, final)
        return _read_stage(final, key, reused=False)


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
    # What a kill left of the record, whole or half written, is no artefact.
    for name in (RECORD, partial_name(RECORD)):
        (work / name).unlink(missing_ok=True)
    resumed = any(work.iterdir())
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()
    start = time.monotonic()
    metrics = build(work) or {}
    fsync_tree(work)  # before the record, which vouches for it
    artefacts = [path for path in files_of(work) if path.relative_to(work).parts[0] != SCRATCH]
    record = {
        "format": FORMAT,
        **record,
        "metrics": metrics,
        "resumed": resumed,
        "seconds": round(time.monotonic() - start, 3),  # of this try, where it was resumed
        **_peak_memory(),
        "environment": environment(),
        "files": {path.relative_to(work).as_posix(): path.stat().st_size for path in artefacts},
    }
    atomic_write(work / RECORD, to_json(record, indent=2) + "\n")


def _commit(work: Path, final: Path) -> None:
    # From the record on, the stage is whole: a kill in here costs nothing (see _is_whole).
    shutil.rmtree(work / SCRATCH, ignore_errors=True)
    os.rename(work, final)
    fsync(final.parent)


def _is_whole(work: Path, key: str) -> bool:
    """Whether ``work`` was killed between its record and its renaming."""
    if not (work / RECORD).is_file():
        return False
    try:
        _read_stage(work, key, reused=False)
    except UserError:
        return False
    return True


def _read_stage(folder: Path, key: str, reused: bool) -> Stage:
    mend = f"delete the folder {folder} to rebuild it"
    path = folder / RECORD
    record = read_json(path, "the record of a finished stage", mend)
    if record.get("key") != key:
        raise UserError(f"{path}: found the record of another stage, expected key {key}; {mend}")
    for name, size in record["files"].items():
        artefact = folder / name
        found = f"{artefact.stat().st_size} bytes" if artefact.is_file() else "no such file"
        if found != f"{size} bytes":
            raise UserError(f"{artefact}: found {found}, expected {size} bytes; {mend}")
    return Stage(record["name"], key, folder, record["metrics"], record, reused)


def _peak_memory() -> dict[str, float]:
    """Peak memory in MiB: of this process so far, and of the current GPU during the stage."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss: bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    memory = {"peak_rss_mib": round(peak, 1)}
    if cuda := _cuda():
        memory["peak_cuda_mib"] = round(cuda.max_memory_allocated() / 2**20, 1)
    return memory


def _cuda() -> Any:
    """``torch.cuda`` if it is in use; a process that has not imported torch does not for this."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def environment() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that decide its numbers."""
    versions = {"python": platform.python_version(), "irl_align": __version__}
    for name in ("torch", "transformers", "trl", "datasets", "tokenizers", "numpy", "vllm"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


class Run:
    """A run folder that this process writes; made by ``Run.open``, read by ``Run.load``.

    It holds ``recipe.yaml`` (resolved), ``recipe.source.yaml`` (as written), ``metrics.jsonl``,
    ``samples/*.jsonl``, ``stages.json`` and, once finished, ``summary.json``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics = {record["key"]: record for record in _read_metrics(folder)}
        self._stages = _read_stages(folder)

    @classmethod
    @contextmanager
    def open(
        cls, folder: Path, recipe_resolved: Mapping[str, Any], recipe_text: str
    ) -> Iterator["Run"]:
        """Hold ``folder`` for this process and record the recipe there.

        If the folder has another recipe, that one is kept as ``recipe.previous.yaml`` and its
        results are dropped; its stages stay in the store, where this recipe finds what it shares.

        Raises:
            UserError: another process has the run, its files are damaged, or the disk is full.
        """

        def refuse(holder: str) -> None:
            raise UserError(f"run {folder} is in use by {holder}: wait for it, or stop it")

        with full_disk_told(f"run {folder.name}", folder.parent):
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / ".lock", refuse):
                recipe = yaml.safe_dump(dict(recipe_resolved), sort_keys=False, allow_unicode=True)
                _replace_recipe(folder, recipe)
                atomic_write(folder / "recipe.source.yaml", recipe_text)
                yield cls(folder)

    @staticmethod
    def load(folder: Path) -> "RunView":
        """Read a run, finished or not.

        Raises:
            UserError: ``folder`` is not a run, or a file in it is damaged.
        """
        expected = "expected the folder of a run, which holds recipe.yaml"
        if not folder.is_dir():
            raise UserError(f"{folder}: found no such folder, {expected}")
        path = folder / "recipe.yaml"
        if not path.is_file():
            raise UserError(f"{folder}: found no recipe.yaml, {expected}")
        try:
            recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            found = " ".join(str(error).split())
            raise UserError(f"{path}: found {found}, expected YAML; {RERUN}") from error
        if not isinstance(recipe, dict):
            raise UserError(f"{path}: found no mapping, expected a recipe; {RERUN}")
        summary = folder / "summary.json"
        return RunView(
            folder,
            recipe,
            _read_metrics(folder),
            read_json(summary, "a summary", RERUN) if summary.exists() else None,
            _read_stages(folder),
        )

    def log(self, key: str, record: Mapping[str, Any]) -> None:
        """Set the line of ``key`` in ``metrics.jsonl``; a new key goes to the end.

        NaN and infinity become null.
        """
        if "key" in record:
            raise ValueError("'key' names the line itself: use another field")
        self._metrics[key] = {"key": key, **record}
        self._write("metrics.jsonl", to_lines(self._metrics.values()))

    def save_samples(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write ``samples/<name>.jsonl``, one row a line."""
        self._write(f"samples/{name}.jsonl", to_lines(rows))

    def link(self, role: str, stage: Stage) -> None:
        """Note in ``stages.json`` which stage has this role in the run."""
        path = Path(os.path.relpath(stage.path, self.folder)).as_posix()
        self._stages[role] = {"name": stage.name, "key": stage.key, "path": path}
        self._write("stages.json", to_json(self._stages, indent=2) + "\n")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``: the run is complete."""
        self._write("summary.json", to_json(summary, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        atomic_write(self.folder / name, text)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, and no model's: an export holds the recipe that made it too."""
    return (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file()


@dataclass(frozen=True)
class RunView:
    """What a run folder says; ``summary`` is None until the run has finished."""

    folder: Path
    recipe: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None
    stages: dict[str, dict[str, str]]

    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """Rows of each ``samples/<name>.jsonl``, by name."""
        paths = sorted((self.folder / "samples").glob("[!.]*.jsonl"))
        return {path.stem: read_lines(path, RERUN) for path in paths}


def _replace_recipe(folder: Path, recipe: str) -> None:
    path = folder / "recipe.yaml"
    if path.exists() and path.read_bytes() != recipe.encode():
        print(f"run {folder}: the recipe has changed; kept recipe.previous.yaml", file=sys.stderr)
        atomic_write(folder / "recipe.previous.yaml", path.read_bytes())
        for stale in ("metrics.jsonl", "stages.json", "summary.json"):
            (folder / stale).unlink(missing_ok=True)
        shutil.rmtree(folder / "samples", ignore_errors=True)
    atomic_write(path, recipe)


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    records = read_lines(path, RERUN) if path.exists() else []
    for number, record in enumerate(records, 1):
        if "key" not in record:
            raise UserError(f"{path}:{number}: found no field key, expected one; {RERUN}")
    return records


def _read_stages(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / "stages.json"
    return read_json(path, "the stages of a run", RERUN) if path.exists() else {}
