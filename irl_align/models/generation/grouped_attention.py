"""Attention of one new token per row, for models in which query heads share key-value heads.

With a mask, transformers' sdpa attention first copies the key-value cache once for every query head
that reads it, in every layer at every decoding step. With one new token no copy is needed: the r
heads that share a key-value head are r queries of it, and a padding mask is the same for all.

Dimensions: B rows, H query heads, G key-value heads, r = H / G, C cache columns, D head size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from irl_align.models.sdpa import Attention, sdpa_by


def grouped_attention() -> AbstractContextManager[None]:
    """Have models with sdpa attention decode on shared key-value heads as they are.

    Of all models, for the time of the block. All but one token per row under one mask for all heads
    goes where it went before.
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
    rows, heads, length, _ = query.shape
    groups = key.shape[1]
    masked_alike = attention_mask is None or attention_mask.shape[1:3] == (1, 1)
    changed = options.get("dropout") or options.get("position_bias") is not None
    if length > 1 or groups == heads or not masked_alike or changed:
        return fused(module, query, key, value, attention_mask, **options)
    queries = query.reshape(rows, groups, heads // groups, -1)  # (B, G, r, D)
    output = scaled_dot_product_attention(
        queries, key, value, attn_mask=attention_mask, scale=options.get("scaling")
    )
    return output.reshape(rows, 1, heads, -1), None  # (B, 1, H, D)
