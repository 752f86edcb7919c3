"""Prints runs, comparisons and evaluations as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap
from typing import Any

from rich.console import Console

from irl_align.evaluation.compare.run_tables import (
    accuracy_notes,
    policy_tables,
    run_ending,
    run_tables,
)
from irl_align.evaluation.compare.tables import comparison_tables, notes
from irl_align.evaluation.tables import evaluation_notes, evaluation_tables
from irl_align.training.run_folder import RunView, records_checked
from irl_align.utils.text_table import Table, terminal_tables


def show_policies(views: Sequence[RunView], console: Console) -> None:
    """Print results and vital signs of the policies that runs have so far."""
    _print_tables(policy_tables(views), console)


def show_runs(views: Sequence[RunView], console: Console) -> None:
    """Print results, vital signs, rewards, costs and warning signs of runs.

    Raises UserError: a run holds records that no run writes.
    """
    with records_checked(", ".join(str(view.folder) for view in views)):
        show_policies(views, console)
        for view in views:
            _print_tables(run_tables(view), console)
            _print_lines((f"note: {note}" for note in accuracy_notes([view])), console)
            _print_lines((f"warning sign: {sign}" for sign in view.signs()), console)
            _print_lines([f"{view.folder}: {run_ending(view)}"], console)


def show_comparison(analysis: Mapping[str, Any], console: Console) -> None:
    """Print all tables of a comparison and its notes."""
    _print_tables(comparison_tables(analysis), console)
    _print_lines(notes(analysis), console)


def show_evaluation(evaluation: Mapping[str, Any], console: Console) -> None:
    """Print all tables of an evaluation and its notes."""
    _print_tables(evaluation_tables(evaluation), console)
    _print_lines(evaluation_notes(evaluation), console)


def _print_tables(tables: Iterable[Table], console: Console) -> None:
    for table in tables:
        for part in terminal_tables(table, console.width):
            console.print(part)


def _print_lines(lines: Iterable[str], console: Console) -> None:
    """Print lines, wrapped between words only, so that a long path stays whole."""
    for line in lines:
        wrapped = wrap(line, console.width, break_long_words=False, break_on_hyphens=False)
        console.print("\n".join(wrapped), markup=False, soft_wrap=True)
