"""Raw rows of a data card's split, from local files or from the Hub.

Local files are parsed here and not by ``datasets``, so that errors name file and line, and no cache
returns stale rows after a file changed.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from irl_align.data.cards import Card
from irl_align.errors import UserError
from irl_align.utils.sanitize import one_line

logger = logging.getLogger(__name__)
MAX_RATIO = 200  # decompressed size over file size; English text is at 10, repeated rows at 100
_SMALL = 1 << 26  # bytes that are allowed at any ratio
_LINES, _TABLES = (".json", ".jsonl", ".ndjson"), {".csv": ",", ".tsv": "\t"}


class FaultyRow(UserError):
    """The content of a row is unusable; `faulty: drop` leaves such rows out."""


@contextmanager
def fault_at(place: str) -> Iterator[None]:
    """Say where a faulty row is."""
    try:
        yield
    except FaultyRow as error:
        raise FaultyRow(f"{place}: {error}") from error


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
    broken: str = ""
    """Why the row has no values, if it cannot be parsed."""

    @property
    def place(self) -> str:
        """Where the row is, for messages."""
        return f"{self.source}, {self.unit} {self.number}"

    def column(self, name: str) -> Any:
        """Value of a column or, with a path such as answers.0.text, inside it; None if not there.

        Raises FaultyRow: the row cannot be parsed, or has no such column.
        """
        if self.broken:
            raise FaultyRow(f"{self.place}: {self.broken}")
        if name in self.values:
            return self.values[name]
        first, *path = name.split(".")
        if first not in self.values:
            names = one_line(", ".join(map(str, self.values)))[:200] or "none"
            raise FaultyRow(f"{self.place}: found columns {names}, expected a column {name!r}")
        value = self.values[first]
        for step in path:
            try:
                value = value[int(step)] if isinstance(value, list) else value[step]
            except (IndexError, KeyError, TypeError, ValueError):
                return None
        return value

    def fault(self, column: str, problem: str) -> FaultyRow:
        """The error that a column holds a value which it should not."""
        return FaultyRow(f"{self.place}: column {column!r}: found {one_line(problem)}")


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
        yield Raw(where, "row", number, _without_fillers(values), "")


def file_rows(file: Path) -> Iterator[Raw]:
    """Rows of one file. Raises UserError: the file cannot be read or a row is broken."""
    for raw in read_file(file):
        if raw.broken:
            raise FaultyRow(f"{raw.place}: {raw.broken}")
        yield raw


def read_file(file: Path) -> Iterator[Raw]:
    """Rows of one file, broken ones among them. Raises UserError: the file cannot be read."""
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
        named = any(root.name == pattern or root.match(pattern) for pattern in patterns)
        if not only_split and not named:
            raise UserError(
                f"data.path: {root} is one file and not that of split {split} "
                f"({' or '.join(patterns)}); expected the folder of the card's files"
            )
        return [root]
    if not root.is_dir():
        raise UserError(f"data.path: found nothing at {root}, expected a file or a folder")
    # A file may have a name that would be a pattern, such as demos[1].jsonl.
    hits = [[root / name] if os.path.isfile(root / name) else root.glob(name) for name in patterns]
    files = sorted({file for group in hits for file in group if file.is_file()})
    if not files:
        names = ", ".join(sorted(file.name for file in root.iterdir())[:8]) or "nothing"
        raise UserError(
            f"data.path: {root} holds {names}; expected {' or '.join(patterns)} for split {split}"
        )
    return files


def _read(file: Path) -> bytes:
    try:
        if file.suffix.lower() == ".gz":
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
    """Rows of a file by its suffix (before .gz), whose case does not matter."""
    suffix = Path(file.name.lower().removesuffix(".gz")).suffix
    content = content.removeprefix(codecs.BOM_UTF8)
    if suffix == ".parquet":
        rows, unit = _parquet(file, content), "row"
    elif suffix in _TABLES:
        rows, unit = _csv(file, content, _TABLES[suffix]), "line"
    elif suffix in _LINES and content.lstrip().startswith(b"["):
        rows, unit = _json_array(file, content), "item"
    elif suffix in _LINES:
        rows, unit = _json_lines(content), "line"
    else:
        raise UserError(
            f"{file}: found suffix {suffix or 'none'!r}, expected {', '.join(_LINES)}, "
            f"{', '.join(_TABLES)} or .parquet, or one of them and .gz"
        )
    empty = True
    for number, values in rows:
        empty = False
        broken = values if isinstance(values, str) else ""
        if not broken and not isinstance(values, dict):
            broken = f"found {type(values).__name__}, expected a JSON object"
        yield Raw(str(file), unit, number, {} if broken else values, group, broken)
    if empty:
        raise UserError(f"{file}: found no row, expected at least one")


Numbered = Iterator[tuple[int, Any]]
"""Numbers in the file, each with the row's values, or with a text that says why it has none."""


