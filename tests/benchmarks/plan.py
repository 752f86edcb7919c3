"""Peak memory by `irl-align plan` and as measured: SFT, the reward's fit, SPIN's fit and PPO.

    python tests/benchmarks/plan.py DIR [--width 384] [--layers 8]

A model from scratch on the built-in task, float32 on a CPU. Each stage is built in its own process,
which reuses the other stages from the store in DIR. Measured is the high-water mark of resident
memory (VmHWM of Linux) minus the memory after the imports. The allocator returns freed arrays to
the system at once, so that only memory in use counts. Compared is the difference between the model
and a model with one layer of width 64: libraries, data and trainers take the same in both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

RECIPE = """\
name: {name}
output_dir: {folder}
device: cpu
data: {{card: restaurant, task: {{size: 80, noise: 0.0}}, held_out: 0.2}}
model:
  from_scratch:
    vocab_size: {vocabulary}
    hidden_size: {width}
    intermediate_size: {feed_forward}
    num_hidden_layers: {layers}
    num_attention_heads: {heads}
    max_position_embeddings: 256
sft: {{args: {{max_steps: 2, per_device_train_batch_size: 16, learning_rate: 1.0e-4}}}}
generation: {{max_new_tokens: 40, max_batch_tokens: 4096}}
pairs: {{truncated: keep}}
loop: {{iterations: 1, signs: {{unfit_accuracy: 0.0}}}}
evaluation: {{prompts: 4, held_out_prompts: 4}}
"""
PPO = """\
reward: {args: {max_steps: 2, per_device_train_batch_size: 16}}
policy_update:
  {kind: ppo, episodes: 32, batch_size: 16, epochs: 1, max_batch_tokens: 1024, keep: last,
   missing_eos: ignore, evaluate_every: 100}
"""
MORE_SAMPLES = PPO.replace("episodes: 32, batch_size: 16", "episodes: 128, batch_size: 64")
SPIN = """\
reward: {kind: implicit, args: {max_steps: 2, per_device_train_batch_size: 16, beta: 0.1}}
policy_update: {kind: identity}
"""
RECIPES = {"ppo": PPO, "ppo-64": MORE_SAMPLES, "spin": SPIN}
STAGES = {
    "sft": "ppo",
    "reward/0": "ppo",
    "16 samples an update: policy-1": "ppo",
    "64 samples an update: policy-1": "ppo-64",
    "SPIN's reward/0": "spin",
}
"""Label, whose last word is the stage's role -> recipe."""


def main() -> None:
    """Run the recipes, then build each stage again and compare its peak with the plan's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=1500)
    parser.add_argument("--build", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        build(options.folder / f"{options.build}.yaml")
        return
    small = peaks(options.folder / "small", 64, 1, options.vocabulary)
    large = peaks(options.folder / "large", options.width, options.layers, options.vocabulary)
    print("| stage | planned, MiB | measured, MiB | planned / measured |")
    print("| --- | ---: | ---: | ---: |")
    for stage, peak in large.items():
        planned, actual = (a - b for a, b in zip(peak, small[stage], strict=True))
        ratio = planned / actual
        print(f"| {stage} | {planned / 2**20:.0f} | {actual / 2**20:.0f} | {ratio:.2f} |")


def peaks(folder: Path, width: int, layers: int, vocabulary: int) -> dict[str, tuple[float, float]]:
    """Stage -> planned and measured peak bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rest in RECIPES.items():
        text = RECIPE.format(
            name=name,
            folder=folder / "runs",
            vocabulary=vocabulary,
            width=width,
            feed_forward=width * 8 // 3,
            layers=layers,
            heads=width // 64,
        )
        (folder / f"{name}.yaml").write_text(text + rest)
        measured(folder, name)
    both = {}
    for stage, name in STAGES.items():
        role = stage.split()[-1]
        run = folder / "runs" / f"{name}-seed0"
        shutil.rmtree(run / json.loads((run / "stages.json").read_text())[role]["path"])
        both[stage] = (plan(folder / f"{name}.yaml", role), measured(folder, name))
    return both


def plan(recipe: Path, role: str) -> float:
    """Peak bytes of a stage in the plan."""
    from irl_align.config.recipe import load_recipe
    from irl_align.training.plan.devices import device_named
    from irl_align.training.plan.plan import Assumptions, make_plan

    made = make_plan(load_recipe(recipe), Assumptions(device_named("cpu"), 0.35, 0.5))
    return next(step.cost.use.peak for step in made.steps if str(step.role) == role)


def measured(folder: Path, name: str) -> float:
    """Peak bytes above the imports of a process that builds the recipe's missing stages."""
    command = [sys.executable, __file__, str(folder), "--build", name]
    # Arrays from 64 KiB on get their own mapping; setting the bound also keeps it from moving.
    one = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=one)
    return float(done.stdout.splitlines()[-1])


def build(recipe: Path) -> None:
    """Run the recipe in this process and print its peak above the imports."""
    import transformers.models.llama.modeling_llama  # noqa: F401
    import trl.trainer.dpo_trainer
    import trl.trainer.reward_trainer
    import trl.trainer.sft_trainer  # noqa: F401

    from irl_align.training.train import train

    before = status("VmRSS")
    train(recipe)
    print(status("VmHWM") - before)


def status(name: str) -> int:
    """Bytes of one line of Linux's /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


if __name__ == "__main__":
    main()
