"""Time of PPO's learner against a bare training step, and of a full step against TRL's RLOOTrainer.

    python tests/benchmarks/ppo.py --model RUNS/store/sft-KEY/model --data path/to/e2e

Without --model a random Llama of 2M parameters is used, whose completions have geometrically
distributed lengths. --data is a folder with train.jsonl.gz of E2E.

Learner: our update of a rollout (packing, losses, monitors, clipping, AdamW) against a bare
forward, cross-entropy, backward and AdamW step on the same number of tokens and completion tokens,
in rows of one length without padding; for the policy, and for policy and critic. Full step: sample,
score with a reward model of the policy's size, run the reference, update once (4 samples per
prompt, KL in the reward, one epoch) in both. All run in one process, and the least of several times
counts. Times are CPU seconds of all threads, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from generation import EOS, PAD, Prompts, e2e_prompts, random_llama, random_prompts, word_encoder
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from irl_align.config.policy_update import PPOOptions
from irl_align.data.encoding import encode_prompts
from irl_align.evaluation.inference import PromptFormat
from irl_align.models.generation.protocol import Sampling
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.models.trl import Training
from irl_align.policy import Demonstrations
from irl_align.policy.ppo.actors import Actors
from irl_align.policy.ppo.checkpoint import Journal
from irl_align.policy.ppo.critic import make_critic
from irl_align.policy.ppo.distributed import make_accelerator
from irl_align.policy.ppo.learner import Learner, UpdateBatch
from irl_align.policy.ppo.network import Network
from irl_align.policy.ppo.rollout import RolloutBatch, draw
from irl_align.policy.ppo.trainer import PPOTrainer
from irl_align.reward.model import RewardModel
from irl_align.reward.settings import RewardSettings

CPU = torch.device("cpu")


def rollout(
    model: PreTrainedModel, prompts: Prompts, eos: int, count: int, longest: int
) -> RolloutBatch:
    generator = TransformersGenerator(model, [eos], PAD)
    return draw(generator, prompts, Sampling(max_new_tokens=longest), 0, 0, count)


# --- the learner ----------------------------------------------------------------------------------


def our_update(
    model: PreTrainedModel, samples: RolloutBatch, options: PPOOptions
) -> Callable[[], None]:
    """Updates on one rollout; each call packs and trains it again."""
    policy = copy.deepcopy(model)
    network = Network(policy, make_critic(options, policy, None, None), 1.0)  # type: ignore[arg-type]
    learner = Learner(network, options, CPU, 0, PAD, make_accelerator(CPU, options.bf16))
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(samples.mask.shape, generator=draw) * samples.mask
    values = noise if network.critic is not None else None

    def run() -> None:
        packed = learner.pack(samples.prompts, samples.completions)
        batch = UpdateBatch(packed, samples.logps, noise, old_values=values, targets=values)
        learner.update(0, batch)

    return run


def bare_update(
    model: PreTrainedModel, samples: RolloutBatch, options: PPOOptions, critic: bool
) -> Callable[[], None]:
    """A bare step on as many tokens in rows of one length, with the loss on completion tokens."""
    tokens = sum(map(len, samples.prompts)) + int(samples.mask.sum())
    rows = len(samples.prompts)
    length = round(tokens / rows)
    reply = round(float(samples.mask.sum()) / rows)
    nets = [copy.deepcopy(model)] + ([copy.deepcopy(model)] if critic else [])
    heads = [torch.nn.Linear(model.config.hidden_size, 1) for _ in nets[1:]]
    modules = [*nets[:1], *[net.base_model for net in nets[1:]], *heads]
    weights = [weight for module in modules for weight in module.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)
    ids = torch.randint(2, model.config.vocab_size, (rows, length))
    per_batch = max(1, min(rows, 2048 // length))

    def run() -> None:
        for _ in range(options.epochs):
            for batch in ids.split(per_batch):
                states = nets[0].base_model(input_ids=batch, use_cache=False)[0][:, -reply - 1 : -1]
                logits = nets[0].lm_head(states).flatten(0, 1).float()
                loss = torch.nn.functional.cross_entropy(
                    logits, batch[:, -reply:].flatten(), reduction="sum"
                )
                for net, head in zip(nets[1:], heads, strict=True):
                    hidden = net.base_model(input_ids=batch, use_cache=False)[0][:, -reply - 1 : -1]
                    loss = loss + head(hidden).square().sum()
                (loss / (rows * reply)).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return run


# --- the full step --------------------------------------------------------------------------------


def our_step(
    model: PreTrainedModel,
    reward: PreTrainedModel,
    tokenizer: Any,
    prompts: Prompts,
    options: PPOOptions,
    eos: int,
    longest: int,
    work: Path,
) -> tuple[Callable[[], None], list[dict[str, Any]]]:
    policy, pad = copy.deepcopy(model), int(tokenizer.pad_token_id)
    actors = Actors(
        policy=policy,
        reference=copy.deepcopy(model).requires_grad_(False),
        reward=RewardModel(reward, tokenizer, RewardSettings()),
        generator=TransformersGenerator(policy, [eos], pad),
        tokenizer=tokenizer,
        prompts=prompts,
        held_out=Demonstrations(prompts[:1], [[eos]], ""),
        sampling=Sampling(n=options.n, max_new_tokens=longest),
        starts_at_reference=True,
    )
    learner = Learner(
        Network(policy, None, 1.0), options, CPU, 0, pad, make_accelerator(CPU, False)
    )
    trainer = PPOTrainer(actors, learner, options, Training(work, 0, CPU))
    trainer.samples = Journal(work / "samples.jsonl", None)
    records: list[dict[str, Any]] = []

    def run() -> None:
        records.append(trainer._update(len(records)))

    return run, records


def trl_step(
    model: PreTrainedModel,
    reward: PreTrainedModel,
    tokenizer: Any,
    prompts: Prompts,
    options: PPOOptions,
    longest: int,
    work: Path,
    steps: int,
) -> tuple[float, int]:
    """CPU seconds of the fastest step of TRL's RLOOTrainer, and its tokens per completion."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    path = work / "model"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    per_device = min(64, options.batch_size)
    config = RLOOConfig(
        output_dir=str(work / "trl"),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=options.batch_size // per_device,
        num_generations=options.n,
        max_completion_length=longest,
        beta=options.kl_coef,
        num_iterations=1,
        max_steps=steps,
        learning_rate=options.learning_rate,
        temperature=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
    )
    clock: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.append(time.process_time())

    texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    trainer = RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path),
        reward_funcs=copy.deepcopy(reward),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
        callbacks=[Clock()],
    )
    began = time.process_time()
    trainer.train()
    times = [b - a for a, b in zip([began, *clock], clock, strict=False)]
    processor, dataset = cast("Any", trainer.processing_class), cast("Any", trainer.train_dataset)
    their_ids = processor(dataset["prompt"][:8])["input_ids"]
    assert their_ids == prompts[:8], "TRL tokenises the prompts differently"
    logs = [log for log in trainer.state.log_history if "completions/mean_length" in log]
    return min(times), round(sum(log["completions/mean_length"] for log in logs) / len(logs))


