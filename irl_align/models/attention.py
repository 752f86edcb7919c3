"""Two faster attentions that stand in for transformers' sdpa attention inside a block.

- short_attention, for training: on a CPU the backward pass of torch's fused kernel takes several
  times as long in bfloat16 as in float32, so short bfloat16 sequences are computed in float32. A
  step of a small Llama takes 1.1 to 1.6 times as long without it
  (tests/benchmarks/short_attention.py).
- grouped_attention, for decoding: with a mask, transformers copies the key-value cache once for
  every query head that reads it, in every layer at every step. With one new token no copy is
  needed: the r query heads that share a key-value head are r queries of it.

Dimensions: B rows, S query positions, H query heads, G key-value heads, r = H / G, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LONGEST_SHORT = 256  # tokens; for longer rows float32's products cost what its backward pass saves

Attention = Callable[..., tuple[Tensor, None]]
"""(module, query, key, value, mask, **options): the attention's output (B, S, H, D), and None."""


def short_attention() -> AbstractContextManager[None]:
    """Compute the attention of short bfloat16 sequences in float32, in all models with sdpa.

    Only on a CPU, where gradients are computed, and where the weights or autocast are bfloat16.
    """
    return _sdpa_replaced_by(_attend_in_float32)


def grouped_attention() -> AbstractContextManager[None]:
    """Decode one token per row without copies of shared key-value heads, in all models with sdpa.

    A query of several tokens, or a mask that differs between heads, goes to transformers' function.
    """
    return _sdpa_replaced_by(_attend_by_groups)


@contextmanager
def _sdpa_replaced_by(attend: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Have all models with sdpa attention call ``attend`` inside the block.

    attend: (fused, module, query, key, value, mask, **options) as in Attention; ``fused`` is the
        function that it replaces, for the cases that it leaves alone.
    """
    fused: Attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = functools.partial(attend, fused)
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # the entry above, which hides transformers' own
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is not fused:  # that of an enclosing block
            ALL_ATTENTION_FUNCTIONS["sdpa"] = fused


def _attend_in_float32(
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
        and in_bfloat16(query)
        and query.requires_grad
        and query.shape[2] == key.shape[2] <= LONGEST_SHORT
    )
    if not slow:
        return fused(module, query, key, value, attention_mask, **options)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    widened = (tensor.float() for tensor in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        output, _ = fused(module, *widened, attention_mask, **options)
    return output.to(value.dtype), None


def in_bfloat16(tensor: Tensor) -> bool:
    """Whether products of a CPU tensor are in bfloat16, by its dtype or by autocast."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    return torch.bfloat16 in (tensor.dtype, autocast)


def _attend_by_groups(
    fused: Attention,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    rows, heads, length, _ = query.shape
    groups = key.shape[1]
    one_mask = attention_mask is None or attention_mask.shape[1:3] == (1, 1)
    altered = options.get("dropout") or options.get("position_bias") is not None
    if length > 1 or groups == heads or not one_mask or altered:
        return fused(module, query, key, value, attention_mask, **options)
    queries = query.reshape(rows, groups, heads // groups, -1)  # (B, G, r, D)
    output = scaled_dot_product_attention(
        queries, key, value, attn_mask=attention_mask, scale=options.get("scaling")
    )
    return output.reshape(rows, 1, heads, -1), None  # (B, 1, H, D)
