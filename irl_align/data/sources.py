"""Raw rows of a data card's split, from local files or from the Hub.

Local files are parsed here and not by ``datasets``, so that errors name file and line, and no cache
returns stale rows after a file changed.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from irl_align.data.cards import Card
from irl_align.errors import UserError
from irl_align.utils.sanitize import one_line

logger = logging.getLogger(__name__)
MAX_RATIO = 200  # decompressed size over file size; English text is at 10, repeated rows at 100
_SMALL = 1 << 26  # bytes that are allowed at any ratio


class Raw(NamedTuple):
    """One row before it is checked."""

    source: str
    """File, or Hub dataset and split."""
    unit: str
    """What `number` counts: line, row or item."""
    number: int
    """From 1."""
    values: dict[str, Any]
    """Column -> value."""
    group: str
    """Name of the row's file if the split has several files, else empty."""

    @property
    def place(self) -> str:
        """Where the row is, for messages."""
        return f"{self.source}, {self.unit} {self.number}"

    def column(self, name: str) -> Any:
        """Value of a column or, with a path such as answers.0.text, inside it; None if not there.

        Raises UserError: the row has no such column.
        """
        if name in self.values:
            return self.values[name]
        first, *path = name.split(".")
        if first not in self.values:
            names = one_line(", ".join(map(str, self.values)))[:200] or "none"
            raise UserError(f"{self.place}: found columns {names}, expected a column {name!r}")
        value = self.values[first]
        for step in path:
            try:
                value = value[int(step)] if isinstance(value, list) else value[step]
            except (IndexError, KeyError, TypeError, ValueError):
                return None
        return value

    def fault(self, column: str, problem: str) -> str:
        """The message that a column holds a value which it should not."""
        return f"{self.place}: column {column!r}: found {one_line(problem)}"


def hub_rows(card: Card, split: str) -> Iterator[Raw]:
    """Rows of a split on the Hub. Raises UserError: it cannot be loaded."""
    import datasets

    source, name = card.source, card.splits[split].hub
    assert source is not None and source.hub is not None and name is not None
    where = f"{source.hub} {name}"
    try:
        rows = datasets.load_dataset(
            source.hub,
            source.config,
            data_dir=source.data_dir,
            revision=source.revision,
            split=name,
        )
    except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow raise many kinds
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"data.card {card.name}: cannot load {where} from the Hub ({cause}); "
            "give its local copy as data.path"
        ) from error
    for number, values in enumerate(rows, 1):
        yield Raw(where, "row", number, dict(values), "")


def file_rows(file: Path) -> Iterator[Raw]:
    """Rows of one file. Raises UserError: the file cannot be read or a row is broken."""
    yield from _parse(file, _read(file), "")


def local_rows(card: Card, split: str, path: str | None) -> Iterator[Raw]:
    """Rows of a split's local files, in the order of their names.

    If their checksum is not the card's, a warning is logged.
    """
    digest = hashlib.sha256()
    files = _local_files(card, split, path)
    for file in files:
        content = _read(file)
        digest.update(content)
        yield from _parse(file, content, file.name.split(".")[0] if len(files) > 1 else "")
    expected = card.sha256.get(split, digest.hexdigest())
    if expected != digest.hexdigest():
        logger.warning(
            f"{card.name} {split}: the files under {path or card.folder} have SHA-256 "
            f"{digest.hexdigest()}, the card says {expected}: this is another version of the data"
        )


def _local_files(card: Card, split: str, path: str | None) -> list[Path]:
    patterns = card.splits[split].patterns
    field = f"data.card {card.name}: splits.{split}.files"
    if path is None and card.source is not None:
        raise UserError(
            f"data.path: card {card.name} has no source to load from: get the files from "
            f"{card.source.url} and give their folder"
        )
    if not patterns:
        raise UserError(f"{field}: missing, so local files cannot be read for this split")
    root = Path(path) if path is not None else card.folder
    if root.is_file():
        only_split = sum(other.carved_from is None for other in card.splits.values()) == 1
        if not only_split and not any(root.match(pattern) for pattern in patterns):
            raise UserError(
                f"data.path: {root} is one file and not that of split {split} "
                f"({' or '.join(patterns)}); expected the folder of the card's files"
            )
        return [root]
    if not root.is_dir():
        raise UserError(f"data.path: found nothing at {root}, expected a file or a folder")
    files = sorted({file for pattern in patterns for file in root.glob(pattern) if file.is_file()})
    if not files:
        names = ", ".join(sorted(file.name for file in root.iterdir())[:8]) or "nothing"
        raise UserError(
            f"data.path: {root} holds {names}; expected {' or '.join(patterns)} for split {split}"
        )
    return files


def _read(file: Path) -> bytes:
    try:
        if file.suffix == ".gz":
            limit = max(_SMALL, MAX_RATIO * file.stat().st_size)
            with gzip.open(file) as stream:
                content = stream.read(limit + 1)
            if len(content) > limit:
                raise UserError(
                    f"{file}: found more than {MAX_RATIO} times its size when decompressed, "
                    "expected text; if the file is what it should be, decompress it yourself"
                )
            return content
        return file.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file}: truncated or damaged gzip file: {error}") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error


def _parse(file: Path, content: bytes, group: str) -> Iterator[Raw]:
    """Rows of a file by its suffix (before .gz)."""
    suffix = Path(file.name.removesuffix(".gz")).suffix
    if suffix == ".parquet":
        rows, unit = _parquet(file, content), "row"
    elif suffix == ".csv":
        rows, unit = _csv(file, content), "line"
    elif suffix == ".json" and content.lstrip().startswith(b"["):
        rows, unit = enumerate(_json(str(file), content), 1), "item"
    elif suffix in (".json", ".jsonl"):
        rows, unit = _json_lines(file, content), "line"
    else:
        raise UserError(
            f"{file}: found suffix {suffix or 'none'!r}, expected .jsonl, .json, .csv or .parquet, "
            "or one of them and .gz"
        )
    empty = True
    for number, values in rows:
        empty = False
        if not isinstance(values, dict):
            raise UserError(
                f"{file}, {unit} {number}: found {type(values).__name__}, expected a JSON object"
            )
        yield Raw(str(file), unit, number, values, group)
    if empty:
        raise UserError(f"{file}: found no row, expected at least one")


Numbered = Iterator[tuple[int, Any]]
"""Rows with their numbers in the file."""


def _json_lines(file: Path, content: bytes) -> Numbered:
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield number, _json(f"{file}, line {number}", line)


def _json(place: str, content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: byte {error.start + 1}: found 0x{content[error.start]:02x}, expected UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:  # also an integer that is too long to read
        raise UserError(f"{place}: found broken JSON, perhaps cut off: {error}") from error


def _csv(file: Path, content: bytes) -> Numbered:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{file}, line {line}: found byte 0x{content[error.start]:02x}, expected UTF-8"
        ) from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for values in reader:
            if None in values or None in values.values():
                raise UserError(
                    f"{file}, line {reader.line_num}: found more or fewer fields than the "
                    f"{len(reader.fieldnames or [])} of the header"
                )
            yield reader.line_num, values
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.reader.line_num}: broken CSV: {error}") from error


def _parquet(file: Path, content: bytes) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: not a complete parquet file: {cause}") from error
    yield from enumerate(rows, 1)
