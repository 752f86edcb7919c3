"""Tables of numbers and texts, written to a terminal, as Markdown or as CSV.

The report's page template writes the same tables as HTML.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

from irl_align.utils.statistics import Estimate

MISSING = "-"
LABEL_WIDTH = 30  # characters of a text column, which may wrap
GAP = 2  # characters between columns
METRIC_NAMES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "kl": "KL",
    "entropy": "entropy per token",
    "fresh_accuracy": "fresh samples",
    "two_sample_accuracy": "discriminator",
}

Cell = str | float | Estimate | None
"""A text stays as it is; a missing value is None."""


def metric_name(metric: str) -> str:
    """A metric as people write it: `slot_error_rate` is `slot error rate`, `bleu` is `BLEU`."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def p_value(p: float | None) -> str | None:
    """A p-value with three decimals."""
    if p is None:
        return None
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def estimate_cell(fields: Mapping[str, Any] | None) -> Estimate | None:
    """The estimate whose fields a JSON file holds, perhaps among others; None if there is none."""
    if fields is None:
        return None
    return Estimate(
        fields["mean"], fields["low"], fields["high"], fields["n"], fields.get("clusters")
    )


@dataclass(frozen=True)
class Column:
    """A column's name and the format of its numbers. A column without decimals holds texts."""

    name: str
    decimals: int | None = None
    scale: float = 1.0
    """Numbers are multiplied by this, shares by 100 for instance."""
    unit: str = ""
    """Written after each number."""
    signed: bool = False
    """Whether a number above zero has a plus sign."""
    grouped: bool = False
    """Whether commas separate the thousands."""
    brackets: bool = False
    """Whether an interval is written as [low, high] with its n; otherwise as ± half its width."""

    def text(self, cell: Cell) -> str:
        """A cell as people read it: `20.5`, `20.5±1.2` or `20.5 [19.1, 21.8]`.

        An estimate over clusters has its n: `83.3 [50.1, 95.2] n=12/3` for 12 pairs of 3 prompts.
        """
        if cell is None:
            return MISSING
        if isinstance(cell, str) or self.decimals is None:
            return str(cell)
        if not isinstance(cell, Estimate):
            return self._number(cell, "+" if self.signed else "")
        mean = self._number(cell.mean, "+" if self.signed else "")
        if self.brackets:
            bounds = "" if cell.low is None or cell.high is None else f" {self.bounds(cell)}"
            return mean + bounds + _counts(cell)
        if cell.low is None or cell.high is None:
            return mean
        return f"{mean}±{self._number((cell.high - cell.low) / 2)}"

    def bounds(self, estimate: Estimate) -> str:
        """Only the interval of an estimate."""
        if estimate.low is None or estimate.high is None:
            return MISSING
        return f"[{self._number(estimate.low)}, {self._number(estimate.high)}]"

    def _number(self, value: float, sign: str = "") -> str:
        rounded = round(self.scale * value, self.decimals or 0) + 0.0  # no -0.0
        return f"{rounded:{sign}{',' if self.grouped else ''}.{self.decimals}f}{self.unit}"


def percent(name: str, *, unit: str = "", signed: bool = False, brackets: bool = False) -> Column:
    """A column of shares, which are written in percent with one decimal."""
    return Column(name, 1, 100.0, unit, signed=signed, brackets=brackets)


def share_text(estimate: Estimate | None) -> str:
    """A share in percent with its interval and n: `83.3% [50.1%, 95.2%] n=12/3`."""
    return percent("", unit="%", brackets=True).text(estimate)


def _counts(estimate: Estimate) -> str:
    """The n of an estimate over clusters, with the number of clusters if it is another."""
    if estimate.clusters is None:
        return ""
    clusters = "" if estimate.clusters == estimate.n else f"/{estimate.clusters}"
    return f" n={estimate.n}{clusters}"


@dataclass(frozen=True)
class Table:
    """A title, columns, and rows with one cell per column. The first column labels the rows."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def texts(self) -> list[list[str]]:
        """The rows as people read them."""
        return [
            [column.text(cell) for column, cell in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]

    def is_text(self, at: int) -> bool:
        """Whether a column holds texts, which are aligned to the left and may wrap."""
        return at == 0 or self.columns[at].decimals is None


def terminal_tables(table: Table, width: int) -> Iterator[RichTable]:
    """The table for a terminal of this width, in parts if it is wider."""
    texts = table.texts()
    for number, part in enumerate(_parts(table, texts, width)):
        made = RichTable(
            title=None if number else Text(table.title),
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for at in part:
            name, is_text = table.columns[at].name, table.is_text(at)
            made.add_column(
                name if is_text else name.replace(" ", "\n"),
                justify="left" if is_text else "right",
                vertical="bottom" if is_text else "top",
                no_wrap=not is_text,
            )
        for row in texts:
            made.add_row(*(Text(row[at]) for at in part))
        yield made


def _parts(table: Table, texts: list[list[str]], width: int) -> list[list[int]]:
    """Columns of each part of the table, which is at most `width` wide if its text columns and one
    other fit. Every part begins with the text columns."""
    widths = []
    for at, column in enumerate(table.columns):
        # The header of a number column breaks at its spaces.
        head = [column.name] if table.is_text(at) else column.name.split()
        widths.append(max(map(len, [*head, *(row[at] for row in texts)])) + GAP)
    labels = [at for at in range(len(widths)) if table.is_text(at)]
    room = width - 2 - sum(min(widths[at], LABEL_WIDTH + GAP) for at in labels)
    parts, used = [list(labels)], 0
    for at in range(len(widths)):
        if at in labels:
            continue
        if used and used + widths[at] > room:
            parts.append(list(labels))
            used = 0
        parts[-1].append(at)
        used += widths[at]
    return [sorted(part) for part in parts]


def markdown_table(table: Table) -> str:
    """The table as GitHub's Markdown, below its title."""
    columns = range(len(table.columns))
    names = [column.name for column in table.columns]
    rule = ["---" if table.is_text(at) else "---:" for at in columns]
    lines = ["| " + " | ".join(map(escaped, row)) + " |" for row in (names, rule, *table.texts())]
    return f"**{escaped(table.title)}**\n\n" + "\n".join(lines)


def csv_table(table: Table) -> str:
    """The table as CSV, its numbers unrounded and without units."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(column.name for column in table.columns)
    writer.writerows(table.rows)
    return file.getvalue()


def escaped(text: str) -> str:
    """Text in which no character has a meaning to Markdown or HTML."""
    marks = r"[\\|<>&`*_]|\](?=\()"
    return re.sub(marks, lambda mark: f"&#{ord(mark[0])};", " ".join(text.split()))
