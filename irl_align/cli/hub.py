"""The commands export, push and data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from irl_align.cli.terminal import Debug, console, set_up

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
        help="Licence by the Hub's name, in place of the one that follows from data and model.",
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
    app.command(epilog="Example: irl-align data e2e_nlg --path ../data/e2e --check")(data)


def export(
    run: RunArgument,
    to: Annotated[Path, typer.Option("--to", help="Folder to write; it must not exist.")],
    what: What = "reward",
    iteration: Iteration = None,
    license: LicenceOption = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a LoRA model the adapter alone, not merged.")
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
    """Write a run's reward, policy or pairs with its card to a folder that any tool loads."""
    _set_up(debug)
    from irl_align.hub.export import Form, sizes
    from irl_align.hub.export import export as write

    done = write(run, what, to, iteration, license, Form(adapter, base))
    for name, size in sizes(to):
        typer.echo(f"{size:>14,}  {name}")
    typer.echo(f"{what}: {done.folder}")


def push(
    run: RunArgument,
    repo: Annotated[str, typer.Option("--repo", help="user/name, organisation/name, or name.")],
    what: What = "reward",
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch; made where it is missing.", show_default=False)
    ] = None,
    iteration: Iteration = None,
    license: LicenceOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite a repository that holds something else.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be pushed; reach no server.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Push a run's reward, policy or pairs to the Hub, in one commit; again, it goes on.

    The token is the one of HF_TOKEN or of `hf auth login`.
    """
    _set_up(debug)
    from irl_align.hub import push as hub

    target = hub.Target(repo, revision, private, force)
    if not dry_run:
        done = hub.push(run, what, target, iteration, license)
        typer.echo(f"{done.url}: " + (f"commit {done.commit}" if done.changed else "nothing new"))
        return
    from irl_align.hub.export import sizes

    hub.check_repo_name(repo)
    with hub.exported_aside(run, what, iteration, license) as exported:
        hub.require_licence(exported)
        for name, size in sizes(exported.folder):
            typer.echo(f"{size:>14,}  {name}")
        kind = "dataset" if what == "pairs" else "model"
        number = "" if exported.iteration is None else f", tag iteration-{exported.iteration}"
        typer.echo(
            f"would push to the {kind} {repo}, branch {revision or 'main'}{number}, licence "
            f"{exported.licence.name}; nothing was sent"
        )


def data(
    card: Annotated[str, typer.Argument(help="Data card: its name, or its file.")],
    path: Annotated[
        str | None,
        typer.Option(help="Local files, in place of the card's source.", show_default=False),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="One split; default: all.", show_default=False)
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for a task that makes its data, as size=200; several times."),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Samples to show of each split.")] = 2,
    check: Annotated[
        bool, typer.Option("--check", help="Fail where the data is not what the card says.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Load a data card's splits, count them, show samples, check them against the card."""
    _set_up(debug)
    from irl_align.data.summary import show

    show(card, console(), path, split, samples, check, task or [])


def _set_up(debug: bool) -> None:
    set_up(debug)
    if not debug:  # every failed try is told by us, in words
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
