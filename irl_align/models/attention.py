"""Attention of short sequences in bfloat16 on a CPU, for training: in float32.

There the backward pass of torch's fused kernel takes several times as long in bfloat16 as in
float32: a step of a small Llama takes 1.1 to 1.6 times as long with it
(tests/benchmarks/short_attention.py). Without gradients bfloat16 is as fast, and is kept.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from irl_align.models.sdpa import Attention, sdpa_by

LONGEST = 256  # tokens; past that float32's products cost what its backward pass saves


def short_attention() -> AbstractContextManager[None]:
    """Have models with sdpa attention compute that of short bfloat16 sequences in float32.

    Of all models, for the time of the block, where they are on a CPU, by dtype or autocast in
    bfloat16, and gradients are computed. The same attention without bfloat16's rounding inside.
    """
    return sdpa_by(_attend)


def _attend(
    fused: Attention,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    slow = (
        query.device.type == "cpu"
        and _in_bfloat16(query)
        and query.requires_grad
        and query.shape[2] == key.shape[2] <= LONGEST
    )
    if not slow:
        return fused(module, query, key, value, attention_mask, **options)
    dtype = value.dtype
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    whole = (tensor.float() for tensor in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        output, _ = fused(module, *whole, attention_mask, **options)
    return output.to(dtype), None


def _in_bfloat16(tensor: Tensor) -> bool:
    """Whether products of it are in bfloat16: as it is, or since autocast makes it so."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    return torch.bfloat16 in (tensor.dtype, autocast)
