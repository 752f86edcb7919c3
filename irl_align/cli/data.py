"""The command data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from irl_align.cli.terminal import Debug, console, set_up
from irl_align.errors import UserError

if TYPE_CHECKING:
    from irl_align.data.cards import Card
    from irl_align.data.summary import SplitSummary
    from irl_align.utils.text_table import Table

_MOST_SHOWN = 300  # characters of a text in a sample


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: irl-align data e2e_nlg --path ../data/e2e --check")(data)


def data(
    card: Annotated[str, typer.Argument(help="Data card: its name or its file.")],
    *,
    path: Annotated[
        str | None,
        typer.Option(help="Local files; default: the card's source.", show_default=False),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="One split; default: all.", show_default=False)
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE for a task that generates its data, such as size=200; repeatable."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Rows to show of each split.")] = 2,
    check: Annotated[
        bool, typer.Option("--check", help="Fail if the data differs from the card.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Load the splits of a data card, count and show their rows, check them against the card."""
    set_up(debug)
    from irl_align.data.cards import load_card
    from irl_align.data.summary import summarize_split

    loaded, arguments = load_card(card), dict(_parse_setting(text) for text in task or [])
    names = [split] if split else loaded.split_names
    splits = [summarize_split(loaded, name, path, samples, arguments) for name in names]
    _show(loaded, splits)
    if check:
        _check(loaded, splits)


def _parse_setting(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--task: found {text!r}, expected key=value")
    return key, yaml.safe_load(value)


def _show(card: Card, splits: Sequence[SplitSummary]) -> None:
    """Print the card, a table of its splits, their overlaps, warnings and samples."""
    from irl_align.utils.text_table import terminal_tables

    terminal = console()
    terminal.print(f"{card.name}: {card.kind}, licence {card.license or 'not given'}")
    for part in terminal_tables(_table(splits), terminal.width):
        terminal.print(part)
    for split in splits:
        for other in splits:
            shared = len(split.prompts & other.prompts)
            if split is not other and split.name == "train" and shared:
                share = shared / len(other.prompts)
                terminal.print(f"{share:.1%} of the prompts of {other.name} are also in train")
        for note in (*split.warnings, *split.notes):
            terminal.print(f"note: {note}", soft_wrap=True)
    for split in splits:
        for sample in split.samples:
            terminal.rule(f"sample of {split.name}", align="left")
            for field, text in sample.items():
                cut = text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + " …"
                terminal.print(f"{field}: {cut}", highlight=False)


def _table(splits: Sequence[SplitSummary]) -> Table:
    from irl_align.utils.text_table import Column, Table

    names = ["rows", "the card says", "prompts", "repeated"]
    names += [f"{field} words, {kind}" for field in splits[0].words for kind in ("mean", "most")]
    rows = [
        [
            split.name,
            *(split.rows, split.expected, len(split.prompts), split.repeated),
            *(number for mean_and_most in split.words.values() for number in mean_and_most),
        ]
        for split in splits
    ]
    return Table("splits", [Column("split"), *(Column(n, 0, grouped=True) for n in names)], rows)


def _check(card: Card, splits: Sequence[SplitSummary]) -> None:
    """Raise UserError with every difference between the card and the data."""
    faults = [warning for split in splits for warning in split.warnings]
    if not card.license:
        faults.append(f"{card.name}: the card gives no license")
    if faults:
        raise UserError(f"data.card {card.name}: {len(faults)} checks failed: {'; '.join(faults)}")
