"""The commands export and push."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from irl_align.cli.terminal import Debug, set_up

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")]
What = Annotated[str, typer.Option("--what", help="reward, policy or pairs.")]
Iteration = Annotated[
    int | None,
    typer.Option(min=0, help="Which reward or policy; default: the last.", show_default=False),
]
LicenceOption = Annotated[
    str | None,
    typer.Option(
        "--license",
        help="Licence by the Hub's name; default: derived from those of the data and the model.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(
        epilog="Example: irl-align export runs/e2e-irl-best-of-n-seed1 --what reward --to reward"
    )(export)
    app.command(
        epilog="Example: irl-align push runs/e2e-irl-best-of-n-seed1 --repo me/my-reward --private"
    )(push)


def export(
    run: RunArgument,
    *,
    to: Annotated[Path, typer.Option("--to", help="Folder to write; it must not exist.")],
    what: What = "reward",
    iteration: Iteration = None,
    license: LicenceOption = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write a LoRA adapter alone, not merged.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            help="With --adapter: the base model's Hub id or folder; default: the recipe's.",
            show_default=False,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Export a run's reward, policy or pairs with a card to a folder that other tools load."""
    _set_up(debug)
    from irl_align.hub.export import Form, sizes
    from irl_align.hub.export import export as write

    write(run, what, to, iteration, license, Form(adapter, base))
    for name, size in sizes(to):
        typer.echo(f"{size:>14,}  {name}")
    typer.echo(f"{what}: {to}")


def push(
    run: RunArgument,
    *,
    repo: Annotated[str, typer.Option("--repo", help="user/name, organisation/name, or name.")],
    what: What = "reward",
    private: Annotated[
        bool, typer.Option("--private", help="Create a new repository as private.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, which is created if it is missing.", show_default=False),
    ] = None,
    iteration: Iteration = None,
    license: LicenceOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite a repository that holds something else.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be pushed; send nothing.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Push a run's reward, policy or pairs to the Hub, in one commit.

    The same command resumes an interrupted push. The token is that of HF_TOKEN or `hf auth login`.
    """
    _set_up(debug)
    from irl_align.hub import push as hub

    target = hub.Target(repo, revision, private, force)
    if not dry_run:
        pushed = hub.push(run, what, target, iteration, license)
        result = f"commit {pushed.commit}" if pushed.changed else "nothing new"
        typer.echo(f"{pushed.url}: {result}")
        return
    from irl_align.hub.export import sizes

    hub.check_repo_name(repo)
    with hub.temporary_export(run, what, iteration, license) as exported:
        hub.require_licence(exported.licence, private)
        for name, size in sizes(exported.folder):
            typer.echo(f"{size:>14,}  {name}")
        kind = "dataset" if what == "pairs" else "model"
        number = "" if exported.iteration is None else f", tag iteration-{exported.iteration}"
        typer.echo(
            f"would push to the {kind} {repo}, branch {revision or 'main'}{number}, licence "
            f"{exported.licence.name}; nothing was sent"
        )


def _set_up(debug: bool) -> None:
    set_up(debug)
    if not debug:  # push logs every failed try itself
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
