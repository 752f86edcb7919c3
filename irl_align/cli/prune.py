"""The command prune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from irl_align.cli.terminal import Debug, console, set_up
from irl_align.errors import UserError

if TYPE_CHECKING:
    from irl_align.training.prune import Findings


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: irl-align prune runs --yes")(prune)


def prune(
    folder: Annotated[Path, typer.Argument(help="Folder of runs, or its store.")] = Path("runs"),
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list; the default without --yes.")
    ] = False,
    replaced: Annotated[
        bool,
        typer.Option("--replaced", help="Include the stages that only replaced runs linked."),
    ] = False,
    debug: Debug = False,
) -> None:
    """List or delete the stages that no run needs, and the damaged and unfinished stages.

    A stage stays if a run links it, if such a stage was made from it, or if an unfinished run would
    resume from it. To give up a run, delete its folder first. What a run linked before its recipe
    was replaced stays as well, unless --replaced is given.
    """
    set_up(debug)
    from irl_align.training.prune import delete, find_waste, holding, runs_folder

    if yes and dry_run:
        raise UserError("prune: found --yes and --dry-run, expected one of them")
    runs = runs_folder(folder)
    if not yes:
        _show(find_waste(runs, replaced), runs)
        typer.echo("nothing was deleted; --yes deletes it")
        return
    with holding(runs):
        findings = find_waste(runs, replaced)
        _show(findings, runs)
        delete(findings)
    typer.echo(f"deleted: {_megabytes(findings.bytes)}")


def _show(findings: Findings, runs: Path) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("MB", justify="right")
    table.add_column("what", overflow="fold")
    table.add_column("why", overflow="fold")
    for waste in findings.waste:
        name = str(waste.path.relative_to(runs))
        table.add_row(f"{waste.bytes / 1e6:,.1f}", Text(name), Text(waste.why))
    if findings.waste:
        console().print(table)
    typer.echo(f"runs: {', '.join(findings.runs) or 'none'}")
    typer.echo(f"needed: {_megabytes(findings.kept)}; not needed: {_megabytes(findings.bytes)}")
    if findings.replaced:
        typer.echo(f"kept for replaced runs: {_megabytes(findings.replaced)} (--replaced lists it)")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
