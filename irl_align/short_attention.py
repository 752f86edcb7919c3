"""Attention of short sequences in bfloat16 on a CPU, for training.

There the backward pass of torch's fused kernel takes longer than that of plain matrix products: a
step of a small Llama takes 1.2 to 1.4 times as long with it (tests/benchmarks/short_attention.py).
In float32, and without gradients, the fused kernel is as fast or faster, and is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LONGEST = 128  # tokens; past that the scores of plain products cost more than they save


@contextmanager
def short_attention() -> Iterator[None]:
    """Have models with sdpa attention compute that of short bfloat16 sequences by plain products.

    Of all models, for the time of the block, where they are on a CPU, by dtype or autocast in
    bfloat16, and gradients are computed. The same attention up to bfloat16's rounding.
    """
    fused = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        plain = (
            query.device.type == "cpu"
            and _in_bfloat16(query)
            and query.requires_grad
            and query.shape[2] == key.shape[2] <= LONGEST
            and not dropout
        )
        if not plain:
            found: tuple[Tensor, None] = fused(
                module, query, key, value, attention_mask, dropout, scaling, **options
            )
            return found
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return products(query, key, value, attention_mask, scale), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # the entry above; the fused one lies below it


def _in_bfloat16(tensor: Tensor) -> bool:
    """Whether products of it are in bfloat16: as it is, or since autocast makes it so."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    return torch.bfloat16 in (tensor.dtype, autocast)


def products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """softmax(scale Q K^T + mask) V, causal where there is no mask; (B, L, heads, head size).

    Args:
        query: (B, heads, L, head size).
        key, value: (B, key-value heads, L, head size), each for a group of heads.
        mask: (B or 1, heads or 1, L, L), True where a token is seen, or added to the scores.
        scale: of the scores.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scale
    if mask is None:
        length = query.shape[2]
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    lowest = torch.finfo(torch.float32).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(dim=-1).to(value.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous()
