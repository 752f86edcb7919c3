"""The figures of a report as data: plots with intervals, rows of marks, or stacked bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A value at x, with the bounds of its interval if there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    """Text shown with the numbers of the point."""


@dataclass(frozen=True)
class Series:
    """Points with one name. Their colour and mark follow the order of series unless given."""

    name: str
    points: Sequence[Point]
    colour: int | None = None
    joined: bool | None = None
    """Whether a line joins the points; None uses the setting of the plot."""


@dataclass(frozen=True)
class Plot:
    """Series in one pair of axes, joined by lines or as points only."""

    key: str
    """Name of the figure's files, unique on a page."""
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    joined: bool = True
    whole_x: bool = False
    """Whether x is a count, so that ticks are whole numbers."""


@dataclass(frozen=True)
class Dots:
    """A row of marks for each name.

    The x of a point is the number of its row, and its y is the value, drawn from left to right.
    """

    key: str
    title: str
    unit: str
    names: Sequence[str]
    series: Sequence[Series]


@dataclass(frozen=True)
class Bars:
    """Stacked horizontal bars: (name, {part: value}) each, in one unit."""

    key: str
    title: str
    unit: str
    bars: Sequence[tuple[str, dict[str, float]]]


Drawable = Plot | Dots | Bars
