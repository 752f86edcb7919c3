"""Samples per second of every way to sample: a table with ratios.

    python tests/benchmarks/generation.py --data path/to/e2e --size 3M

Contenders: plain ``model.generate``, the generation of TRL's RLOOTrainer, our transformers backend,
vLLM in this process where it is installed, and a bare decoding loop over equal lengths as a floor.
Without ``--model`` a random Llama of the given size is used, whose completions end with the same
probability after every token (after about 25 tokens on average). ``--data`` is a folder with
``train.jsonl.gz`` (E2E meaning representations under ``mr``); without it prompt lengths are drawn
at random. All contenders get the same prompts and, except for vLLM, the same number of rows per
batch. Ours and vLLM also return log-probabilities; ``model.generate`` and TRL do not.
"""

import argparse
import copy
import functools
import gzip
import json
import re
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from irl_align.models.generation.protocol import Sampling, generate
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.models.generation.vllm_common import vllm_importable

Prompts = list[list[int]]
PAD, EOS = 0, 1


@dataclass
class Setting:
    model: PreTrainedModel
    eos: int
    pad: int
    rows: int
    max_new_tokens: int


SIZES = {  # width, layers, feed-forward, heads
    "3M": (256, 3, 704, 8),
    "30M": (512, 9, 1408, 8),
    "100M": (768, 14, 2048, 12),
}


def random_llama(
    size: str, vocab: int, max_new_tokens: int, kv_heads: int | None = None, mean: float = 25.0
) -> PreTrainedModel:
    """A Llama that ends a completion with a constant probability per token."""
    torch.manual_seed(0)
    width, layers, feed_forward, heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        max_position_embeddings=1024,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    chances = np.linspace(1e-3, 0.5, 10_000)
    truncated_means = (1 - (1 - chances) ** max_new_tokens) / chances
    chance = chances[np.abs(truncated_means - mean).argmin()]
    # Channel 0 of the residual stream is large and no layer writes to it, so that after the last
    # norm it is sqrt(width) at every position. The other logits are near 0, so this weight gives
    # EOS that probability against the other V - 1 tokens.
    head = model.lm_head.weight.data
    model.model.embed_tokens.weight.data[:, 0] = 100.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[0] = 0
        layer.mlp.down_proj.weight.data[0] = 0
    head[:, 0] = 0
    head[EOS] = 0
    head[EOS, 0] = float(np.log(chance / (1 - chance) * (vocab - 1))) / width**0.5
    model.eval()
    return model


