"""Log-probs of completions: the output layer of a language model on the places that need it.

Dimensions: B rows, M places, P prompt tokens, T completion tokens, V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from irl_align.models.loading import evaluating
from irl_align.models.logprobs import chosen_logprobs, logprobs_and_values
from irl_align.models.packing import (
    TOKENS_PER_BATCH,
    PackedRows,
    hidden_states,
    model_inputs,
    over_packed,
)

LOGITS_AT_ONCE = 2**26  # 256 MiB in float32: vocabularies of 150,000 would fill a GPU otherwise
_PLAIN: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def has_plain_logits(model: PreTrainedModel) -> bool:
    """Whether logits are the output layer's own, on the backbone's last hidden states.

    Some models scale or cap logits, or have another layer before the output layer: their log-probs
    need the model's own forward. One pass of two tokens decides it once per model.
    """
    if model not in _PLAIN:
        _PLAIN[model] = _measure_plain_logits(model)
    return _PLAIN[model]


def _measure_plain_logits(model: PreTrainedModel) -> bool:
    """Replace the output layer's result by large random numbers, so that every change shows."""
    head, seen = model.get_output_embeddings(), dict[str, Tensor]()

    def replace(_: Any, inputs: Any, output: Tensor) -> Tensor:
        noise = 100.0 * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        seen.update(input=inputs[0], output=noise.to(output.device, output.dtype))
        return seen["output"]

    ids = torch.arange(2, device=model.device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    # Autocast would keep casts of the weights, made here without gradients, for the training step.
    off = torch.autocast(model.device.type, enabled=False)
    with evaluating(model), torch.no_grad(), off, head.register_forward_hook(replace):
        hidden: Tensor = model.base_model(**inputs)[0]
        logits: Tensor = model(**inputs).logits
    if not seen or seen["input"].shape != hidden.shape:
        return False
    same = torch.allclose(seen["input"], hidden, rtol=1e-3, atol=1e-3 * float(hidden.abs().max()))
    return same and torch.equal(logits, seen["output"].to(logits.dtype))


def lm_head_logits(head: torch.nn.Module | Tensor, hidden: Tensor) -> Tensor:
    """Logits (..., V) of hidden states (..., H) by an output layer or its weight (V, H)."""
    if isinstance(head, Tensor):
        return torch.nn.functional.linear(hidden, head)
    logits: Tensor = head(hidden)
    return logits


def head_logprobs(
    head: torch.nn.Module | Tensor, hidden: Tensor, token_ids: Tensor, values: bool = False
) -> Tensor:
    """Log-prob (M,) of token ids (M,) by an output layer on hidden states (M, H), in pieces.

    values: :func:`logprobs_and_values` (M, 2).
    """
    pick = logprobs_and_values if values else chosen_logprobs
    weight: Any = head if isinstance(head, Tensor) else head.weight  # (V, H)
    rows = max(1, LOGITS_AT_ONCE // weight.shape[0])
    pieces = zip(hidden.split(rows), token_ids.split(rows), strict=True)
    return torch.cat([pick(lm_head_logits(head, h), ids) for h, ids in pieces])


def completion_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    max_batch_tokens: int = TOKENS_PER_BATCH,
    progress: str | None = None,
    values: bool = False,
) -> list[np.ndarray]:
    """Log-prob of every completion token given its prompt, at temperature 1.

    prompts and completions: token ids, P and T per row. Returns a float32 array (T,) per row, or
    with `values` (T, 2) of :func:`logprobs_and_values`. The output layer runs on completion
    positions only.
    """
    pick = logprobs_and_values if values else chosen_logprobs
    logprobs: list[np.ndarray] = [np.zeros(0, np.float32)] * len(prompts)
    direct = has_plain_logits(model)
    if not direct:  # the model computes the logits of all positions at once
        vocabulary = model.config.get_text_config().vocab_size
        max_batch_tokens = min(max_batch_tokens, LOGITS_AT_ONCE // vocabulary)

    def one_batch(batch: list[int], packed: PackedRows) -> None:
        places = packed.places()  # the token at a place is predicted at the one before it
        real = torch.arange(places.shape[1] - 1, device=places.device) < packed.length[:, None]
        row = packed.row.repeat_interleave(packed.length)
        place, target = places[:, :-1][real], packed.input_ids[row, places[:, 1:][real]]
        if direct:
            hidden = hidden_states(model, packed)
            chosen = head_logprobs(
                model.get_output_embeddings(), hidden[row, place], target, values
            )
        else:
            logits = model(**model_inputs(packed)).logits[row, place]
            chosen = pick(logits, target)
        ends = np.cumsum([len(completions[i]) for i in batch])[:-1]
        for number, own in zip(batch, np.split(chosen.cpu().numpy(), ends), strict=True):
            logprobs[number] = own

    over_packed(one_batch, model, prompts, completions, max_batch_tokens, progress)
    return logprobs
