"""Figures drawn by matplotlib, with a tooltip for each mark.

The code uses matplotlib's objects and not pyplot, which keeps every figure and needs a display.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from irl_align.errors import UserError
from irl_align.evaluation.report.figures import Bars, Dots, Drawable, Plot, Point, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

# Sizes in points, which are also the units of the SVG.
INCH = 72.0
WIDTH = 440.0
PLOT_HEIGHT = 296.0  # with title, ticks and label, without the legend
BAR, DOTS, AROUND_BARS = (
    40.0,
    44.0,
    76.0,
)  # a row of bars, a row of dots, and the space around all rows
LINE = 17.0  # a line of a legend, or a further line of a title
TITLE_WIDTH, LEGEND_WIDTH, NAME_WIDTH = 48, 60, 44  # characters per line, and of the name of a bar
MOST_INTERVALS = 12  # of a line; more are drawn as an area, without a shift
MOST_MARKS = 60  # points of a line; with more, only the line is drawn
BELOW_NAME = 0.16  # share of a row by which dots lie below its middle
DODGE = 0.013  # share of the x axis between series at the same iteration

TEXT, QUIET, RULE, PAGE = "#1c1c1c", "#5c5c5c", "#dedede", "#ffffff"
EDGE: dict[str, Any] = {"markeredgecolor": PAGE, "markeredgewidth": 0.6}
"""A light edge, which separates overlapping marks."""
# The colours of Okabe and Ito, which colour-blind readers can distinguish. Black and yellow are
# replaced, since they are invisible on a dark or a light page. Marks and dashes differ as well.
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7"),
    *("#e69f00", "#56b4e9", "#8a7f00", "#7f7f7f"),
)
MARKS = "osD^vp<>"
DASHES = ("-", "--", ":", "-.")  # the next one after each round of the colours
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib, so it is the same everywhere
    "font.size": 11.0,
    "text.color": TEXT,
    "text.parse_math": False,  # dollar signs in a name are no formula
    "axes.edgecolor": QUIET,
    "axes.facecolor": PAGE,
    "axes.grid": True,
    "axes.labelcolor": TEXT,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.titlesize": 13.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.facecolor": PAGE,
    "grid.color": RULE,
    "legend.fontsize": 11.0,
    "legend.frameon": False,
    "legend.labelspacing": 0.35,
    "lines.markersize": 8.0,
    "svg.fonttype": "none",  # text stays text
    "xtick.color": QUIET,
    "xtick.major.size": 0.0,
    "ytick.color": QUIET,
    "ytick.major.size": 0.0,
}


@dataclass(frozen=True)
class Drawing:
    """A figure and its tooltips: id of a group -> one text per mark of the group."""

    figure: Figure
    tooltips: dict[str, list[str]] = field(default_factory=dict)


@contextmanager
def style(key: str) -> Iterator[None]:
    """Use matplotlib with the style of reports for the block, whatever the user's settings are.

    key: makes matplotlib's ids the same each time, and different from those of other figures.
    Raises UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.style import context
    except ModuleNotFoundError as error:
        raise UserError("report: matplotlib is not installed; install irl-align[report]") from error
    with context(["default", {**STYLE, "svg.hashsalt": clean(key)}]):
        yield


def draw(figure: Drawable) -> Drawing:
    """Draw the figure. Call it inside `style`."""
    if isinstance(figure, Plot):
        return _plot(figure)
    return _dots(figure) if isinstance(figure, Dots) else _bars(figure)


