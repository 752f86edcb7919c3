"""A table of texts, for the console and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

MISSING = "-"
LABEL_WIDTH = 30  # largest width of a text column, which may wrap
GAP = 2  # characters between columns
SPELT = {"bleu": "BLEU", "chrf": "chrF"}
# Columns that hold text and not numbers.
TEXTS = ("policy", "metric", "gold", "rank", "scorer", "group", "baseline", "against", "task")


def spelt(metric: str) -> str:
    """The usual name of a metric: `slot error rate` for `slot_error_rate`, `BLEU` for `bleu`."""
    return SPELT.get(metric, metric.replace("_", " "))


@dataclass(frozen=True)
class Grid:
    """A table of texts, whatever its output format. The first column is a label."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def show_grid(grid: Grid, console: Console) -> None:
    """Print a table with narrow number columns, in parts if it is wider than the console."""
    for number, columns in enumerate(_parts(grid, console.width)):
        table = Table(
            title=None if number else Text(grid.title),
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for at in columns:
            name, is_text = grid.columns[at], _is_text(grid, at)
            table.add_column(
                name if is_text else name.replace(" ", "\n"),
                justify="left" if is_text else "right",
                no_wrap=not is_text,
            )
        for row in grid.rows:
            table.add_row(*(Text(row[at]) for at in columns))
        console.print(table)


def _is_text(grid: Grid, at: int) -> bool:
    return at == 0 or grid.columns[at] in TEXTS


def _parts(grid: Grid, width: int) -> list[list[int]]:
    """Columns of each part of a grid. A part starts with the text columns and is at most `width`
    wide, unless one column is wider."""
    texts = [at for at in range(len(grid.columns)) if _is_text(grid, at)]
    room = width - 2 - sum(min(_width(grid, at), LABEL_WIDTH) + GAP for at in texts)
    parts, used = [list(texts)], 0
    for at in range(len(grid.columns)):
        if at in texts:
            continue
        needed = _width(grid, at) + GAP
        if used and used + needed > room:
            parts.append(list(texts))
            used = 0
        parts[-1].append(at)
        used += needed
    return [sorted(part) for part in parts]


def _width(grid: Grid, at: int) -> int:
    """Characters that a column needs. The header of a number column breaks at its spaces."""
    head = [grid.columns[at]] if _is_text(grid, at) else grid.columns[at].split()
    return max(map(len, [*head, *(row[at] for row in grid.rows)]))


def grid_markdown(grid: Grid) -> str:
    """A table as GitHub's Markdown, below its title."""
    text = sum(name in TEXTS for name in grid.columns)
    rule = ["---"] * text + ["---:"] * (len(grid.columns) - text)
    lines = [_markdown_row(row) for row in (grid.columns, rule, *grid.rows)]
    return f"**{escaped(grid.title)}**\n\n" + "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escaped(text) for text in cells) + " |"


def escaped(text: str) -> str:
    """Text in which all characters that are special in Markdown or HTML are escaped."""
    marks = r"[\\|<>&`*_]|\](?=\()"
    return re.sub(marks, lambda mark: f"&#{ord(mark[0])};", " ".join(text.split()))
