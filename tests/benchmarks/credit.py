"""Cost of token-level credit relative to sparse rewards: time and peak memory of the reward pass.

    python tests/benchmarks/credit.py
    python tests/benchmarks/credit.py --device cuda --dtype bfloat16 --width 2048 --layers 16

A random Llama reward scores completions of geometric lengths, several for each prompt. All kinds
score the same rows in turn, round after round. Times are medians over rounds, and ratios are
medians of the ratio to sparse in the same round. Times are CPU seconds on the CPU, so that other
processes count little, and wall seconds on CUDA. Peak memory is the most that torch held during a
pass minus what it held before. `eager` is the usual way to the attention row: eager attention that
stores the weights of every layer and query.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from irl_align.data.tokenizer import train_tokenizer
from irl_align.models.packing import PackedRows, over_packed
from irl_align.reward.model import RewardModel
from irl_align.reward.protocol import ScoreRequest
from irl_align.reward.scoring import policy_attention, score_tokens

Ids = list[list[int]]
Kind = Callable[[RewardModel, Ids, Ids], object]


def ask(prefixes: bool, attention: bool, eos: bool = False) -> Kind:
    """A pass that computes these parts."""
    return lambda reward, prompts, completions: score_tokens(
        reward,
        ScoreRequest(
            prompts, completions, prefixes=prefixes, attention=attention, eos_prefixes=eos
        ),
    )


@torch.no_grad()
def eager(reward: RewardModel, prompts: Ids, completions: Ids) -> list[torch.Tensor]:
    """The last row by eager attention and output_attentions."""
    out: list[torch.Tensor] = []

    def one_batch(batch: list[int], packed: PackedRows) -> None:
        output = reward.model.base_model(
            packed.input_ids,
            attention_mask=packed.attention_mask,
            output_attentions=True,
            use_cache=False,
        )
        head: Any = reward.model.score
        head(output[0])
        weights = output.attentions[-1].mean(1)
        out.append(weights[torch.arange(len(weights)), packed.ends()].cpu())

    reward.model.set_attn_implementation("eager")
    over_packed(one_batch, reward.model, prompts, completions, reward.max_batch_tokens)
    reward.model.set_attn_implementation("sdpa")
    return out


def abc_policy(reward: RewardModel, prompts: Ids, completions: Ids) -> object:
    """A sparse pass of the reward, and a pass of a policy of the same size for its attention."""
    ask(False, False)(reward, prompts, completions)
    return policy_attention(reward.model, prompts, completions, reward.max_batch_tokens)


KINDS: dict[str, Kind] = {
    "sparse": ask(False, False),
    "red": ask(True, False),
    "abc": ask(False, True),
    "red and abc": ask(True, True),
    "red, EOS appended": ask(True, False, eos=True),
    "abc_policy": abc_policy,
    "eager": eager,
}


def make_reward(args: argparse.Namespace) -> RewardModel:
    """A random reward of the given size."""
    tokenizer: PreTrainedTokenizerFast = train_tokenizer(["a b c"], 300)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=max(1, args.heads // 2),
        max_position_embeddings=8192,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.num_labels = 1
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).to(args.device, getattr(torch, args.dtype))
    return RewardModel(model.eval(), tokenizer, max_batch_tokens=args.batch_tokens)


def make_rows(args: argparse.Namespace) -> tuple[Ids, Ids]:
    """Prompts of similar length, and completions of geometric lengths, at least 4 tokens."""
    draw = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return list(map(int, draw.integers(3, args.vocabulary, count)))

    prompts, completions = [], []
    for _ in range(args.prompts):
        prompt = tokens(int(draw.integers(args.prompt // 2, args.prompt * 3 // 2)))
        for _ in range(args.samples):
            length = min(3 + draw.geometric(1 / args.completion), 4 * args.completion)
            prompts.append(prompt)
            completions.append(tokens(int(length)))
    return prompts, completions


def peak(kind: str, reward: RewardModel, rows: tuple[Ids, Ids]) -> int:
    """Most bytes that torch holds during one pass, minus what it held before."""
    if reward.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        KINDS[kind](reward, *rows)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        KINDS[kind](reward, *rows)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max())


def seconds(reward: RewardModel, rows: tuple[Ids, Ids], rounds: int) -> dict[str, list[float]]:
    """Time of each kind in each round. The order rotates from round to round."""
    cuda = reward.model.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for round_number in range(-1, rounds):  # the first one warms up
        order = list(KINDS)
        order = order[round_number % len(order) :] + order[: round_number % len(order)]
        for kind in order:
            start = clock()
            KINDS[kind](reward, *rows)
            if cuda:
                torch.cuda.synchronize()
            if round_number >= 0:
                times[kind].append(clock() - start)
    return times


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"width": 192, "layers": 4, "heads": 6, "vocabulary": 4096, "rounds": 15}
    counts_of = {"prompts": 32, "samples": 4, "prompt": 40, "completion": 30, "batch-tokens": 4096}
    for name, default in (sizes | counts_of).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    reward, rows = make_reward(args), make_rows(args)
    times = seconds(reward, rows, args.rounds)
    memory = {kind: peak(kind, reward, rows) for kind in KINDS}
    counts = [sum(map(len, part)) for part in rows]
    print(f"{args.prompts * args.samples} completions, {counts[0]} + {counts[1]} tokens")
    print(f"{'kind':20s} {'seconds':>9s} {'to sparse':>9s} {'peak MiB':>9s} {'to sparse':>9s}")
    for kind, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, times["sparse"], strict=True))
        share = memory[kind] / max(1, memory["sparse"])
        print(
            f"{kind:20s} {statistics.median(own):9.3f} {ratio:9.3f} "
            f"{memory[kind] / 2**20:9.1f} {share:9.3f}"
        )


if __name__ == "__main__":
    main()