def _plot(plot: Plot) -> Drawing:
    series = [_finite(one) for one in plot.series]
    names = [_lines(one.name, LEGEND_WIDTH) for one in series]
    drawing, axes = _empty(plot.title, PLOT_HEIGHT, names)
    xs = [p.x for one in series for p in one.points] or [0.0]
    margin = max(0.06 * (max(xs) - min(xs)), 0.15) if plot.whole_x else None
    if margin is not None:
        axes.set_xlim(min(xs) - margin, max(xs) + margin)
    axes.xaxis.set_major_locator(_round_numbers(plot.whole_x))
    axes.yaxis.set_major_locator(_round_numbers())
    width = max(xs) - min(xs) + 2 * (margin or 0.0)
    for at, one in enumerate(series):
        # Otherwise intervals at the same iteration would hide each other.
        aside = DODGE * width * (at - (len(series) - 1) / 2) if plot.whole_x and plot.joined else 0
        joined = plot.joined if one.joined is None else one.joined
        _draw_series(drawing, axes, one, at, aside, joined)
    axes.margins(x=0.06, y=0.06)
    axes.set_xlabel(_lines(plot.x_label, TITLE_WIDTH))
    axes.set_ylabel(_lines(plot.y_label, TITLE_WIDTH // 2))
    if names:
        drawing.figure.legend(axes.lines, names, loc="outside lower left")
    return drawing


def _draw_series(
    drawing: Drawing, axes: Axes, one: Series, at: int, aside: float, joined: bool
) -> None:
    """Draw one series, shifted along x by `aside`, as one line of the axes, for the legend."""
    number = at if one.colour is None else one.colour
    colour = COLOURS[number % len(COLOURS)]
    points = sorted(one.points, key=lambda p: p.x)
    marked = not joined or len(points) <= MOST_MARKS
    aside = 0.0 if _is_band(one, joined) else aside
    bounds = _bounds(points)
    gid = f"series-{at}"
    axes.plot(
        [p.x + aside for p in points],
        [p.y for p in points],
        color=colour,
        linestyle=DASHES[number // len(COLOURS) % len(DASHES)] if joined else "none",
        linewidth=2.0 if marked else 1.2,
        marker=MARKS[number % len(MARKS)] if marked else "none",
        **EDGE,
        gid=gid,
        zorder=3,
    )
    if bounds:
        xs, lows, highs = ([*column] for column in zip(*bounds, strict=True))
        if _is_band(one, joined):
            axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0.0, zorder=1)
        else:
            shifted = [x + aside for x in xs]
            axes.vlines(shifted, lows, highs, color=colour, linewidth=1.3, zorder=2)
    if marked:
        drawing.tooltips[gid] = [_tooltip(one.name, p, f" at {p.x:.4g}") for p in points]


def _is_band(one: Series, joined: bool) -> bool:
    """Whether a line has so many intervals that they are drawn as one area."""
    return joined and len(one.points) > MOST_INTERVALS


def _dots(dots: Dots) -> Drawing:
    series = [_finite(one) for one in dots.series]
    names = [_lines(one.name, LEGEND_WIDTH) for one in series]
    drawing, axes = _empty(dots.title, AROUND_BARS + DOTS * max(1, len(dots.names)), names)
    for at, one in enumerate(series):
        colour, gid = COLOURS[at % len(COLOURS)], f"series-{at}"
        aside = 0.13 * (at - (len(series) - 1) / 2)  # so that intervals do not hide each other
        places = [replace(p, x=p.x + BELOW_NAME + aside) for p in one.points]
        axes.plot(
            [p.y for p in places],
            [p.x for p in places],
            color=colour,
            linestyle="none",
            marker=MARKS[at % len(MARKS)],
            **EDGE,
            gid=gid,
            zorder=3,
        )
        for row, low, high in _bounds(places):
            axes.hlines(row, low, high, color=colour, linewidth=1.3, zorder=2)
        drawing.tooltips[gid] = [
            _tooltip(f"{dots.names[int(p.x)]}, {one.name}", p, at="") for p in one.points
        ]
    for row, name in enumerate(dots.names):
        axes.axhline(row + 0.5, color=RULE, linewidth=0.8, zorder=0)
        _name_row(axes, row - 0.16, name)
    axes.set_ylim(max(1, len(dots.names)) - 0.5, -0.6)  # the first name on top
    axes.grid(visible=False, axis="y")
    axes.set_yticks([])
    axes.margins(x=0.04)
    axes.xaxis.set_major_locator(_round_numbers())
    axes.set_xlabel(_lines(dots.unit, TITLE_WIDTH))
    if names:
        drawing.figure.legend(axes.lines[: len(names)], names, loc="outside lower left")
    return drawing


def _name_row(axes: Axes, row: float, name: str, more: str = "") -> None:
    """Write the name of a row of bars or dots, and more text, above the row at the left edge."""
    text = clean((name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…") + more)
    left = axes.get_yaxis_transform()
    axes.text(0.0, row, text, transform=left, verticalalignment="bottom", in_layout=False)


def _bars(bars: Bars) -> Drawing:
    from matplotlib.patches import Patch
    from matplotlib.ticker import StrMethodFormatter

    parts = list(dict.fromkeys(part for _, bar in bars.bars for part in bar))
    names = [_lines(part, LEGEND_WIDTH) for part in parts]
    drawing, axes = _empty(bars.title, AROUND_BARS + BAR * max(1, len(bars.bars)), names)
    for row, (name, bar) in enumerate(bars.bars):
        began = 0.0
        for part, value in bar.items():
            gid = f"bar-{row}-{parts.index(part)}"
            colour = COLOURS[parts.index(part) % len(COLOURS)]
            axes.barh(row, value, height=0.4, left=began, color=colour, gid=gid)
            drawing.tooltips[gid] = [f"{name}, {part}: {value:,.4g} {bars.unit}"]
            began += value
        _name_row(axes, row - 0.28, name, f": {began:,.0f} {bars.unit}")
    axes.set_ylim(len(bars.bars) - 0.6, -0.8)  # the first bar on top, room for its name
    axes.set_xlim(0.0, 1.02 * max((sum(bar.values()) for _, bar in bars.bars), default=0.0) or 1.0)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(_round_numbers())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axes.set_xlabel(bars.unit)
    keys = [Patch(color=COLOURS[at % len(COLOURS)]) for at in range(len(parts))]
    if names:
        drawing.figure.legend(keys, names, loc="outside lower left", handlelength=1.0)
    return drawing


def _empty(title: str, height: float, legend: Sequence[str]) -> tuple[Drawing, Axes]:
    """Axes of the given height with a title, and room for a legend below."""
    from matplotlib.figure import Figure

    title = _lines(title, TITLE_WIDTH)
    lines = title.count("\n") + sum(1 + name.count("\n") for name in legend)
    whole = height + LINE * lines
    figure = Figure(figsize=(WIDTH / INCH, whole / INCH), dpi=INCH, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    return Drawing(figure), axes


def _round_numbers(whole: bool = False) -> Locator:
    """Ticks at up to seven multiples of 1, 2, 2.5 or 5 times a power of ten."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(6, integer=whole, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1 if whole else 2)


def _finite(series: Series) -> Series:
    """The series without points that are not finite; infinite intervals are dropped."""
    kept = []
    for point in series.points:
        if math.isfinite(point.x) and math.isfinite(point.y):
            whole = all(v is not None and math.isfinite(v) for v in (point.low, point.high))
            kept.append(point if whole else replace(point, low=None, high=None))
    return replace(series, points=kept)


def _bounds(points: Sequence[Point]) -> list[tuple[float, float, float]]:
    """(x, low, high) of the points that have an interval."""
    return [(p.x, p.low, p.high) for p in points if p.low is not None and p.high is not None]


def _tooltip(name: str, point: Point, at: str) -> str:
    text = f"{name}: {point.y:.4g}{at}"
    if point.low is not None and point.high is not None:
        text += f" ({point.low:.4g} to {point.high:.4g})"
    return f"{text}; {point.note}" if point.note else text


def _lines(text: str, width: int) -> str:
    """Text wrapped to a width."""
    return "\n".join(textwrap.wrap(clean(text), width))


def clean(text: str) -> str:
    """Text with the characters that XML forbids replaced."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
