"""`make fuzz`: hostile recipes, data rows, cards and run folders must be read or refused.

For a case that breaks, hypothesis reports the smallest input that breaks too.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import hypothesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from support.tiny_runs import write_recipe

from irl_align.config.recipe import load_recipe
from irl_align.utils.files import atomic_write, to_json

from .guard import Watch
from .targets import TARGETS, clean, whole_run

SHARES = {
    "recipes": 0.1,
    "rows": 0.38,
    "cards": 0.35,
    "runs": 0.15,
    "trainings": 0.02,
}  # quick targets have more cases


def fuzz(target: str, cases: int, seed: int, folder: Path, watch: Watch) -> int:
    """Run cases of a target and return their number; an error of a case is raised."""
    ran = 0
    clean(folder)
    whole_run(folder.parent / "whole-run")
    load_recipe(write_recipe(folder))  # imports what recipes are checked against

    @hypothesis.seed(seed)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(st.composite(TARGETS[target])())
    def case(run: Callable[[Path], None]) -> None:
        nonlocal ran
        ran += 1
        home = clean(folder)
        with watch.on(home, lines=25 if target == "recipes" else 1):
            run(home)

    case()
    return ran


def main() -> int:
    """Fuzz the targets that the command line names; return 1 if one breaks."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--report", type=Path, default=Path("runs/fuzz"))
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    watch, broken, report = Watch(), 0, {}
    for target in options.targets:
        began, share = time.monotonic(), max(1, round(options.cases * SHARES[target]))
        folder = (options.report / target).absolute()
        try:
            ran = fuzz(target, share, options.seed, folder, watch)
            verdict = "refused or read"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            ran, verdict = 0, f"{type(error).__name__}: {str(error)[:500]}"
            broken += 1
            notes = "\n".join(getattr(error, "__notes__", []))
            print(f"{notes}", flush=True)
            logging.disable(logging.NOTSET)
            import traceback

            traceback.print_exception(error, limit=-6)
        report[target] = {"cases": ran, "verdict": verdict}
        print(f"{target}: {ran} cases, {verdict} ({time.monotonic() - began:.0f} s)", flush=True)
        atomic_write(options.report / "fuzz.json", to_json(report, indent=1) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
