"""Training engines that cut a model's weights up among processes: FSDP and DeepSpeed's ZeRO.

They train a copy. The model itself stays whole in every process, and has the new weights when the
training is over: what scores, samples and saves it need not know of shards.
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
from irl_align.models import lora
from irl_align.utils import distributed


def engine() -> str | None:
    """FSDP or DeepSpeed, where `accelerate launch` was told to use one."""
    for name in ("FSDP", "DEEPSPEED"):
        if (
            os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"
            and distributed.count() > 1
        ):
            return name
    return None


def to_train(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or the copy of it that an engine may cut up.

    Raises UserError for a model with adapters, whose checkpoints are not of shards.
    """
    if engine() is None:
        return model
    if lora.has_adapter(model):
        raise UserError(
            f"model.lora: found an adapter under {engine()}, expected all weights to be trained: "
            "an adapter fits data parallelism (recipes/accelerate/ddp.yaml)"
        )
    return copy.deepcopy(model)


def reset_deepspeed() -> None:
    """A training is over: models are loaded whole again.

    DeepSpeed's config is known to all of transformers, which under ZeRO-3 loads shards by it.
    """
    if engine() == "DEEPSPEED":
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


@torch.no_grad()
def copy_back(trained: nn.Module, model: nn.Module) -> None:
    """Copy the weights of what :func:`to_train` gave back into the model, whole."""
    if trained is model:
        return
    into = dict(model.named_parameters())
    for name, weight in trained.named_parameters():
        with whole(weight) as full:
            into[name].copy_(full)


@contextlib.contextmanager
def whole(weight: Any) -> Iterator[Any]:
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
    """Whether all weights are, those in other processes too."""
    parts: Any = (getattr(p, "to_local", lambda p=p: p)() for p in model.parameters())
    return all(distributed.gather(all(bool(part.isfinite().all()) for part in parts)))
