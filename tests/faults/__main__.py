"""`make faults`: cases of faults, and a table of how they went."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

from .harness import available, plan, references, run_case
from .kinds import FAULTS
from .table import write


def main() -> int:
    """Run the cases that the command line names; return 1 if one of them is lost."""
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=Path("runs/faults"))
    parser.add_argument("--kinds", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--chosen", nargs="+", metavar="KIND:LOOP", help="only these cases")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases to repeat")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import irl_align.training.train  # noqa: F401 - every forked process has it then

    kinds = available(options.kinds)
    for kind in set(options.kinds) - set(kinds):
        print(f"{kind}: this system does not let a user mount; left out", flush=True)
    chosen = plan(options.cases, options.seed, kinds)
    if options.chosen:
        chosen = [(kind, loop) for kind, _, loop in (c.partition(":") for c in options.chosen)]
    home = options.report.absolute()
    homes = {f"{loop}-served" if kind == "server" else loop for kind, loop in chosen}
    references(home / "reference", sorted(homes))
    outcomes = []
    for number, (kind, loop) in enumerate(chosen):
        if options.only and number not in options.only:
            continue
        began = time.monotonic()
        case = home / f"case-{number}"
        outcome = run_case(number, kind, loop, options.seed, home / "reference", case)
        outcomes.append(outcome)
        verdict = "; ".join(outcome.wrong) or "same weights"
        seconds = time.monotonic() - began
        print(f"{number:3} {loop:9} {outcome.fault}: {verdict} ({seconds:.0f} s)", flush=True)
        write(home, outcomes, options.seed)
    lost = [outcome for outcome in outcomes if outcome.wrong]
    print(f"{len(outcomes) - len(lost)} of {len(outcomes)}: {home / 'faults.md'}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
