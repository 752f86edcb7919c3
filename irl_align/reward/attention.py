"""Attention weights of a few queries of the last layer, at the price of a plain forward.

Fast attention kernels do not return their weights, and eager attention writes out those of every
layer and query. Here the model's forward runs on `sdpa`, and the last layer alone also computes
softmax(q k^T scaling) for the queries asked for.

Legend of shapes: B rows, Q queries, L tokens of a row, A attention heads, K key heads, D head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from irl_align.errors import UserError

_NAME = "irl_align_rows"
WEIGHTS_AT_ONCE = 2**22  # 16 MiB in float32: bounds what many queries of many heads take


@dataclass(eq=False)
class AttentionRows:
    """What is read of one model's last layer: set `queries`, run the model, read `rows`."""

    module: torch.nn.Module
    """The last layer's attention."""
    queries: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    """Places whose attention is wanted: (B, Q)."""
    rows: Tensor | None = None
    """Attention of those places on all L places, mean over heads, float32: (B, Q, L)."""

    def take(self) -> Tensor:
        """The rows of the forward that just ran: (B, Q, L)."""
        rows, self.rows = self.rows, None
        if rows is None:
            raise UserError(
                f"{type(self.module).__name__} gave no attention weights; expected "
                "an architecture with softmax attention in its last layer: use credit red or sparse"
            )
        return rows


_READER: ContextVar[AttentionRows | None] = ContextVar("attention_rows", default=None)


@contextlib.contextmanager
def attention_rows(model: PreTrainedModel) -> Iterator[AttentionRows]:
    """Inside the block forwards of a causal `model` also give their last layer's attention.

    The model's attention implementation is as before after the block, also on an exception. Models
    that run on eager attention keep it, and those that soft-cap their attention (Gemma 2) are given
    it: sdpa leaves the cap out. Raises UserError: the model is not causal, or does not take its
    attention from transformers' interface.
    """
    require_causal(model)
    before = model.config._attn_implementation
    reader = AttentionRows(_last_attention(model))
    eager = before == "eager" or _needs_eager(model)
    model.set_attn_implementation("eager" if eager else _NAME)
    hook = reader.module.register_forward_hook(_read_eager(reader)) if eager else None
    token = _READER.set(reader)
    try:
        yield reader
    finally:
        _READER.reset(token)
        if hook is not None:
            hook.remove()
        model.set_attn_implementation(before)


_CAUSAL: WeakSet[torch.nn.Module] = WeakSet()


def require_causal(model: PreTrainedModel) -> None:
    """UserError unless a token's state depends on no later token, found by trying (once)."""
    if model in _CAUSAL:
        return
    kind = type(model).__name__
    text = model.config.get_text_config()
    if not model.config.is_encoder_decoder:
        ids = torch.tensor([[0, 0], [0, text.vocab_size - 1]], device=model.device)
        training = model.training
        model.eval()
        with torch.no_grad():
            first, second = model.base_model(input_ids=ids)[0][:, 0].float()
        model.train(training)
        if torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max())):
            _CAUSAL.add(model)
            return
    raise UserError(
        f"{kind} ({model.config.model_type}) reads later tokens too, so a prefix has "
        "no score of its own; expected a causal model, or credit sparse, uniform or random"
    )


def _last_attention(model: PreTrainedModel) -> torch.nn.Module:
    """The self-attention of the last layer."""
    last = model.config.get_text_config().num_hidden_layers - 1
    found = [
        module
        for module in model.base_model.modules()
        if getattr(module, "layer_idx", None) == last
        and type(module).__name__.endswith("Attention")
        and not getattr(module, "is_cross_attention", False)
    ]
    if len(found) == 1 and model._can_set_attn_implementation():
        return found[0]
    raise UserError(
        f"{type(model).__name__} ({model.config.model_type}): the attention of its "
        "last layer cannot be read; expected an architecture that takes its attention from "
        "transformers' AttentionInterface: use credit red or sparse"
    )


def _needs_eager(model: PreTrainedModel) -> bool:
    """Whether sdpa is not the model's own attention: soft-capped scores, sinks."""
    config = model.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return capped or not model._supports_sdpa


def _sdpa_and_rows(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention; in the reader's layer the weights of its queries too."""
    reader = _READER.get()
    if reader is not None and module is reader.module:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        reader.rows = weights_of(query, key, attention_mask, reader.queries, scale)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **options
    )


AttentionInterface.register(_NAME, _sdpa_and_rows)
AttentionMaskInterface.register(_NAME, sdpa_mask)


def weights_of(
    query: Tensor, key: Tensor, mask: Tensor | None, places: Tensor, scaling: float
) -> Tensor:
    """Attention of the queries at `places`, mean over heads, float32: (B, Q, L).

    query: (B, A, L, D); key: (B, K, L, D), each shared by A / K heads in turn; mask: (B, 1, L, L),
    True or 0 where a query may look, or None for causal attention; places: (B, Q).
    """
    rows, heads, length, _ = query.shape
    at_once = max(1, WEIGHTS_AT_ONCE // (rows * heads * length))
    pieces = places.split(at_once, dim=1)
    return torch.cat([_weights(query, key, mask, piece, scaling) for piece in pieces], dim=1)


def _weights(
    query: Tensor, key: Tensor, mask: Tensor | None, places: Tensor, scaling: float
) -> Tensor:
    (rows, heads, length, size), key_heads = query.shape, key.shape[1]
    count = places.shape[1]
    row = torch.arange(rows, device=query.device)[:, None]
    asked = query.transpose(1, 2)[row, places].transpose(1, 2)  # (B, A, Q, D)
    grouped = asked.reshape(rows, key_heads, heads // key_heads * count, size)
    scores = (grouped.float() @ key.float().transpose(2, 3)) * scaling  # (B, K, A/K * Q, L)
    scores = scores.view(rows, heads, count, length)
    if mask is None:
        seen = torch.arange(length, device=query.device) <= places[:, :, None]  # (B, Q, L)
    else:
        seen = mask[row, 0, places]
    if seen.dtype == torch.bool:
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
    else:
        scores = scores + seen[:, None]
    return scores.softmax(-1).mean(1)


def _read_eager(reader: AttentionRows) -> Any:
    """Forward hook that keeps the queries' rows of the weights that eager attention returns."""

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        weights = output[1]  # (B, A, L, L)
        if weights is not None:
            row = torch.arange(len(weights), device=weights.device)[:, None]
            reader.rows = weights.mean(1, dtype=torch.float32)[row, reader.queries]

    return hook
