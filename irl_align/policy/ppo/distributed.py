"""PPO's accelerator, and its work in several processes: summed gradients, shards, shared folders.

Rollouts, their scores and all arrays (B, T) are the same in every process. The processes divide the
rows: each samples and scores some, and does their forward and backward passes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from irl_align.errors import UserError
from irl_align.models.lora import load_trained, save_trained
from irl_align.utils import distributed
from irl_align.utils.files import atomic_folder

_BUCKET = 2**24  # gradients in one message, 64 MiB in float32
_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"


def make_accelerator(device: torch.device, bf16: bool, **options: Any) -> Accelerator:
    """A new accelerator for this device, without the state that an earlier trainer left.

    Under a DeepSpeed config PPO holds the whole weights and optimiser in every process.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # as transformers' trainers do
    deepspeed = os.environ.pop(_DEEPSPEED, None)
    try:
        return Accelerator(
            cpu=device.type == "cpu", mixed_precision="bf16" if bf16 else "no", **options
        )
    finally:
        if deepspeed is not None:
            os.environ[_DEEPSPEED] = deepspeed


def checkpoint_trained_weights(accelerator: Accelerator) -> None:
    """Have checkpoints hold the weights that are trained, without a frozen base."""

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        weights.clear()  # the whole models' weights, which accelerate would write
        for number, model in enumerate(models if accelerator.is_main_process else ()):
            save_trained(accelerator.unwrap_model(model), Path(folder) / f"trained-{number}")

    def load(models: list[Any], folder: str) -> None:
        for number, model in enumerate(models):
            load_trained(accelerator.unwrap_model(model), Path(folder) / f"trained-{number}")
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether every process holds only a part of the weights."""
    return distributed.count() > 1 and accelerator.distributed_type == DistributedType.FSDP


def prepare(accelerator: Accelerator, network: nn.Module, optimizer: Any) -> tuple[Any, Any]:
    """Network and optimiser for this accelerator.

    It does not reduce the gradients of whole weights; :func:`sum_gradients` does. Adapters that
    take turns on one trunk have several backward passes in a step, which DistributedDataParallel
    does not support.
    """
    if distributed.count() == 1 or is_sharded(accelerator):
        prepared: tuple[Any, Any] = accelerator.prepare(network, optimizer)
        return prepared
    whole: Any = accelerator.prepare_model(network, evaluation_mode=True)
    return whole, accelerator.prepare_optimizer(optimizer)


def to_shard(network: Any) -> Any:
    """A copy of a network to be sharded; its models are in use elsewhere.

    Raises UserError: its models share their weights.
    """
    if network.critic is not None and network.critic.switch is not None:
        raise UserError(
            "policy_update.backbone: found shared under FSDP, expected separate: shards do not "
            "support adapters that take turns on one trunk"
        )
    copied = copy.deepcopy(network)
    copied._no_split_modules = list(getattr(network.policy, "_no_split_modules", None) or ())
    return copied


def to_number(value: Any) -> float:
    """A scalar as a number; the processes may hold parts of it."""
    return float(value.full_tensor() if hasattr(value, "full_tensor") else value)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum each gradient over the processes; one that is None in all of them stays None."""
    if distributed.count() == 1:
        return
    weights = list(parameters)
    here = torch.tensor([w.grad is not None for w in weights], device=weights[0].device)
    anywhere = distributed.total(here.int()).tolist()
    gradients: list[Tensor] = []
    for weight, exists in zip(weights, anywhere, strict=True):
        if exists:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            gradients.append(weight.grad)
    for bucket in _buckets(gradients):
        flat = distributed.total(torch.cat([g.flatten() for g in bucket]))
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive gradients of one dtype, in buckets of about _BUCKET numbers."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        full = sum(g.numel() for g in bucket) >= _BUCKET
        if bucket and (full or bucket[0].dtype != gradient.dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


@contextmanager
def shared_folder(path: Path) -> Iterator[Path]:
    """As atomic_folder, for all processes to write into; the main one renames it at the end."""
    if not distributed.is_main():
        yield distributed.broadcast(path)
        distributed.barrier()
        return
    with atomic_folder(path) as partial:
        yield distributed.broadcast(partial)
        distributed.barrier()
