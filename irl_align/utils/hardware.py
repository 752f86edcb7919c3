"""The machine: library versions, peak memory, and whether it computes in bfloat16."""

import logging
import platform
import resource
import sys
from contextlib import suppress
from functools import cache
from importlib import metadata
from typing import Any

from irl_align.utils.version import __version__

logger = logging.getLogger(__name__)


def environment() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that decide its numbers."""
    versions = {"python": platform.python_version(), "irl_align": __version__}
    for name in ("torch", "transformers", "trl", "datasets", "tokenizers", "numpy", "vllm"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16. Others emulate it at a twentieth of the speed of
    float32."""
    import torch

    mkldnn: Any = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and bool(mkldnn._is_mkldnn_bf16_supported())


def in_bf16(asked: bool, on_cpu: bool) -> bool:
    """Whether to compute in bfloat16: if asked to, but not on a CPU that only emulates it."""
    return asked and (not on_cpu or cpu_has_bf16())


def use_bf16(asked: bool, on_cpu: bool) -> bool:
    """As :func:`in_bf16`, with a warning, once per process, where float32 is used instead."""
    use = in_bf16(asked, on_cpu)
    if asked and not use:
        _warn_of_float32()
    return use


@cache
def _warn_of_float32() -> None:
    logger.warning(
        "bf16: this CPU has no instructions for bfloat16 and would take many times as long, so it "
        "computes in float32"
    )


def reset_peak_memory() -> None:
    """Start a new measurement of the GPU's peak memory, if a GPU is in use."""
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, float]:
    """Peak memory in MiB: of this process so far, and of the current GPU since the reset."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss: bytes on macOS, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    memory = {"peak_rss_mib": round(peak, 1)}
    if cuda := _cuda():
        memory["peak_cuda_mib"] = round(cuda.max_memory_allocated() / 2**20, 1)
    return memory


def _cuda() -> Any:
    """``torch.cuda`` if it is in use; does not import torch."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
