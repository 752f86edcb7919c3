"""Memory of PPO on one shared backbone against four separate models.

    python tests/benchmarks/memory.py [--sizes 3M 30M 100M] [--updates 2]

For each size there are three trainings, each in its own process, on the same prompts and batch.
full: four models, all weights of policy and critic are trained. separate: four models, adapters are
trained. shared: one model with four adapters. Weights: bytes of all distinct parameters when
training starts. Peak: torch's own count on a GPU; on a CPU the highest resident set minus that
before any model was made, which is Python's and the libraries'. Separate and shared start from the
same adapters; the last column has the largest difference of their losses.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from generation import EOS, PAD, SIZES, random_llama, random_prompts
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from irl_align.config.model import LoraOptions
from irl_align.config.policy_update import PPOOptions
from irl_align.models.generation.protocol import Sampling
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.models.loading import load_model, pick_device, save_model, seeded
from irl_align.models.lora import DEFAULT_ADAPTER, add_adapter, train_only
from irl_align.models.trl import Training
from irl_align.policy import Demonstrations
from irl_align.policy.ppo import update
from irl_align.policy.ppo.actors import Actors
from irl_align.policy.ppo.backbone import share_backbone
from irl_align.policy.ppo.network import Critic, Network
from irl_align.reward.model import RewardModel
from irl_align.reward.settings import RewardSettings
from irl_align.utils.hardware import peak_memory

VOCABULARY = 8192
LORA = LoraOptions(r=16)
KINDS = ("full", "separate", "shared")
LOSSES = ("policy_loss", "value_loss", "kl", "reward")


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def write_models(size: str, folder: Path, longest: int) -> None:
    """Write the base, adapters of a policy and a reward on it, and a reward without adapter."""
    own = tokenizer()
    save_model(random_llama(size, VOCABULARY, longest), own, folder / "base")
    policy = load_model(folder / "base")
    with seeded(1):
        add_adapter(policy, LORA, str(folder / "base"))
    save_model(policy, own, folder / "policy")
    for name, lora in (("reward", LORA), ("whole-reward", None)):
        settings = RewardSettings()
        reward = RewardModel.from_policy(folder / "base", own, settings, seed=2, lora=lora)
        reward.save_pretrained(folder / name)


def actors(kind: str, folder: Path, options: PPOOptions, longest: int) -> Actors:
    device = pick_device("auto")
    policy = load_model(folder / ("base" if kind == "full" else "policy"), device, merge=False)
    if kind != "full":
        train_only(policy, DEFAULT_ADAPTER)
    backbone, reference = None, policy
    reward: Any = None
    if kind == "shared":
        backbone = share_backbone(policy, folder / "policy", folder / "base", folder / "reward")
        reward = backbone.reward
    else:
        reference = load_model(folder / "base", device).requires_grad_(False)
        name = "whole-reward" if kind == "full" else "reward"
        reward = RewardModel.from_pretrained(folder / name, device, merge=False)
    prompts = random_prompts(64, VOCABULARY)
    return Actors(
        policy=policy,
        reference=reference,
        reward=reward,
        generator=TransformersGenerator(policy, [EOS], PAD),
        tokenizer=tokenizer(),
        prompts=prompts,
        held_out=Demonstrations(prompts[:2], [[5, EOS], [6, EOS]], ""),
        sampling=Sampling(n=options.n, max_new_tokens=longest),
        starts_at_reference=True,
        backbone=backbone,
    )


def weight_bytes(*modules: nn.Module | None) -> int:
    """Bytes of all distinct weights."""
    weights = {w.data_ptr(): w for m in modules if m is not None for w in m.parameters()}
    return sum(w.numel() * w.element_size() for w in weights.values())


def train_one(kind: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train once in this process: MiB of weights, peak MiB, and the losses of the updates."""
    before = psutil.Process().memory_info().rss
    options = PPOOptions.model_validate(
        {
            **{"kind": "ppo", "critic_init": "reward", "missing_eos": "ignore", "keep": "last"},
            **{"batch_size": arguments.batch, "episodes": arguments.batch * arguments.updates},
            **{"epochs": 1, "learning_rate": 1e-4, "max_batch_tokens": arguments.batch_tokens},
        }
    )
    cast = actors(kind, folder, options, arguments.max_new_tokens)
    result: dict[str, Any] = {}

    def watched(policy: PreTrainedModel, critic: Critic | None, temperature: float) -> Network:
        judge: Any = cast.reward
        reward = judge.reward if kind == "shared" else judge
        models = (policy, critic, cast.reference, reward.model)
        result["weights"] = weight_bytes(*models) / 2**20
        return Network(policy, critic, temperature)

    work = Path(tempfile.mkdtemp(dir=folder))
    training = Training(work, 0, cast.policy.device, label="PPO")
    with mock.patch.object(update, "Network", watched):
        history = update.train_ppo(replace(cast, judge=None), options, training)["history"]
    memory = peak_memory()
    peak = memory.get("peak_cuda_mib", memory["peak_rss_mib"] - before / 2**20)
    result |= {"peak": peak, "losses": [[record[name] for name in LOSSES] for record in history]}
    return result


def measured(kind: str, folder: Path, given: list[str]) -> dict[str, Any]:
    """Run :func:`train_one` in its own process."""
    command = [sys.executable, __file__, "--worker", kind, "--folder", str(folder), *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["3M", "30M", "100M"], choices=SIZES)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32, help="samples of a rollout")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="of a forward pass")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(train_one(arguments.worker, arguments.folder, arguments)))
        return
    names = ("updates", "batch", "batch_tokens", "max_new_tokens")
    given = [f"--{n.replace('_', '-')}={getattr(arguments, n)}" for n in names]
    print("| size | models | weights MiB | ratio | peak MiB | ratio | largest loss difference |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_models(size, Path(folder), arguments.max_new_tokens)
            results = {kind: measured(kind, Path(folder), given) for kind in KINDS}
        for kind in KINDS:
            own, separate = results[kind], results["separate"]
            rows = zip(own["losses"], separate["losses"], strict=True)
            gap = max(abs(a - b) for one, other in rows for a, b in zip(one, other, strict=True))
            difference = f"{gap:.1e}" if kind == "shared" else ""
            shares = [f"{own[n]:.1f} | {own[n] / separate[n]:.2f}" for n in ("weights", "peak")]
            print(f"| {size} | {kind} | {' | '.join(shares)} | {difference} |", flush=True)


if __name__ == "__main__":
    main()
