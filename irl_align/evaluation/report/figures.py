"""What a figure of a report shows: lines with intervals, points, or stacked bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A value at x, with the bounds of its interval where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    """What is told of the point besides its numbers."""


@dataclass(frozen=True)
class Series:
    """Points of one name; its colour and mark are its place in the figure unless given."""

    name: str
    points: Sequence[Point]
    colour: int | None = None
    joined: bool | None = None
    """By a line, or not; None is as the plot says."""


@dataclass(frozen=True)
class Plot:
    """Series in one pair of axes; joined by lines, or points alone."""

    key: str
    """Name of the figure's files; no other figure of a page has it."""
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    joined: bool = True
    whole_x: bool = False
    """Whether x counts something, so that ticks are whole numbers."""


@dataclass(frozen=True)
class Dots:
    """A row of marks for each name: in every series a point's x is its name's place, its y the
    value, which is drawn from left to right."""

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