def fastest(repeats: int, contenders: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Least CPU seconds of each contender; they take turns, after one warm-up."""
    for run in contenders.values():
        run()
    best: dict[str, float] = {}
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            seconds = time.process_time() - start
            best[name] = min(seconds, best.get(name, seconds))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with train.jsonl.gz of E2E")
    parser.add_argument("--model", help="model folder, tokenizer included")
    parser.add_argument("--samples", type=int, default=256, help="samples per rollout")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--skip-trl", action="store_true", help="measure only the learner")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
        eos, form = tokenizer.eos_token_id, PromptFormat(**model.config.irl_prompt)
        encode: Callable[[str], list[int]] = lambda text: encode_prompts([text], tokenizer, form)[0]  # noqa: E731
    else:
        if not args.skip_trl:
            parser.error("the full step needs --model, or give --skip-trl")
        model, eos = random_llama("3M", 1200, args.max_new_tokens), EOS
        encode = word_encoder(1200)
    if args.data:
        prompts = e2e_prompts(args.data, 512, encode)
    else:
        prompts = random_prompts(512, model.config.vocab_size)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, "
        f"{args.samples} samples, {torch.get_num_threads()} threads"
    )
    learner_table(model, prompts, eos, args)
    if not args.skip_trl:
        step_table(model, tokenizer, prompts, eos, args)


def learner_table(model: PreTrainedModel, prompts: Prompts, eos: int, args: Any) -> None:
    samples = rollout(model, prompts, eos, args.samples, args.max_new_tokens)
    tokens = sum(map(len, samples.prompts)) + int(samples.mask.sum())
    lengths = samples.mask.sum(1)
    print(f"rollout: {tokens} tokens, completions {lengths.mean():.1f} +- {lengths.std():.1f}")
    common: dict[str, Any] = {"kind": "ppo", "epochs": 4, "epoch_kl": None}
    common["learning_rate"] = 1e-12  # so that every repeat starts at the rollout's own log-probs
    critic = PPOOptions(**common)
    policy_only = PPOOptions(**common, advantage="reinforce")
    best = fastest(
        args.repeats,
        {
            "bare, policy": bare_update(model, samples, policy_only, False),
            "ours, policy": our_update(model, samples, policy_only),
            "bare, policy and critic": bare_update(model, samples, critic, True),
            "ours, policy and critic": our_update(model, samples, critic),
        },
    )
    print(f"{'update, 4 epochs':28}{'seconds':>9}{'tokens/s':>10}{'of bare':>9}")
    for name, seconds in best.items():
        bare = best[name.replace("ours", "bare")]
        print(f"{name:28}{seconds:9.2f}{4 * tokens / seconds:10.0f}{bare / seconds:9.1%}")


def step_table(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Prompts,
    eos: int,
    args: Any,
) -> None:
    options = PPOOptions(
        kind="ppo",
        advantage="rloo",
        n=4,
        epochs=1,
        batch_size=args.samples,
        episodes=args.samples * 100,
        learning_rate=1e-6,
        missing_eos="ignore",
        samples_kept=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model.save_pretrained(work / "base")
        torch.manual_seed(0)
        reward = AutoModelForSequenceClassification.from_pretrained(work / "base", num_labels=1)
        reward.config.pad_token_id = tokenizer.pad_token_id
        run, records = our_step(
            model, reward.eval(), tokenizer, prompts, options, eos, args.max_new_tokens, work
        )
        ours = fastest(args.repeats, {"ours": run})["ours"]
        theirs, length = trl_step(
            model, reward, tokenizer, prompts, options, args.max_new_tokens, work, args.repeats + 1
        )
    record = records[-1]
    parts = ", ".join(
        f"{name} {record[f'seconds_{name}']:.2f}" for name in ("generate", "score", "update")
    )
    print(f"{'full step, RLOO':28}{'seconds':>9}{'length':>9}{'ratio':>8}")
    print(f"{'TRL RLOOTrainer':28}{theirs:9.2f}{length:9d}{1.0:8.2f}")
    print(f"{'ours':28}{ours:9.2f}{record['length']:9.0f}{theirs / ours:8.2f}")
    print(f"ours: {parts}; padding {record['padding']:.1%}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
