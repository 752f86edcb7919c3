"""Write a run or a comparison as one HTML file, and its figures as files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from irl_align.errors import UserError
from irl_align.evaluation.compare.aggregate import FILE, analyse, compare_runs, read_comparison
from irl_align.evaluation.compare.run_tables import accuracy_notes, reward_tables, run_ending
from irl_align.evaluation.compare.tables import notes, tables_by_section
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
    standings,
)
from irl_align.evaluation.report.figures import Drawable
from irl_align.evaluation.report.gains import gain_figures
from irl_align.evaluation.report.images import png, svg
from irl_align.evaluation.report.templates import render
from irl_align.evaluation.tables import evaluation_notes, evaluation_tables, read_evaluation
from irl_align.training.run_folder import Run, RunView, is_run, records_checked
from irl_align.utils.files import atomic_write
from irl_align.utils.text_table import Column, Table
from irl_align.utils.version import __version__

LONG = 12  # rows; longer tables start closed
MOST = 4_900_000  # bytes of a page


@dataclass(frozen=True)
class Section:
    """A part of the page: figures, then tables (long ones are closed), then notes."""

    name: str
    figures: Sequence[Drawable]
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    first: Table | None = None
    """A table before the figures."""


def write_report(source: Path, output: Path | None = None, figures: Path | None = None) -> Path:
    """Write the report of the folder of a run or a comparison; return its path.

    output: the HTML file; default: report.html in the folder. figures: folder for every figure as
    SVG and PNG. Raises UserError: the folder has no run or comparison, or the run is unfinished.
    """
    with records_checked(str(source)):
        return _write(source, output, figures)


def _write(source: Path, output: Path | None, figures: Path | None) -> Path:
    views, analysis, title = _read(source)
    sections = _sections(views, analysis)
    values = {
        "title": title,
        "version": __version__,
        "sections": [(one, [svg(figure) for figure in one.figures]) for one in sections],
        "long": LONG,
        "health": _health(views),
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
    """The page, with as many samples as fit next to its tables and figures."""
    bare = render("page.html.j2", **values, browser=None, credited=[])
    room = max(0, MOST - len(bare.encode()))
    credited = credited_samples(views, min(CREDIT_BUDGET, room // 3))
    room -= sum(len(article.encode()) for group in credited for article in group["samples"])
    browser = sample_browser(views, min(BUDGET, room))
    return render("page.html.j2", **values, browser=browser, credited=credited)


def _read(source: Path) -> tuple[list[RunView], dict[str, Any], str]:
    """The runs of a folder, their comparison, and the title of the page."""
    if not (source / FILE).is_file():
        if not is_run(source):
            raise UserError(
                f"{source}: found no {FILE} and no recipe.yaml, expected the folder of a "
                "comparison or of a run"
            )
        view = Run.load(source)
        return [view], analyse(compare_runs([view], iterations=True)), source.name
    analysis = read_comparison(source)
    try:
        paths = [source / str(run["path"]) for run in analysis["runs"]]
        tables_by_section(analysis)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{source / FILE}: found no {error}; run irl-align compare again"
        ) from error
    gone = [path for path in paths if not is_run(path)]
    in_tables = "it is in the tables, but not in the figures"
    analysis["missing"] += [f"{path}: deleted; {in_tables}" for path in gone]
    views = [Run.load(path) for path in paths if path not in gone]
    left = f"no longer finished; {in_tables}"
    analysis["missing"] += [f"{v.folder}: {left}" for v in views if v.summary is None]
    return [v for v in views if v.summary is not None], analysis, "comparison"


def _sections(views: Sequence[RunView], analysis: dict[str, Any]) -> list[Section]:
    """The sections that have content; in each, figures come before tables, except that the results
    begin with the table of gold."""
    tables = tables_by_section(analysis)
    gold, *results = tables["Results"] or [Table("results", [Column("policy")], [])]
    gains = [*frontier(views, analysis), *gain_figures(analysis["frontiers"])]
    rewards = reward_tables(views, "rewards, on held-out demonstrations")
    evaluations, evaluation_lines = [], []
    for view in views:
        if evaluation := read_evaluation(view):
            name = view.folder.name
            for table in evaluation_tables(evaluation):
                evaluations.append(replace(table, title=f"{name}: {table.title}"))
            evaluation_lines += [f"{name}: {line}" for line in evaluation_notes(evaluation)]
    sections = [
        Section("Results", standings(analysis), results, notes(analysis), gold),
        Section("Learning curves", learning_curves(views, analysis)),
        Section("Gold against KL", gains, tables["Gold against KL"]),
        Section(
            "Reward health",
            reward_health(views),
            [t for t in rewards if t.rows],
            accuracy_notes(views),
        ),
        Section("Evaluations", best_of_curves(views), evaluations, evaluation_lines),
        Section("PPO", ppo_curves(views, analysis["headline"]), tables["PPO"]),
        Section("Cost", cost_bars(views), tables["Cost"]),
    ]
    return [one for one in sections if one.first or one.figures or one.tables]


def _health(views: Sequence[RunView]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(title, (run, text) of each line): how the runs ended, and their warning signs."""
    endings = [(view.folder.name, run_ending(view)) for view in views]
    signs = [(view.folder.name, sign) for view in views for sign in view.signs()]
    lists = (("How the runs ended", endings), ("Warning signs", signs))
    return [(title, lines) for title, lines in lists if lines]
