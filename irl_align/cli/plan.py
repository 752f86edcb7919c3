"""The command plan: the stages of a recipe and the resources that they need."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from irl_align.cli.terminal import Debug, console, set_up

if TYPE_CHECKING:
    from irl_align.training.plan.plan import Plan, Step


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: irl-align plan recipes/tldr/irl-ppo-pythia-1b.yaml --device h100")(
        plan
    )


def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Options to change, as key=value.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="a100-40gb, a100-80gb, h100, h200, l40s, rtx-4090, or cpu.")
    ] = "a100-80gb",
    mfu: Annotated[
        float,
        typer.Option(min=0.01, max=1.0, help="Share of peak operations in training and scoring."),
    ] = 0.35,
    mbu: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of memory bandwidth in sampling.")
    ] = 0.5,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show what a recipe would do: stages, tokens, memory, hours, disk. Nothing is run."""
    set_up(debug)
    if not debug:  # our own message says once that the Hub is not available
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    from irl_align.config.recipe import load_recipe
    from irl_align.training.plan.devices import device_named
    from irl_align.training.plan.plan import Assumptions, make_plan
    from irl_align.utils.files import to_json

    assumptions = Assumptions(device_named(device), mfu, mbu)
    made = make_plan(load_recipe(recipe, overrides or []), assumptions)
    if json:
        typer.echo(to_json(made.to_dict(), indent=2))
    else:
        _show(made)


def _show(plan: Plan) -> None:
    out = console()
    shape, counts = plan.shape, plan.counts
    out.print(f"{plan.recipe.name}: {shape.family}, {_number(shape.parameters)} parameters")
    rows = ", ".join(f"{name} {many:,}" for name, many in counts.rows.items())
    out.print(f"rows: {rows} ({counts.how})", markup=False, soft_wrap=True)
    out.print(f"store: {plan.store}", markup=False, soft_wrap=True)
    out.print(_stages(plan))
    out.print(_memory(plan))
    for line in [*_totals(plan), *plan.recipe.contradictions()]:
        out.print(line, markup=False, soft_wrap=True)


def _stages(plan: Plan) -> Table:
    """One line per stage, except that neighbouring measurements share a line."""
    from irl_align.training.plan.plan import total_hours

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", justify="right", no_wrap=True, min_width=2)
    table.add_column("stage", no_wrap=True)
    for name in ("reads", "store", "rows", "tokens", "sampled", "memory", "hours"):
        table.add_column(name, justify="right", no_wrap=True)
    lines = _lines(plan.steps)
    number = {step.role: i for i, line in enumerate(lines, 1) for step in line}
    for i, line in enumerate(lines, 1):
        reads = {number[role] for step in line for role in step.reads} - {i}
        missing = [step for step in line if not step.found]
        state = "found" if not missing else "to do" if len(missing) == len(line) else "in part"
        table.add_row(
            str(i),
            str(line[0].role) if len(line) == 1 else f"measuring ({len(line)} stages)",
            ",".join(map(str, sorted(reads))),
            state,
            _number(sum(step.cost.rows for step in line)),
            _number(sum(step.cost.tokens for step in line)),
            _number(sum(step.cost.sampled for step in line)),
            _bytes(max(step.cost.use.peak for step in line)),
            _hours(total_hours([plan.assumptions.hours(step.cost) for step in missing])),
        )
    return table


def _lines(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps in their order, grouped: neighbouring measurements are one line."""
    lines: list[list[Step]] = []
    for step in steps:
        if lines and step.role.part == lines[-1][-1].role.part == "measuring":
            lines[-1].append(step)
        else:
            lines.append([step])
    return lines


def _memory(plan: Plan) -> Table:
    from irl_align.training.plan.plan import parts_of

    kinds = {kind: parts for kind, parts in parts_of(plan).items() if parts["peak"]}
    names = dict.fromkeys(name for parts in kinds.values() for name in parts)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title="memory of the fullest stages")
    table.add_column("")
    for kind in kinds:
        table.add_column(kind, justify="right", no_wrap=True)
    for name in [*(name for name in names if name != "peak"), "peak"]:
        table.add_row(name, *(_bytes(parts.get(name, 0.0)) for parts in kinds.values()))
    return table


def _totals(plan: Plan) -> list[str]:
    device, peak = plan.assumptions.device, plan.peak
    if peak is None:
        return ["nothing to do: the store has every stage"]
    need, has = peak.cost.use.peak, device.memory * 2**30
    verdict = "fits" if need < has else "DOES NOT FIT"
    lines = [
        f"memory: {_bytes(need)} at {peak.role}; {verdict} into {device.name} "
        f"({device.memory:.0f} GiB), without the memory of its libraries",
        f"disk: {_bytes(plan.disk)}, including the largest checkpoints",
    ]
    if plan.hours is None:
        return [*lines, "hours: not estimated for a CPU"]
    return [
        *lines,
        f"hours: {_hours(plan.hours)} on one {device.name}, at {plan.assumptions.mfu:.0%} of its "
        f"peak operations and {plan.assumptions.mbu:.0%} of its bandwidth; without text, "
        "disk and start-up",
    ]


def _number(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 10 * size:
            return f"{value / size:,.1f}{unit}"
    return f"{value:,.0f}" if value else "-"


def _bytes(value: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:.0f} B" if value else "-"


def _hours(value: float | None) -> str:
    if value is None:
        return "?"
    return "-" if not value else f"{value:,.2f}" if value >= 0.01 else "<0.01"
