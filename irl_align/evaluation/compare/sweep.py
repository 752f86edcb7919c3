"""Sweeps of a recipe's option over several values; each value gives a recipe of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from irl_align.errors import UserError


@dataclass(frozen=True)
class Sweep:
    """An option and its values, for one recipe or (if target is None) for all recipes."""

    text: str
    target: str | None
    key: str
    values: tuple[str, ...]


def parse_sweeps(texts: Sequence[str]) -> list[Sweep]:
    """Parse sweeps that are written as `[NAME:]key=value,value,...`.

    Raises UserError: no key, fewer than two values, or the same value or key twice.
    """
    sweeps = [_parse(text) for text in texts]
    keys = [(sweep.target, sweep.key) for sweep in sweeps]
    for sweep in sweeps:
        if keys.count((sweep.target, sweep.key)) > 1:
            raise UserError(
                f"--sweep: found {sweep.key} twice, expected all of its values in one sweep"
            )
    return sweeps


def _parse(text: str) -> Sweep:
    left, equals, right = text.partition("=")
    target, colon, key = left.rpartition(":")
    values = tuple(value.strip() for value in right.split(","))
    if not equals or not key or (colon and not target) or not all(values):
        raise UserError(f"--sweep: found {text!r}, expected [NAME:]KEY=VALUE,VALUE,...")
    if key in ("seed", "name"):
        raise UserError(f"--sweep: found {key}, expected another option: it identifies runs")
    if len(set(values)) < max(2, len(values)):
        raise UserError(f"--sweep: found {right!r}, expected at least two values, each once")
    return Sweep(text, target or None, key, values)


def settings(sweeps: Sequence[Sweep]) -> list[tuple[str, ...]]:
    """Overrides of every combination of values; one empty combination if nothing is swept."""
    return list(product(*([f"{s.key}={value}" for value in s.values] for s in sweeps)))


def named(name: str, chosen: Sequence[str]) -> str:
    """Name of a recipe with these overrides, as a valid file name: the recipe's name, then the last
    part of each option and its value."""
    parts = [
        f"{key.rpartition('.')[2]}-{value}" for key, _, value in (c.partition("=") for c in chosen)
    ]
    return "-".join([name, *(re.sub(r"[^A-Za-z0-9._-]+", "-", part) for part in parts)])
