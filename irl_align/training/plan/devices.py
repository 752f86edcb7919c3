"""Devices by name, and the time that work takes on them."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from irl_align.errors import UserError
from irl_align.training.plan.memory import FLOAT, Precision

GIB = 2**30
FULL = Precision()


@dataclass(frozen=True)
class Device:
    """One accelerator, as in its maker's data sheet."""

    name: str
    memory: float
    """Memory in GiB."""
    half: float | None
    """Dense operations per second in bfloat16; None where no time is estimated."""
    full: float | None
    """Dense operations per second in float32, without TF32."""
    bandwidth: float | None
    """Bytes per second of its memory."""


DEVICES = {
    device.name: device
    for device in (
        Device("a100-40gb", 40, 312e12, 19.5e12, 1.555e12),
        Device("a100-80gb", 80, 312e12, 19.5e12, 2.039e12),
        Device("h100", 80, 989e12, 67e12, 3.35e12),
        Device("h200", 141, 989e12, 67e12, 4.8e12),
        Device("l40s", 48, 362e12, 91.6e12, 0.864e12),
        Device("rtx-4090", 24, 165e12, 82.6e12, 1.008e12),
    )
}


def device_named(name: str) -> Device:
    """A device by its name; cpu is this machine. Raises UserError for an unknown name."""
    if name == "cpu":
        return Device("cpu", psutil.virtual_memory().total / GIB, None, None, None)
    if name not in DEVICES:
        raise UserError(f"--device: found {name!r}, expected one of {', '.join(DEVICES)}, cpu")
    return DEVICES[name]


@dataclass(frozen=True)
class Work:
    """Work of a stage on a device."""

    flops: float = 0.0
    moved: float = 0.0
    """Bytes read from memory where bandwidth is the limit: sampling, token by token."""
    precision: Precision = FULL

    def hours(self, device: Device, mfu: float, mbu: float) -> float | None:
        """Hours on one device; mfu and mbu: share of its peak operations and bandwidth in use."""
        peak = device.full if self.precision.products == FLOAT else device.half
        if peak is None or device.bandwidth is None:
            return None
        return max(self.flops / (peak * mfu), self.moved / (device.bandwidth * mbu)) / 3600.0
