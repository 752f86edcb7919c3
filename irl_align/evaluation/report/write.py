"""One HTML file of a run or a comparison, and its figures as files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from irl_align.errors import UserError
from irl_align.evaluation.compare.aggregate import FILE, analyse, compare_runs, read_comparison
from irl_align.evaluation.compare.overoptimization import frontiers
from irl_align.evaluation.compare.tables import COST, GAINS, PPO, RESULTS, grids_by_section, notes
from irl_align.evaluation.report.browser import (
    BUDGET,
    CREDIT_BUDGET,
    credited_samples,
    sample_browser,
)
from irl_align.evaluation.report.curves import (
    best_of_curves,
    cost_bars,
    frontier,
    learning_curves,
    ppo_curves,
    reward_health,
    reward_table,
    standings,
)
from irl_align.evaluation.report.figures import Drawable
from irl_align.evaluation.report.gains import gain_figures
from irl_align.evaluation.report.images import png, svg
from irl_align.evaluation.report.templates import render
from irl_align.evaluation.tables import evaluation_grids, evaluation_notes, read_evaluation
from irl_align.training.run_folder import Run, RunView, is_run, records_told
from irl_align.utils.files import atomic_write
from irl_align.utils.text_table import TEXTS, Grid
from irl_align.utils.version import __version__

LONG = 12  # rows; longer tables are closed at first
MOST = 4_900_000  # bytes of a page, which is to stay below 5 MB


@dataclass(frozen=True)
class Section:
    """A part of the page: its figures, then its tables, long ones closed, then notes on them."""

    name: str
    figures: Sequence[Drawable]
    grids: Sequence[Grid] = ()
    notes: Sequence[str] = ()
    first: Grid | None = None
    """A table before the figures."""


def write_report(source: Path, output: Path | None = None, figures: Path | None = None) -> Path:
    """Write the report of a run's folder or of a comparison's; return its path.

    output: the HTML file; default report.html in the folder. figures: folder for each figure as an
    SVG and as a PNG file. Raises UserError: no run or comparison there, or an unfinished run.
    """
    with records_told(str(source)):
        return _write(source, output, figures)


def _write(source: Path, output: Path | None, figures: Path | None) -> Path:
    views, analysis, title = _read(source)
    sections = _sections(views, analysis)
    values = {
        "title": title,
        "version": __version__,
        "texts": TEXTS,
        "sections": [(one, [svg(figure) for figure in one.figures]) for one in sections],
        "long": LONG,
        "health": [grid for grid in [_ended(views), _told(views)] if grid["rows"]],
    }
    output = output or source / "report.html"
    atomic_write(output, _page(values, views))
    if figures is not None:
        for figure in (figure for one in sections for figure in one.figures):
            name = re.sub(r"[^\w.-]", "-", figure.key)  # a gold field may have any name
            atomic_write(figures / f"{name}.svg", svg(figure, alone=True))
            atomic_write(figures / f"{name}.png", png(figure))
    return output


def _page(values: dict[str, Any], views: Sequence[RunView]) -> str:
    """The page, with as many samples as it has room for beside tables and figures."""
    bare = render("page.html.j2", **values, browser=None, credited=[])
    room = max(0, MOST - len(bare.encode()))
    credited = credited_samples(views, min(CREDIT_BUDGET, room // 3))
    room -= sum(len(article.encode()) for group in credited for article in group["samples"])
    browser = sample_browser(views, min(BUDGET, room))
    return render("page.html.j2", **values, browser=browser, credited=credited)


def _read(source: Path) -> tuple[list[RunView], dict[str, Any], str]:
    """The runs of a folder, what is said of them side by side, and the page's title."""
    if not (source / FILE).is_file():
        if not is_run(source):
            raise UserError(
                f"{source}: found no {FILE} and no recipe.yaml, expected the folder of a "
                "comparison or of a run"
            )
        view = Run.load(source)
        comparison = compare_runs([view], iterations=True)
        analysis = analyse(comparison, None, None)
        lower = comparison.lower_is_better
        analysis["frontiers"] = frontiers([view], {}, comparison.headline, lower)
        return [view], analysis, source.name
    analysis = read_comparison(source)
    try:
        paths = [source / str(run["path"]) for run in analysis["runs"]]
        grids_by_section(analysis)
    except (KeyError, TypeError) as error:
        mend = "run irl-align compare again"
        raise UserError(f"{source / FILE}: found no {error} in it; {mend}") from error
    gone = [path for path in paths if not is_run(path)]
    analysis["missing"] += [f"{path}: gone; tables have it, figures do not" for path in gone]
    views = [Run.load(path) for path in paths if path not in gone]
    left = "not finished any more; tables have it, figures do not"
    analysis["missing"] += [f"{v.folder}: {left}" for v in views if v.summary is None]
    return [v for v in views if v.summary is not None], analysis, "comparison"


def _sections(views: Sequence[RunView], analysis: dict[str, Any]) -> list[Section]:
    """What is there to see, figures before tables; of the results the table of gold comes first."""
    tables = grids_by_section(analysis)
    gold, *results = tables[RESULTS] or [Grid("results", ["policy"], [])]
    gains = [*frontier(views, analysis), *gain_figures(analysis.get("frontiers", []))]
    evaluated = [(view, found) for view in views if (found := read_evaluation(view))]
    evaluations = [_of(view, grid) for view, found in evaluated for grid in evaluation_grids(found)]
    told = [
        f"{v.folder.name}: {line}" for v, found in evaluated for line in evaluation_notes(found)
    ]
    rewards = reward_table(views)
    sections = [
        Section(RESULTS, standings(analysis), results, notes(analysis), gold),
        Section("Learning curves", learning_curves(views, analysis)),
        Section(GAINS, gains, tables[GAINS]),
        Section("Reward health", reward_health(views), [rewards] if rewards.rows else []),
        Section("Evaluations", best_of_curves(views), evaluations, told),
        Section(PPO, ppo_curves(views, analysis["headline"]), tables[PPO]),
        Section(COST, cost_bars(views), tables[COST]),
    ]
    return [one for one in sections if one.first or one.figures or one.grids]


def _of(view: RunView, grid: Grid) -> Grid:
    return replace(grid, title=f"{view.folder.name}: {grid.title}")


def _ended(views: Sequence[RunView]) -> dict[str, Any]:
    rows = [(v.folder.name, (v.summary or {}).get("ended", "not finished")) for v in views]
    return {"title": "How the runs ended", "rows": rows}


def _told(views: Sequence[RunView]) -> dict[str, Any]:
    rows = [(view.folder.name, sign) for view in views for sign in view.signs()]
    return {"title": "Warning signs", "rows": rows}
