"""Another function in the place of transformers' sdpa attention, for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Attention = Callable[..., tuple[Tensor, None]]
"""(module, query, key, value, mask, **options): the attention's output (B, S, H, D), and None."""


@contextmanager
def sdpa_by(attend: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Have all models with sdpa attention call ``attend`` for the time of the block.

    attend: (fused, module, query, key, value, mask, **options) as in Attention, with the function
        that it takes the place of, for all that it leaves as it was.
    """
    fused: Attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = functools.partial(attend, fused)
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # the entry above, which hides transformers' own
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is not fused:  # an enclosing block's
            ALL_ATTENTION_FUNCTIONS["sdpa"] = fused
