"""Time to give vLLM new weights: start, sync, comparison with the learner.

    python tests/benchmarks/sync.py --size 100M --syncs 5

Every sync loads other weights from a folder like those in the store of a run. ``save`` is the extra
cost for a policy in training (PPO), and ``compare`` the check of log-probs in each sync.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from generation import EOS, SIZES, random_llama

from irl_align.config.generation import ServerOptions
from irl_align.models.generation.vllm_backend import VLLMGenerator
from irl_align.models.generation.vllm_common import EngineSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="100M")
    parser.add_argument("--vocab", type=int, default=1200)
    parser.add_argument("--syncs", type=int, default=5)
    options = parser.parse_args()
    model = random_llama(options.size, options.vocab, 64)
    seconds: dict[str, list[float]] = {"save": [], "sync": [], "compare": []}
    gaps = []
    with tempfile.TemporaryDirectory() as folder:
        settings = EngineSettings("cpu", "float32", 256, 4096)
        sampler = VLLMGenerator(settings, "vllm", ServerOptions(), Path(folder) / "log")
        for number in range(options.syncs + 1):
            with torch.no_grad():
                for weights in model.model.layers.parameters():
                    weights.mul_(1.01)
            times = [time.perf_counter()]
            path = Path(folder) / str(number)
            model.save_pretrained(path)
            times.append(time.perf_counter())
            sampler.sync(path, str(number), [EOS], lambda: model)
            times.append(time.perf_counter())
            gaps.append(sampler.compare(lambda: model))
            times.append(time.perf_counter())
            if number == 0:
                print(f"start: {times[2] - times[1]:.1f} s")
                continue  # the first load starts the engine, the first comparison warms it up
            for name, took in zip(seconds, np.diff(times), strict=True):
                seconds[name].append(float(took))
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{parameters:.0f}M parameters, {options.syncs} syncs, {torch.get_num_threads()} threads")
    for name, each in seconds.items():
        print(f"{name:8} median {np.median(each):.3f} s, max {max(each):.3f} s")
    print(f"largest gap of a log-prob after a sync: {max(gaps):.1e}")
    sampler.close()


if __name__ == "__main__":
    main()
