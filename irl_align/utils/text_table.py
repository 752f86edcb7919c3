"""A table of texts, on the console and as Markdown; the report makes HTML of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

MISSING = "-"
LABEL_WIDTH = 30  # of columns of text, which may wrap
GAP = 2  # between columns
SPELT = {"bleu": "BLEU", "chrf": "chrF"}
# Columns that are no numbers.
TEXTS = ("policy", "metric", "gold", "rank", "scorer", "group", "baseline", "against", "task")


def spelt(metric: str) -> str:
    """A metric as people write it: `slot_error_rate` as `slot error rate`, `bleu` as `BLEU`."""
    return SPELT.get(metric, metric.replace("_", " "))


@dataclass(frozen=True)
class Grid:
    """A table before it is text, Markdown or HTML: the first column is a label."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def show_grid(grid: Grid, console: Console) -> None:
    """Print one table, its columns of numbers narrow; what is wider than the console in parts."""
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
    """Columns of each part of a grid that is at most `width` wide, if one column can be; every part
    starts with the columns of text."""
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
    """Characters that a column needs: a header of numbers breaks at its spaces."""
    head = [grid.columns[at]] if _is_text(grid, at) else grid.columns[at].split()
    return max(map(len, [*head, *(row[at] for row in grid.rows)]))


def grid_markdown(grid: Grid) -> str:
    """One table as GitHub's Markdown, below its title."""
    text = sum(name in TEXTS for name in grid.columns)
    rule = ["---"] * text + ["---:"] * (len(grid.columns) - text)
    lines = [_markdown_row(row) for row in (grid.columns, rule, *grid.rows)]
    return f"**{escaped(grid.title)}**\n\n" + "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escaped(text) for text in cells) + " |"


def escaped(text: str) -> str:
    """Text whose characters mean nothing to Markdown or HTML."""
    marks = r"[\\|<>&`*_]|\](?=\()"
    return re.sub(marks, lambda mark: f"&#{ord(mark[0])};", " ".join(text.split()))