def _json_lines(content: bytes) -> Numbered:
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            try:
                yield number, _json(line)
            except ValueError as error:
                yield number, str(error)


def _json_array(file: Path, content: bytes) -> Numbered:
    try:
        values = _json(content)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    yield from enumerate(values, 1)


def _json(content: bytes) -> Any:
    """The value of a JSON text. Raises ValueError, whose text says what was found."""
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        problem = f"byte {error.start + 1}: found 0x{content[error.start]:02x}, expected UTF-8"
        raise ValueError(problem) from error
    except _RepeatedKey as error:
        raise ValueError(str(error)) from error
    except (ValueError, RecursionError) as error:  # also an integer that is too long to read
        raise ValueError(f"found broken JSON, perhaps cut off: {error}") from error


class _RepeatedKey(Exception):
    """An object has a key twice, of whose values JSON's parser would drop one."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise _RepeatedKey(f"found the key {_repeated(key for key, _ in pairs)} twice")
    return values


def _repeated(names: Iterable[str]) -> str:
    """The first name that is there more than once, for a message."""
    return one_line(repr(next(name for name, count in Counter(names).items() if count > 1)))


def _csv(file: Path, content: bytes, delimiter: str) -> Numbered:
    text = content.decode(errors="surrogateescape")
    # The limit is one for the whole process. A text's length is checked later, in every format.
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if "end of data" in str(error):  # an open quote hides all later rows
                raise UserError(f"{file}, line {start}: broken CSV: {error}") from error
            yield start, f"broken CSV: {error}"
            continue
        if fields is None:
            return
        bad = _not_utf8(fields)
        if header is None:
            header = fields
            if bad or len(set(header)) != len(header):
                problem = bad or f"found the column {_repeated(header)} twice, expected it once"
                raise UserError(f"{file}, line {start}: {problem}")
        elif bad:
            yield start, bad
        elif fields and len(fields) != len(header):
            yield start, f"found {len(fields)} fields, expected the {len(header)} of the header"
        elif fields:
            yield start, dict(zip(header, fields, strict=True))


def _not_utf8(fields: list[str]) -> str:
    """What is wrong with fields that were decoded with surrogateescape; empty if nothing is."""
    try:
        "".join(fields).encode()
    except UnicodeEncodeError as error:
        byte = ord(error.object[error.start]) - 0xDC00
        return f"found byte 0x{byte:02x}, expected UTF-8"
    return ""


def _parquet(file: Path, content: bytes) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)).read()
        if len(set(table.column_names)) != table.num_columns:
            repeated = _repeated(table.column_names)
            raise UserError(f"{file}: found the column {repeated} twice, expected it once")
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: not a complete parquet file: {cause}") from error
    yield from enumerate(map(_without_fillers, rows), 1)


def _without_fillers(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a typed table without the nulls that stand for absent keys of nested values."""
    return {name: _filled(value) for name, value in row.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, list):
        return [_filled(item) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return value