def e2e_prompts(folder: Path, count: int, encode: Callable[[str], list[int]]) -> Prompts:
    with gzip.open(folder / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        unique = sorted({json.loads(line)["mr"] for line in lines})
    chosen = np.random.default_rng(0).choice(len(unique), size=count, replace=count > len(unique))
    return [encode(unique[index]) for index in chosen]


def random_prompts(count: int, vocab: int) -> Prompts:
    rng = np.random.default_rng(0)
    lengths = rng.normal(38, 12, size=count).clip(8, 80).astype(int)
    return [rng.integers(2, vocab, size=length).tolist() for length in lengths]


def word_encoder(vocab: int) -> Callable[[str], list[int]]:
    """Map words and punctuation to hashed ids: E2E's lengths without a tokenizer."""

    def encode(text: str) -> list[int]:
        return [2 + zlib.crc32(w.encode()) % (vocab - 2) for w in re.findall(r"\w+|[^\w\s]", text)]

    return encode


def left_pad(prompts: Prompts, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def run_plain(setting: Setting, prompts: Prompts, n: int) -> tuple[int, int]:
    """Sample with ``model.generate`` in the prompts' order; numbers of samples and tokens."""
    samples = tokens = 0
    per_batch = max(1, setting.rows // n)
    for start in range(0, len(prompts), per_batch):
        ids, mask = left_pad(prompts[start : start + per_batch], setting.pad)
        output = setting.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=n,
            max_new_tokens=setting.max_new_tokens,
            eos_token_id=setting.eos,
            pad_token_id=setting.pad,
        )[:, ids.shape[1] :]
        ended = (output == setting.eos).int().cumsum(dim=1)
        samples += len(output)
        tokens += int((ended - (output == setting.eos).int() == 0).sum())
    return samples, tokens


def run_ours(setting: Setting, prompts: Prompts, n: int, top_p: float = 1.0) -> tuple[int, int]:
    generator = TransformersGenerator(
        setting.model,
        [setting.eos],
        setting.pad,
        max_batch_tokens=10**9,  # only the rows bound the batch, as for the others
        max_batch_rows=setting.rows,
    )
    sampling = Sampling(n=n, top_p=top_p, max_new_tokens=setting.max_new_tokens)
    completions = [c for group in generate(generator, prompts, sampling) for c in group]
    return len(completions), sum(len(c.token_ids) for c in completions)


class ByTRL:
    """The generation of RLOOTrainer, which TRL's other online trainers share."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        from datasets import Dataset
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
        from trl import RLOOConfig, RLOOTrainer

        vocabulary = {str(i): i for i in range(setting.model.config.vocab_size)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="2")),
            pad_token=str(setting.pad),
            eos_token=str(setting.eos),
        )
        args = RLOOConfig(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            report_to="none",
            max_completion_length=setting.max_new_tokens,
            per_device_train_batch_size=2,
            num_generations=2,
            beta=0.0,
        )
        nothing: Any = lambda completions, **_: [0.0] * len(completions)  # noqa: E731
        self.rows = setting.rows
        self.trainer = RLOOTrainer(
            model=copy.deepcopy(setting.model),
            args=args,
            reward_funcs=nothing,
            train_dataset=Dataset.from_dict({"prompt": ["2 3", "4 5"]}),
            processing_class=tokenizer,
        )

    def __call__(self, prompts: Prompts, n: int) -> tuple[int, int]:
        repeated = [prompt for prompt in prompts for _ in range(n)]
        samples: list[list[int]] = []
        for start in range(0, len(repeated), self.rows):
            samples += self.trainer._generate_single_turn(
                repeated[start : start + self.rows], None, {}
            )
        return len(samples), sum(map(len, samples))


class ByVLLM:
    """vLLM in this process."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        from irl_align.config.generation import ServerOptions
        from irl_align.models.generation.vllm_backend import VLLMGenerator
        from irl_align.models.generation.vllm_common import EngineSettings

        begin = time.perf_counter()
        setting.model.save_pretrained(folder / "policy")
        self.setting = setting
        settings = EngineSettings("cpu", "float32", 256, 16384)
        self.generator = VLLMGenerator(settings, "vllm", ServerOptions(), folder / "log")
        self.generator.sync(folder / "policy", "a", [setting.eos], lambda: setting.model)
        self.start = time.perf_counter() - begin
        self.gap = self.generator.compare(lambda: setting.model)

    def __call__(self, prompts: Prompts, n: int) -> tuple[int, int]:
        sampling = Sampling(n=n, max_new_tokens=self.setting.max_new_tokens)
        completions = [c for group in generate(self.generator, prompts, sampling) for c in group]
        return len(completions), sum(len(c.token_ids) for c in completions)


@torch.inference_mode()
def run_floor(setting: Setting, prompts: Prompts, steps: int) -> tuple[int, int]:
    """Decode prompts of one length for ``steps`` steps; no completion stops early."""
    width = round(sum(map(len, prompts)) / len(prompts))
    ids = torch.randint(2, setting.model.config.vocab_size, (len(prompts), width))
    for batch in ids.split(setting.rows):
        cache = DynamicCache(config=setting.model.config)
        inputs = batch
        for _ in range(steps):
            logits = setting.model(
                input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]
            inputs = torch.multinomial(logits.softmax(dim=-1), 1)
    return len(prompts), len(prompts) * steps


def time_in_turn(
    repeats: int,
    contenders: dict[str, Callable[[], tuple[int, int]]],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, tuple[int, int, float]]:
    """Samples, tokens and least seconds of each; in turn, so that noise affects all alike."""
    results: dict[str, tuple[int, int, float]] = {}
    for _ in range(repeats):
        for name, run in contenders.items():
            start = clock()
            samples, tokens = run()
            seconds = clock() - start
            least = min(seconds, results[name][2]) if name in results else seconds
            results[name] = samples, tokens, least
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with train.jsonl.gz of E2E")
    parser.add_argument("--model", help="model folder, tokenizer included")
    parser.add_argument("--size", choices=SIZES, default="3M", help="of the random model")
    parser.add_argument(
        "--kv-heads", type=int, help="of the random model; default: as many as query heads"
    )
    parser.add_argument("--vocab", type=int, default=1200, help="of the random model")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--rows", type=int, default=128, help="rows in a batch")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument(
        "--cpu-seconds",
        action="store_true",
        help="CPU seconds of one thread, for a machine that has other work",
    )
    options = parser.parse_args()

    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        eos, encode = tokenizer.eos_token_id, tokenizer.encode
        pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    else:
        model = random_llama(options.size, options.vocab, options.max_new_tokens, options.kv_heads)
        eos, pad, encode = EOS, PAD, word_encoder(options.vocab)
    setting = Setting(model, eos, pad, options.rows, options.max_new_tokens)
    if options.data:
        prompts = e2e_prompts(options.data, options.prompts, encode)
    else:
        prompts = random_prompts(options.prompts, model.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        clock = time.process_time if options.cpu_seconds else time.perf_counter
        compare(setting, prompts, options.repeats, Path(folder), clock)


def compare(
    setting: Setting, prompts: Prompts, repeats: int, folder: Path, clock: Callable[[], float]
) -> None:
    """Time all contenders and print the table."""
    few = prompts[: max(1, len(prompts) // 8)]
    samples, tokens = run_ours(setting, few, 1)  # warm-up, and the floor's length
    steps = max(1, round(tokens / samples))
    trl = ByTRL(setting, folder)
    vllm = ByVLLM(setting, folder) if vllm_importable() else None
    contenders: dict[str, Callable[[], tuple[int, int]]] = {}
    for subset, n in ((prompts, 1), (few, 8)):
        each: dict[str, Callable[[Prompts, int], tuple[int, int]]] = {
            "model.generate": lambda p, n: run_plain(setting, p, n),
            "TRL's generation": trl,
            "ours, transformers": lambda p, n: run_ours(setting, p, n),
        }
        if vllm is not None:
            vllm(few[:4], n)  # the first call of a shape is slower
            each["ours, vllm"] = vllm
        for name, run in each.items():
            contenders[f"{name}, n={n}"] = functools.partial(run, subset, n)
    contenders["bare loop, equal lengths"] = lambda: run_floor(setting, prompts, steps)
    results = time_in_turn(repeats, contenders, clock)

    parameters = sum(p.numel() for p in setting.model.parameters()) / 1e6
    print(
        f"{parameters:.1f}M parameters, {len(prompts)} prompts of "
        f"{np.mean([len(p) for p in prompts]):.0f} tokens ({len(few)} for n=8), {setting.rows} "
        f"rows, {torch.get_num_threads()} threads"
    )
    if vllm is not None:
        print(f"vLLM: start, sync and comparison {vllm.start:.1f} s; gap {vllm.gap:.1e}")
    print(f"{'':26}{'samples/s':>10}{'tokens/s':>10}{'tokens each':>13}{'ratio':>8}")
    base = 1.0
    for name, (samples, tokens, seconds) in results.items():
        rate = samples / seconds
        if name.startswith("model.generate"):
            base = rate  # of this and the following rows
        speeds = f"{rate:10.0f}{tokens / seconds:10.0f}"
        print(f"{name:26}{speeds}{tokens / samples:13.1f}{rate / base:8.2f}")


if __name__ == "__main__":
    main()
