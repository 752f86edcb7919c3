"""A key-value cache whose rows share a cache column per step and are padded on the left.

Dimensions: B rows in a batch, C cache columns, H key-value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class ColumnLayer(CacheLayerMixin):
    """Keys and values of one layer, (B, H, C, D), of which the first ``filled`` columns are set.

    A step writes its column in place, where transformers' own layer concatenates at every step. All
    columns of a sliding window are kept; the model's mask hides those outside the window.
    """

    is_sliding = False

    def __init__(self) -> None:
        untyped: Any = super()
        untyped.__init__()
        self.keys: Any = None
        self.values: Any = None
        self.filled = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = key_states, value_states
        self.filled = key_states.shape[2]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        end = self.filled + key_states.shape[2]
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return -1


def clone_rows(cache: Cache, first: int) -> Cache:
    """A copy of the rows from ``first`` on."""
    layers: list[Any] = []
    source: Any
    for source in cache.layers:
        layer = ColumnLayer()
        layer.lazy_initialization(source.keys[first:].clone(), source.values[first:].clone())
        layers.append(layer)
    return Cache(layers=layers)


def gather_cache(parts: list[tuple[Cache, torch.Tensor]], filled: int, room: int) -> Cache:
    """A cache of chosen rows of several caches, in order, right-aligned at column ``filled``.

    Args:
        parts: caches, and the numbers (long) of the rows to take. The caches are emptied, layer by
            layer.
        filled: columns to keep, counted from the right end of each part.
        room: free columns to add after them.
    """
    gathered: list[Any] = []
    sources: tuple[Any, ...]
    for sources in zip(*(cache.layers for cache, _ in parts), strict=True):
        layer = ColumnLayer()
        layer.is_initialized, layer.filled = True, filled
        rows = [rows for _, rows in parts]
        keys = [source.keys[:, :, : source.filled] for source in sources]
        layer.keys = _align(keys, rows, filled, room)
        values = [source.values[:, :, : source.filled] for source in sources]
        layer.values = _align(values, rows, filled, room)
        for source in sources:
            source.keys = source.values = None
        gathered.append(layer)
    return Cache(layers=gathered)


def _align(
    states: list[torch.Tensor], rows: list[torch.Tensor], filled: int, room: int
) -> torch.Tensor:
    _, heads, _, size = states[0].shape
    total = sum(len(chosen) for chosen in rows)
    aligned = states[0].new_empty(total, heads, filled + room, size)
    start = 0
    for state, chosen in zip(states, rows, strict=True):
        block = aligned[start : start + len(chosen)]
        columns = min(state.shape[2], filled)
        kept = state[:, :, state.shape[2] - columns :]
        block[:, :, filled - columns : filled] = kept.index_select(0, chosen)
        block[:, :, : filled - columns] = 0  # masked, yet 0 * NaN would be NaN
        start += len(chosen)
    return aligned
