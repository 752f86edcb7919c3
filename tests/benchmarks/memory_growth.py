"""Does memory grow over many PPO updates? Resident memory per update, and its slope.

    python tests/benchmarks/memory_growth.py --updates 200

The model is tiny, so that a leak of a few kilobytes per update is visible. The slope is fitted by
least squares after a warm-up, with a 95% interval over blocks of ten updates (neighbouring readings
are not independent). Noise is the spread of the readings around the line.
"""

import argparse
import gc
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
import torch
from scipy import stats
from support.ppo_tools import EOS, Scripted, actors, options, small_llama, training
from support.rows import random_ids
from support.tiny_models import cached_tokenizer

from irl_align.policy.ppo.update import train_ppo

BLOCK = 10
BATCH = 16


def slope(readings: np.ndarray) -> dict[str, float]:
    """KiB per update of readings (N,) in KiB, with its 95% interval and the noise around it."""
    blocks = readings[: len(readings) // BLOCK * BLOCK].reshape(-1, BLOCK).mean(1)
    places = (np.arange(len(blocks)) + 0.5) * BLOCK
    line = stats.linregress(places, blocks)
    half = float(stats.t.ppf(0.975, len(blocks) - 2) * line.stderr)
    noise = float((blocks - line.intercept - line.slope * places).std(ddof=2))
    return {
        "slope": line.slope,
        "low": line.slope - half,
        "high": line.slope + half,
        "noise": noise,
    }


def main() -> None:
    """Train, read the memory after every update, and print the fitted slope as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=40, help="updates that are left out")
    given = parser.parse_args()
    torch.set_num_threads(1)
    process, readings, calls = psutil.Process(), list[float](), itertools.count(1)

    def score(prompt: list[int], completion: list[int]) -> float:
        if next(calls) % BATCH == 0:  # the last completion of a rollout
            gc.collect()
            readings.append(process.memory_info().rss / 1024)
        return float(EOS in completion)

    chosen = options(
        episodes=BATCH * given.updates,
        batch_size=BATCH,
        critic="separate",
        critic_init="zero",
        checkpoint_every=20,
    )
    prompts = random_ids(16, 2, 5, 0, vocabulary=12)
    cast = actors(small_llama(12), Scripted(score), cached_tokenizer(), prompts, chosen)
    with tempfile.TemporaryDirectory() as folder:
        train_ppo(cast, chosen, training(Path(folder)))
    growth = slope(np.asarray(readings[given.warm_up :]))
    grown = growth["slope"] * (given.updates - given.warm_up)
    print(
        json.dumps(
            {
                "updates": len(readings),
                "rss_mib": round(readings[-1] / 1024, 1),
                **{f"{name}_kib": round(value, 3) for name, value in growth.items()},
                "grown_kib": round(grown, 1),
                "below_noise": bool(
                    abs(grown) < growth["noise"] or growth["low"] <= 0 <= growth["high"]
                ),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
