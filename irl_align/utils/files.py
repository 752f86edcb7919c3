"""Atomic writes, checksums, locks, JSON, and a clear message when the disk is full.

Files from outside are identified by SHA-256. Files that this package wrote are checked for damage
by xxh3, which is as fast as a disk.
"""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import xxhash
from filelock import FileLock, Timeout

from irl_align.errors import UserError

SEAL = ".seal.json"


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write ``path`` so that a kill or a power cut leaves either the old file or the new one.

    Makes missing parent folders. Callers hold a lock: there must be one writer at a time.
    """
    aside = path.with_name(partial_name(path.name))
    path.parent.mkdir(parents=True, exist_ok=True)
    # A lone surrogate, which JSON can carry and UTF-8 cannot, becomes "?".
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    fsync(path.parent)


def require_writable(path: Path, option: str) -> None:
    """Raise UserError before any work where no file can be written at ``path``."""
    if path.is_dir():
        raise UserError(f"{option}: {path} is a folder, expected a file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{option}: {path}: nothing can be written in {folder}")


def require_writable_folder(path: Path, option: str) -> None:
    """Raise UserError before any work where no folder can be written at ``path``."""
    try:
        nearest = next(
            each for each in (path.absolute(), *path.absolute().parents) if each.exists()
        )
    except OSError as error:  # a name that is too long, a folder that cannot be read
        raise UserError(f"{option}: {path}: {error.strerror}; choose another folder") from error
    if not nearest.is_dir():
        raise UserError(f"{option}: {path}: {nearest} is a file, expected a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{option}: {path}: nothing can be written in {nearest}; choose another")


def partial_name(name: str) -> str:
    """Fixed name of an unfinished file, so that the next try overwrites what a kill left."""
    return f".{name}.partial"


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which becomes ``path`` when the block ends without error.

    Raises:
        FileExistsError: ``path`` exists; it is not changed.
    """
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    aside = path.with_name(partial_name(path.name))
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    try:
        yield aside
    except Exception:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    fsync_tree(aside)
    aside.rename(path)
    fsync(path.parent)


def file_checksum(path: Path) -> str:
    """SHA-256 in hex of a file, or of a folder such as a saved model.

    The checksum of a folder is that of the text that ``sha256sum`` prints for its files, sorted by
    path, without hidden files and folders (download caches). Raises UserError where there is none.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise UserError(f"{path}: found nothing there, expected a file or a folder")
    names = sorted(file.relative_to(path).as_posix() for file in files_of(path))
    shown = [name for name in names if not any(part[0] == "." for part in name.split("/"))]
    listing = "".join(f"{file_checksum(path / name)}  {name}\n" for name in shown)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()


def content_hash(path: Path) -> str:
    """XXH3 (128 bits, in hex) of a file's content: it detects damage, not tampering."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def text_hash(text: str) -> str:
    """XXH3 (128 bits, in hex) of a text."""
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "replace"))


def seal(path: Path) -> None:
    """Write the hashes of a file or folder, next to the file or into the folder."""
    atomic_write(_seal_of(path), to_json(_hashes(path)))


def is_sealed(path: Path) -> bool:
    """Whether a file or folder exists with a seal and has not changed since."""
    try:
        return read_json(_seal_of(path), "a seal", "") == _hashes(path)
    except (OSError, UserError):
        return False


def _seal_of(path: Path) -> Path:
    return path / SEAL if path.is_dir() else path.with_name(f".{path.name}{SEAL}")


def _hashes(path: Path) -> dict[str, str]:
    inside = [file for file in files_of(path) if file.name != SEAL] if path.is_dir() else [path]
    return {file.relative_to(path).as_posix(): content_hash(file) for file in inside}


def files_of(folder: Path) -> list[Path]:
    """All files below ``folder``, in the order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush ``folder`` and everything below it to the disk."""
    for path in folder.rglob("*"):
        fsync(path)
    fsync(folder)


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinity become null, NumPy and torch scalars become numbers."""
    return json.dumps(_strict(value), indent=indent, ensure_ascii=False, allow_nan=False)


def to_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """Strict JSON Lines."""
    return "".join(to_json(record) + "\n" for record in records)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "item"):
        return _strict(value.item())
    return value


def read_json(path: Path, what: str, fix: str) -> dict[str, Any]:
    """Content of a JSON file. The message of an error says ``what`` it should be and the ``fix``.

    Raises:
        UserError: the file is missing or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: found no such file, expected {what}; {fix}") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError among them
        raise UserError(f"{path}: found no JSON ({error}), expected {what}; {fix}") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UserError(f"{path}: found a JSON {kind}, expected {what}, an object; {fix}")
    return value


def read_lines(path: Path, fix: str) -> list[dict[str, Any]]:
    """Records of a JSON Lines file. The message of an error ends with the ``fix``.

    Raises:
        UserError: a line is not a JSON object.
    """
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            shown = line[:40].decode("utf-8", "replace")
            raise UserError(f"{path}:{number}: found {shown!r}, expected a JSON object; {fix}")
        records.append(record)
    return records


@contextmanager
def locked(path: Path, busy: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file ``path``; the end of this process, of any kind, frees it.

    When another process holds it, ``busy(holder)`` is called with words for that process. It raises
    to give up, or returns to wait.
    """
    lock, owner = FileLock(path), path.with_suffix(".pid")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        pid = owner.read_text() if owner.is_file() else ""
        alive = pid.isdigit() and psutil.pid_exists(int(pid))
        busy(f"process {pid}" if alive else "another process")
        lock.acquire()
    try:
        atomic_write(owner, str(os.getpid()))
        yield
    finally:
        lock.release()


@contextmanager
def explains_full_disk(task: str, folder: Path) -> Iterator[None]:
    """Raise UserError for any error that is caused by a full disk below ``folder``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kept = "finished work is not lost"
        if _has_errno(error, errno.EFBIG):
            raise UserError(
                f"{task}: a file below {folder} grew past the largest that is allowed; {kept}: "
                "raise the limit (ulimit -f) and run the same command again"
            ) from error
        if not _is_full_disk(error, folder):
            raise
        free = _free_bytes(folder) / 2**20
        raise UserError(
            f"{task}: no space left for {folder} ({free:.0f} MiB free); {kept}: free space and "
            "run the same command again"
        ) from error


def _is_full_disk(error: BaseException, folder: Path) -> bool:
    # torch.save and NumPy give no reason, but the disk is full after they fail.
    return _has_errno(error, errno.ENOSPC, errno.EDQUOT) or _free_bytes(folder) < 2**20


def _has_errno(error: BaseException | None, *numbers: int) -> bool:
    """Whether an error, or one of its causes, has one of these numbers of the system."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in numbers:
            return True
        if any(os.strerror(number) in str(error) for number in numbers):  # safetensors
            return True
        error = error.__cause__ or error.__context__
    return False


def _free_bytes(folder: Path) -> int:
    while not folder.exists():  # the disk may have been too full to make it
        folder = folder.parent
    return shutil.disk_usage(folder).free
