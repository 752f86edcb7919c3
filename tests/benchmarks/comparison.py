"""What does a comparison save by sharing stages? The built-in task, six methods, several seeds.

    python tests/benchmarks/comparison.py --seeds 2 --folder comparison

The methods are those of the restaurant recipes at a small size. The output has the seconds of all
stages with sharing and the seconds that the runs would take without it (both as the stages took
them), with --alone the measured seconds of one run of each method without sharing, and the seconds
of the report.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from irl_align.config.resources import recipes_dir
from irl_align.evaluation.compare.runner import CompareOptions, compare
from irl_align.evaluation.report.write import write_report

SMALL = (
    "device=cpu",
    "data.task={size: 1500, noise: 0.0}",
    "evaluation.prompts=60",
    "evaluation.held_out_prompts=60",
    "sft.args.num_train_epochs=4",
)
SFT_ARGS = "{num_train_epochs: 1, per_device_train_batch_size: 48, learning_rate: 5.0e-4}"
RLOO = "{kind: ppo, advantage: rloo, n: 4, episodes: 512, batch_size: 128, epochs: 1, keep: last}"
METHODS = {
    "sft": ("base.yaml", ""),
    "sft-more": (
        "base.yaml",
        f"reward: {{kind: none}}\npolicy_update: {{kind: sft, args: {SFT_ARGS}}}\n"
        "loop: {iterations: 1}\n",
    ),
    "spin": ("spin.yaml", ""),
    "dpo-fixed-ref": ("spin.yaml", "reward: {reference: initial}\n"),
    "irl-best-of-n": ("irl-best-of-n.yaml", "loop: {iterations: 1}\n"),
    "irl-rloo": ("irl-best-of-n.yaml", f"policy_update: {RLOO}\nloop: {{iterations: 1}}\n"),
}
"""Name -> its recipe of the built-in task, and the changes to it."""


def write_recipes(folder: Path) -> list[str]:
    """Write one recipe file per method and return their paths."""
    paths = []
    for name, (parent, changes) in METHODS.items():
        path = folder / f"{name}.yaml"
        base = recipes_dir() / "restaurant" / parent
        path.write_text(f"extends: {base}\nname: {name}\n{changes}", encoding="utf-8")
        paths.append(str(path))
    return paths


def main() -> None:
    """Run the comparison and print one line for each number."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--alone", action="store_true", help="also run every method of seed 1 without sharing"
    )
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipes = write_recipes(asked.folder)
    everything = [*recipes, *SMALL, f"output_dir={asked.folder / 'runs'}"]
    began = time.monotonic()
    compared = compare(everything, CompareOptions(tuple(range(1, asked.seeds + 1))))
    took = time.monotonic() - began
    seconds = compared.analysis["seconds"]
    print(f"comparison: {took:.0f} s; failed: {compared.failed or 'none'}")
    shared, by_itself = seconds["shared"], seconds["one_by_one"]
    print(f"stages: {shared:.0f} s shared, {by_itself:.0f} s one by one: {shared / by_itself:.0%}")
    if asked.alone:
        alone(asked.folder, recipes)
    began = time.monotonic()
    write_report(compared.folder)
    print(f"report: {time.monotonic() - began:.1f} s")


def alone(folder: Path, recipes: list[str]) -> None:
    """Run every method of seed 1 with its own store, one after another."""
    total = 0.0
    for path in recipes:
        began = time.monotonic()
        output = folder / "alone" / Path(path).stem
        compare([path, *SMALL, f"output_dir={output}"], CompareOptions((1,)))
        total += time.monotonic() - began
    print(f"six methods of seed 1, without sharing: {total:.0f} s")


if __name__ == "__main__":
    main()
