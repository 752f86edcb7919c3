"""Training engines that shard a model's weights among processes: FSDP and DeepSpeed's ZeRO.

The engine trains a copy. The model itself stays complete in every process, and gets the new
weights when the training is over, so what scores, samples and saves it does not depend on shards.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from irl_align.errors import UserError
from irl_align.models.lora import has_adapter
from irl_align.utils import distributed


def _engine() -> str | None:
    """FSDP or DEEPSPEED, where `accelerate launch` was asked to use one; else None."""
    for name in ("FSDP", "DEEPSPEED"):
        asked = os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"
        if asked and distributed.count() > 1:
            return name
    return None


def to_train(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or a copy that the engine may shard.

    Raises UserError for a model with adapters under an engine: its checkpoints are not sharded.
    """
    engine = _engine()
    if engine is None:
        return model
    if has_adapter(model):
        raise UserError(
            f"model.lora: found an adapter under {engine}, expected all weights to be trained: "
            "an adapter fits data parallelism (recipes/accelerate/ddp.yaml)"
        )
    return copy.deepcopy(model)


def reset_deepspeed() -> None:
    """End transformers' use of DeepSpeed's config, by which it would load models as shards."""
    if _engine() == "DEEPSPEED":
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


@torch.no_grad()
def copy_back(trained: nn.Module, model: nn.Module) -> None:
    """Copy all weights of what :func:`to_train` returned back into the model."""
    if trained is model:
        return
    targets = dict(model.named_parameters())
    for name, weight in trained.named_parameters():
        with _gathered(weight) as full:
            targets[name].copy_(full)


@contextlib.contextmanager
def _gathered(weight: Any) -> Iterator[Any]:
    """A weight as one tensor in every process, inside the block."""
    if hasattr(weight, "full_tensor"):  # FSDP's
        yield weight.full_tensor()
    elif hasattr(weight, "ds_id"):  # ZeRO-3's
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            yield weight
    else:
        yield weight


def is_finite(model: nn.Module) -> bool:
    """Whether all weights are finite, those of other processes included."""
    parts: Any = (getattr(p, "to_local", lambda p=p: p)() for p in model.parameters())
    return all(distributed.gather(all(bool(part.isfinite().all()) for part in parts)))
