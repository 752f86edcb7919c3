"""Attention weights of a few queries of the last layer, at the cost of a plain forward.

Fast attention kernels do not return their weights, and eager attention computes those of every
layer and query. Here the model's forward runs on `sdpa`, and only the last layer also computes
softmax(q k^T scaling) for the requested queries.

Letters beyond the package's legend of shapes: Q queries, A attention heads, K key heads, D head
size.
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
from irl_align.models.loading import evaluating

_NAME = "irl_align_rows"
WEIGHTS_AT_ONCE = 2**22  # 16 MiB in float32: limits the memory of many queries and heads


@dataclass(eq=False)
class AttentionRows:
    """Reader of one model's last layer: set `queries`, run the model, call `take`."""

    module: torch.nn.Module
    """The last layer's attention."""
    queries: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    """Columns whose attention is read: (B, Q)."""
    rows: Tensor | None = None
    """Attention of those columns on all L columns, mean over heads, float32: (B, Q, L)."""

    def take(self) -> Tensor:
        """The rows of the last forward, once: (B, Q, L). Raises UserError: there are none."""
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

    The block restores the model's attention implementation, also on an exception. Models that run
    on eager attention keep it, and those that soft-cap their attention (Gemma 2) switch to it,
    since sdpa ignores the cap. Raises UserError: the model is not causal, or does not take its
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
    """Raise UserError unless a token's state depends on no later token; one forward tests it."""
    if model in _CAUSAL:
        return
    if not model.config.is_encoder_decoder:
        last = model.config.get_text_config().vocab_size - 1
        ids = torch.tensor([[0, 0], [0, last]], device=model.device)
        with evaluating(model), torch.no_grad():
            first, second = model.base_model(input_ids=ids)[0][:, 0].float()
        if torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max())):
            _CAUSAL.add(model)
            return
    raise no_prefix_scores(model)


def no_prefix_scores(model: PreTrainedModel) -> UserError:
    """The error for a model whose tokens depend on later ones."""
    return UserError(
        f"reward model: {type(model).__name__} ({model.config.model_type}) reads later tokens too, "
        "so a prefix has no score of its own; expected a causal model, or credit sparse, uniform "
        "or random"
    )


def _last_attention(model: PreTrainedModel) -> torch.nn.Module:
    """The self-attention of the last layer."""
    last = model.config.get_text_config().num_hidden_layers - 1
    modules = [
        module
        for module in model.base_model.modules()
        if getattr(module, "layer_idx", None) == last
        and type(module).__name__.endswith("Attention")
        and not getattr(module, "is_cross_attention", False)
    ]
    if len(modules) == 1 and model._can_set_attn_implementation():
        return modules[0]
    raise UserError(
        f"{type(model).__name__} ({model.config.model_type}): the attention of its "
        "last layer cannot be read; expected an architecture that takes its attention from "
        "transformers' AttentionInterface: use credit red or sparse"
    )


def _needs_eager(model: PreTrainedModel) -> bool:
    """Whether sdpa differs from the model's own attention: soft-capped scores, sinks."""
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
    """transformers' sdpa attention; in the reader's layer it also keeps its queries' weights."""
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

    query: (B, A, L, D); key: (B, K, L, D), each shared by A / K consecutive heads; mask:
    (B, 1, L, L), True or 0 where a query may look, or None for causal attention; places: (B, Q).
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
    chosen = query.transpose(1, 2)[row, places].transpose(1, 2)  # (B, A, Q, D)
    grouped = chosen.reshape(rows, key_heads, heads // key_heads * count, size)
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
