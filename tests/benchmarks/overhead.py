"""Share of a run's time that our own code takes around TRL's trainers and between stages.

    irl-align train recipes/restaurant/irl-best-of-n.yaml output_dir=runs-fresh
    python tests/benchmarks/overhead.py runs-fresh/restaurant-irl-best-of-n-seed0

Reads a run that finished without an interruption (it may have reused stages of other runs). The
output has two shares of the run's wall time. Around trainers: the time of the training stages (SFT,
reward, implicit reward, Best-of-N) outside of `trainer.train()`, which is loading, columns, the
normaliser, saving and committing. Between stages: the wall time minus the time of all stages. The
reference's log-probs before SPIN's training are listed separately; TRL also computes them in a pass
of their own (`precompute_ref_log_probs`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from irl_align.training.run_folder import Run
from irl_align.utils.files import read_json


def main(folder: Path) -> None:
    """Print the shares of one finished run."""
    view = Run.load(folder)
    if view.summary is None:
        raise SystemExit(f"{folder}: not finished")
    built = {
        record["key"].removeprefix("stage/")
        for record in view.metrics
        if record["key"].startswith("stage/") and not record["reused"]
    }
    distinct = {
        where["key"]: (role, read_json(folder / where["path"] / "stage.json", "a stage", "rerun"))
        for role, where in view.stages.items()
        if role in built
    }
    wall, in_stages, around, reference = view.summary["seconds"], 0.0, 0.0, 0.0
    print(f"{'stage':30s} {'seconds':>8s} {'trainer':>8s} {'reference':>9s} {'around':>8s}")
    for role, record in distinct.values():
        in_stages += record["seconds"]
        history = record["metrics"].get("history", [])
        if runtimes := [h["train_runtime"] for h in history if "train_runtime" in h]:
            logps = sum(h.get("reference_seconds", 0.0) for h in history)
            rest = record["seconds"] - runtimes[-1] - logps
            around, reference = around + rest, reference + logps
            times = f"{record['seconds']:8.1f} {runtimes[-1]:8.1f} {logps:9.1f} {rest:8.1f}"
            print(f"{role:30s} {times}")
    between = wall - in_stages
    print(
        f"wall {wall:.1f} s; around trainers {around:.1f} s ({around / wall:.1%}); "
        f"reference log-probs {reference:.1f} s ({reference / wall:.1%}); "
        f"between stages {between:.1f} s ({between / wall:.1%})"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    main(parser.parse_args().run)
