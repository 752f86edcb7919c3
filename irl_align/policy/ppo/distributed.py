"""PPO in several processes: gradients summed, weights that are shards gathered, folders shared.

Rollouts, their scores and all arrays (B, T) are the same in every process; what is divided is the
rows that each samples, scores, and passes forward and backward.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from irl_align.errors import UserError
from irl_align.utils import distributed
from irl_align.utils.files import atomic_folder

_BUCKET = 2**24  # gradients that are sent at once, 64 MiB in float32


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether every process holds a part of the weights only."""
    return distributed.count() > 1 and accelerator.distributed_type == DistributedType.FSDP


def prepare(accelerator: Accelerator, network: nn.Module, optimizer: Any) -> tuple[Any, Any]:
    """Network and optimiser for this accelerator; gradients of whole weights stay as they are.

    They are summed by :func:`sum_gradients`: adapters that take turns on one trunk have several
    backward passes in a step, which DistributedDataParallel does not know.
    """
    if distributed.count() == 1 or is_sharded(accelerator):
        prepared: Any = accelerator.prepare(network, optimizer)
        return prepared
    whole: Any = accelerator.prepare_model(network, evaluation_mode=True)
    return whole, accelerator.prepare_optimizer(optimizer)


def to_shard(network: Any) -> Any:
    """A copy of a network of models that are in use elsewhere, to be sharded.

    Raises UserError where models share their weights.
    """
    if network.critic is not None and network.critic.switch is not None:
        raise UserError(
            "policy_update.backbone: found shared under FSDP, expected separate: adapters on one "
            "trunk take turns, and shards do not"
        )
    found = copy.deepcopy(network)
    found._no_split_modules = list(getattr(network.policy, "_no_split_modules", None) or ())
    return found


def whole_number(value: Any) -> float:
    """A scalar as a number, one that is spread over the processes too."""
    return float(value.full_tensor() if hasattr(value, "full_tensor") else value)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum each gradient over the processes; one that is None in all of them stays so."""
    if distributed.count() == 1:
        return
    weights = list(parameters)
    here = torch.tensor([w.grad is not None for w in weights], device=weights[0].device)
    anywhere = distributed.total(here.int()).tolist()
    gradients = []
    for weight, found in zip(weights, anywhere, strict=True):
        if found and weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        if found:
            gradients.append(weight.grad)
    for bucket in _buckets(gradients):
        flat = distributed.total(torch.cat([g.flatten() for g in bucket]))
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: Iterable[Tensor | None]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype in a row, in buckets of about _BUCKET numbers."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        assert gradient is not None
        full = sum(g.numel() for g in bucket) >= _BUCKET
        if bucket and (full or bucket[0].dtype != gradient.dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


@contextmanager
def shared_folder(path: Path) -> Iterator[Path]:
    """As atomic_folder, for all processes to write into; the main one renames it in."""
    if not distributed.is_main():
        yield distributed.broadcast(path)
        distributed.barrier()
        return
    with atomic_folder(path) as aside:
        yield distributed.broadcast(aside)
        distributed.barrier()
