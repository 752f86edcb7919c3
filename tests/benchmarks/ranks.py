"""Speed of two processes against one for sampling and PPO updates, and the cores' ceiling.

Every process has one thread. The ceiling is the speed of two unrelated runs at the same time: two
virtual cores of one physical core give far less than twice the speed of one.

    python tests/benchmarks/ranks.py [--width 256] [--updates 4]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
KINDS = ("generation", "PPO updates")


def main() -> None:
    """Measure one process, two of one run and two unrelated ones, in this order, `repeat` times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    best: dict[str, list[float]] = {}
    for _ in range(options.repeat):
        for name, seconds in {
            "one": started([{}], options)[0],
            "together": slowest(started(together(), options)),
            "apart": slowest(started([{}, {}], options)),
        }.items():
            before = best.get(name, seconds)
            best[name] = [min(pair) for pair in zip(before, seconds, strict=True)]
    for number, kind in enumerate(KINDS):
        one, both, apart = (best[name][number] for name in ("one", "together", "apart"))
        print(
            f"{kind}: 1 process {one:.2f} s; 2 processes {both:.2f} s, {one / both:.2f}x; "
            f"ceiling (two runs at once) {2 * one / apart:.2f}x; of the ceiling "
            f"{apart / both / 2:.0%}"
        )


def together() -> list[dict[str, str]]:
    """Environments of two processes of one run."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]


def started(environments: list[dict[str, str]], options: Any) -> list[list[float]]:
    """Seconds of both kinds of work in processes that run at the same time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = [f"--{n}={getattr(options, n)}" for n in ("width", "layers", "samples", "tokens")]
        command = [sys.executable, __file__, *own, f"--updates={options.updates}"]
        running = []
        for number, environment in enumerate(environments):
            more = {**environment, "START": str(len(environments)), "NUMBER": str(number)}
            worker = [*command, "--worker", str(folder)]
            running.append(subprocess.Popen(worker, env={**os.environ, **more}))
        for process in running:
            if process.wait():
                raise SystemExit(f"a worker ended with status {process.returncode}")
        return [json.loads((folder / f"{n}.json").read_text()) for n in range(len(running))]


def slowest(seconds: list[list[float]]) -> list[float]:
    """The longest time of every kind of work over processes."""
    return [max(kind) for kind in zip(*seconds, strict=True)]


def meet(folder: Path, name: str) -> None:
    """Wait until all workers are here, also those of unrelated runs."""
    (folder / f"{name}-{os.environ['NUMBER']}").touch()
    while len(list(folder.glob(f"{name}-*"))) < int(os.environ["START"]):
        time.sleep(0.002)


def work(options: Any) -> None:
    """One worker: the same rollouts and updates, as the only process or as one of two."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from irl_align.config.policy_update import PPOOptions
    from irl_align.models.generation.protocol import Sampling
    from irl_align.models.generation.transformers_backend import TransformersGenerator
    from irl_align.policy.ppo.distributed import make_accelerator
    from irl_align.policy.ppo.learner import Learner, UpdateBatch
    from irl_align.policy.ppo.network import Network
    from irl_align.policy.ppo.rollout import collate, sample
    from irl_align.utils import distributed

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
    )
    policy = AutoModelForCausalLM.from_config(config)
    cpu = torch.device("cpu")
    draws = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(2, 2048, (int(n),), generator=draws).tolist()
        for n in torch.randint(8, 40, (options.samples,), generator=draws)
    ]
    sampling = Sampling(n=1, max_new_tokens=options.tokens, seed=3)
    settings = PPOOptions(
        kind="ppo", advantage="rloo", n=2, batch_size=options.samples,
        episodes=options.samples * 8, epochs=1, max_batch_tokens=2048,
    )  # fmt: skip
    with distributed.joined(cpu):
        generator = TransformersGenerator(policy, [1], 0)
        accelerator = make_accelerator(cpu, bf16=False)
        learner = Learner(Network(policy, None, 1.0), settings, cpu, 0, 0, accelerator)
        sample(generator, prompts[:4], sampling)  # the first call is slower
        distributed.barrier()
        meet(Path(options.worker), "generation")
        began = time.perf_counter()
        samples = collate(prompts, sample(generator, prompts, sampling))
        seconds = [time.perf_counter() - began]
        packed = learner.pack(samples.prompts, samples.completions)
        logps, _ = learner.infer(packed, logps=True, values=False)
        assert logps is not None
        advantages = torch.randn(logps.shape, generator=draws) * samples.mask
        batch = UpdateBatch(packed, logps, advantages)
        meet(Path(options.worker), "updates")
        began = time.perf_counter()
        for number in range(options.updates):
            learner.update(number, replaced(batch, learner))
        seconds.append(time.perf_counter() - began)
    path = Path(options.worker) / f"{os.environ['NUMBER']}.json"
    path.write_text(json.dumps(seconds))


def replaced(batch: Any, learner: Any) -> Any:
    """The batch with log-probs of the present policy, as in an update on its own samples."""
    from dataclasses import replace

    logps, _ = learner.infer(batch.packed, logps=True, values=False)
    return replace(batch, old_logps=logps)


if __name__ == "__main__":
    main()
