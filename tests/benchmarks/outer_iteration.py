"""Seconds of one outer iteration after SFT: ours in one process against a chain of TRL's commands.

    python tests/benchmarks/outer_iteration.py --model SFT_MODEL --data path/to/e2e --backend vllm

Both sample the policy once per prompt, fit a reward on demonstrations against samples, sample n
candidates for a subset of the prompts, score them, and fine-tune on the best. The chain is what a
user would write: ``trl_generate.py`` (in this folder), ``trl reward``, ``trl_generate.py``, ``trl
sft``. Rows, epochs, batch sizes and lengths are the same. Starting processes and loading models
counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from irl_align.config.recipe import load_recipe
from irl_align.data.tokenizer import decode_batch
from irl_align.policy import Policy
from irl_align.training.context import RunContext
from irl_align.training.iteration import Data, Iteration
from irl_align.training.pair_step import make_pairs
from irl_align.training.policy_step import improve_policy
from irl_align.training.prepare import load_data, prepare, supervise
from irl_align.training.reward_step import fit_reward_level
from irl_align.training.run_folder import Run
from irl_align.training.stages import BuiltStages
from irl_align.training.store import Store

HERE = Path(__file__).parent
RECIPE = """\
name: outer
device: cpu
data: {{card: e2e_nlg, path: {data}, share: {share}}}
model: {{path: {model}}}
sft: {{enabled: false}}
generation: {{max_new_tokens: 96, backend: {backend}}}
reward: {{args: {{num_train_epochs: 1, per_device_train_batch_size: 32, learning_rate: 1.0e-4}}}}
policy_update:
  kind: best_of_n
  n: {n}
  prompts: {prompts}
  args: {{num_train_epochs: 1, per_device_train_batch_size: 32, learning_rate: 1.0e-4}}
"""


def open_context(folder: Path, options: argparse.Namespace) -> tuple[RunContext, Data, Policy]:
    """Open the recipe's run, encode its data and put the SFT policy into the store."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(**vars(options)))
    loaded = load_recipe(recipe, [f"output_dir={folder}"])
    run = Run(folder)
    stages = BuiltStages(Store(folder / "store"), run, loaded.seed)
    context = RunContext(loaded, stages, run, torch.device("cpu"))
    data, start = prepare(context, load_data(loaded))
    return context, data, supervise(context, start, data)


def ours(folder: Path, options: argparse.Namespace) -> None:
    """One iteration as bilevel() runs it; then sample the new policy, to time its sync."""
    context, data, policy = open_context(folder, options)
    begin = time.perf_counter()
    iteration = Iteration(0, policy, policy, None, data)
    pairs = make_pairs(context, iteration, policy)
    reward = fit_reward_level(context, iteration, [pairs])
    improved = improve_policy(context, replace(iteration, reward=reward))
    took = time.perf_counter() - begin
    vllm = context.sampler.vllm
    if vllm is not None and vllm.sync_seconds:
        prompts = data.demonstrations("reward").distinct_prompts()[:4]
        sampling = context.sampler.sampling(1, 1.0)
        context.sampler.sample(improved, prompts, sampling, "sync")
        start, *syncs = vllm.sync_seconds
        print(f"    {'engine, first weights':36}{start:8.1f} s, once per run")
        print(f"    {'sync of the new policy':36}{syncs[-1]:8.2f} s, {syncs[-1] / took:.1%}")
    context.close()
    stages = json.loads((folder / "stages.json").read_text())
    for role, stage in stages.items():
        record = json.loads((folder / stage["path"] / "stage.json").read_text())
        print(f"    {role:36}{record['seconds']:8.1f} s")


def chain(folder: Path, rows: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """What a command of the chain does -> the command."""
    script = [sys.executable, str(HERE / "trl_generate.py")]
    trl = [str(Path(sys.executable).with_name("trl"))]
    common: dict[str, Any] = {
        "model_name_or_path": options.model,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 32,
        "learning_rate": 1e-4,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
    }
    flags = [part for name, value in common.items() for part in (f"--{name}", str(value))]
    pairs, best, reward = folder / "pairs", folder / "best", folder / "reward"
    n = ["--n", str(options.n), "--prompts", str(options.prompts), "--reward", str(reward)]
    return {
        "sample pairs": [*script, "pairs", options.model, str(rows), str(pairs)],
        "trl reward": [
            *trl, "reward", *flags, "--dataset_name", str(pairs), "--output_dir", str(reward),
        ],
        "sample, score, best": [*script, "best", options.model, str(rows), str(best), *n],
        "trl sft": [
            *trl, "sft", *flags, "--dataset_name", str(best), "--output_dir", str(folder / "sft"),
        ],
    }  # fmt: skip


def timed(command: list[str]) -> float:
    """Seconds of a command. If it fails, its output is printed."""
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("    ")]
    print("\n".join(lines), end="\n" if lines else "")
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the SFT model")
    parser.add_argument("--data", required=True, help="folder of E2E")
    parser.add_argument("--backend", default="vllm", help="transformers or vllm")
    parser.add_argument("--share", type=float, default=0.03, help="share of the training prompts")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument(
        "--prompts", type=int, default=128, help="number of prompts that get n candidates"
    )
    parser.add_argument("--ours-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours_in is not None:
        ours(options.ours_in, options)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        context, data, _ = open_context(folder / "ours", options)
        context.close()
        columns = [decode_batch(context.tokenizer, data.reward[f"{c}_ids"]) for c in SIDES]
        rows = [dict(zip(SIDES, pair, strict=True)) for pair in zip(*columns, strict=True)]
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        distinct = len({row["prompt"] for row in rows})
        print(f"{len(rows)} demonstrations of {distinct} prompts; {os.cpu_count()} cores")
        rerun = [sys.executable, *sys.argv, "--ours-in", str(folder / "ours")]
        mine = timed(rerun)
        print(f"ours, {options.backend:33}{mine:8.1f} s")
        total = 0.0
        for name, command in chain(folder, file, options).items():
            took = timed(command)
            total += took
            print(f"    {name:36}{took:8.1f} s")
        print(f"{'chain of TRL commands':40}{total:6.1f} s, {total / mine:.2f} times ours")


SIDES = ("prompt", "completion")

if __name__ == "__main__":
    main()
