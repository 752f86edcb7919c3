"""Time of the reward's fit on a run's pairs against bare training steps on as many tokens.

    python tests/benchmarks/reward_fit.py RUN [--pairs 3200]

One thread, CPU seconds. RUN has fitted an explicit reward in iteration 0. The fit is repeated from
its SFT model, with its recipe, on a part of the pairs. The bare steps have no padding, no masks and
no trainer: rows of the mean length, and as many tokens as the distinct sequences of the pairs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from trl import RewardConfig

from irl_align.config.recipe import load_recipe
from irl_align.data.pairs import load_pairs
from irl_align.models.attention import short_attention
from irl_align.models.trl import Training
from irl_align.models.trl_options import training_args
from irl_align.reward.fit import SIDES, fit_reward, pair_columns
from irl_align.reward.losses import PairLoss
from irl_align.reward.model import RewardModel
from irl_align.reward.settings import RewardSettings
from irl_align.training.reward_step import scheduled
from irl_align.training.run_folder import Run


def floor(reward: RewardModel, tokens: int, length: int, rows: int, bf16: bool) -> float:
    """CPU seconds of bare steps on this many tokens, in rows of one length."""
    model = reward.model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0)
    ids = torch.randint(3, model.config.vocab_size, (rows, length))

    def step() -> None:
        with short_attention(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            scores = model(input_ids=ids).logits
        scores.float().square().mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    steps = max(3, tokens // (rows * length) // 4)
    begin = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - begin) / steps * tokens / (rows * length)


def main(folder: Path, count: int) -> None:
    """Print pairs per CPU second of both, and their ratio."""
    view = Run.load(folder)
    recipe = load_recipe(folder / "recipe.yaml")
    stage = {role: folder / where["path"] for role, where in view.stages.items()}
    options = recipe.reward
    pairs = load_pairs(stage["pairs/0"] / "train.parquet").shuffle(seed=0).select(range(count))
    start = RewardModel.from_pretrained(stage["reward/0"] / "model")
    settings = RewardSettings(options.lm_coef, options.bound, options.echo)
    sft = stage["sft"] / "model"
    reward = RewardModel.from_policy(sft, start.tokenizer, settings, seed=0)
    columns = pair_columns(pairs)
    read = {p: reward.as_read(columns[p], columns[c]) for p, c in SIDES}
    unique = {
        (tuple(prompt), tuple(completion))
        for side, texts in read.items()
        for prompt, completion in zip(columns[side], texts, strict=True)
    }
    tokens = sum(len(prompt) + len(completion) for prompt, completion in unique)
    args = {**scheduled(options.args, options.schedule, 0), "num_train_epochs": 1}
    with tempfile.TemporaryDirectory() as work:
        training = Training(Path(work), 0, torch.device("cpu"), label="reward")
        batch = training_args(RewardConfig, args, training).per_device_train_batch_size
        bare = floor(reward, tokens, round(tokens / len(unique)), 2 * batch, bool(args.get("bf16")))
        begin = time.process_time()
        fit_reward(reward, columns, PairLoss(options.loss), args, training)
        took = time.process_time() - begin
    print(
        f"{folder.name}: {count} pairs, {tokens} tokens: bare {count / bare:.1f}, fit "
        f"{count / took:.1f} pairs a CPU second; bare / fit {bare / took:.2f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--pairs", type=int, default=3200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    main(arguments.run, arguments.pairs)
