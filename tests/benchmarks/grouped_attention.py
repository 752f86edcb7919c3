"""CPU time of one layer's attention in a decoding step where query heads share key-value heads.

    python tests/benchmarks/grouped_attention.py [--rows 32 --heads 14 --kv-heads 2 --columns 300]

Compares transformers' sdpa attention with ours (models/attention.py) on one thread with a padding
mask. The two take turns, so that other work on the machine affects both alike.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from irl_align.models.attention import grouped_attention


def milliseconds(calls: dict[str, Callable[[], Any]], steps: int) -> dict[str, float]:
    """Median CPU milliseconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(steps):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(each) for name, each in times.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"rows": 32, "heads": 14, "kv-heads": 2, "columns": 300, "head-size": 64, "steps": 40}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    module: Any = SimpleNamespace(num_key_value_groups=args.heads // args.kv_heads, is_causal=True)
    mask = torch.ones(args.rows, 1, 1, args.columns, dtype=torch.bool)
    mask[::3, ..., : args.columns // 8] = False
    theirs = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with grouped_attention():
        ours = ALL_ATTENTION_FUNCTIONS["sdpa"]
    print(f"{'':10}{'sdpa, ms':>10}{'ours, ms':>10}{'ratio':>8}{'max diff':>10}")
    for dtype in (torch.float32, torch.bfloat16):
        query = torch.randn(args.rows, args.heads, 1, args.head_size, dtype=dtype)
        shape = (args.rows, args.kv_heads, args.columns, args.head_size)
        key, value = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        calls: dict[str, Callable[[], Any]] = {
            name: functools.partial(attend, module, query, key, value, mask)
            for name, attend in (("theirs", theirs), ("ours", ours))
        }
        gap = float((calls["theirs"]()[0] - calls["ours"]()[0]).abs().max())
        took = milliseconds(calls, args.steps)
        ratio = took["theirs"] / took["ours"]
        name = str(dtype).removeprefix("torch.")
        print(f"{name:10}{took['theirs']:10.2f}{took['ours']:10.2f}{ratio:8.1f}{gap:10.1e}")


if __name__ == "__main__":
    main()
