"""CPU time of a bfloat16 training step with attention in bfloat16 and in float32.

    python tests/benchmarks/short_attention.py [--steps 6]

Measures forward, backward and optimiser step of E2E's 2M-parameter Llama on 4,096 tokens and one
thread, with torch's attention and with models/attention.py's short_attention. The two take turns,
so that other work on the machine affects both alike.
"""

import argparse
import contextlib
import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from irl_align.models.attention import short_attention

TOKENS = 4096


def seconds(length: int, steps: int) -> tuple[float, float]:
    """Median CPU seconds of a step: with torch's attention, with short_attention."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 6, "max_position_embeddings": 256, "vocab_size": 1200}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, 1200, (TOKENS // length, length))
    mask = torch.ones_like(ids)
    mask[::2, -5:] = 0

    def step(short: bool) -> float:
        begin = time.process_time()
        with short_attention() if short else contextlib.nullcontext():
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, attention_mask=mask).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.process_time() - begin

    times = [(step(False), step(True)) for _ in range(steps + 1)][1:]
    fused, short = zip(*times, strict=True)
    return statistics.median(fused), statistics.median(short)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=6)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    print("length  fused s  short s  ratio")
    for length in (32, 64, 128, 192, 256):
        fused, short = seconds(length, steps)
        print(f"{length:6}  {fused:7.3f}  {short:7.3f}  {fused / short:5.2f}")
