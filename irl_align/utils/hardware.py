"""The machine: versions and peak memory for a stage's record, and whether bfloat16 is any use."""

import logging
import platform
import resource
import sys
from contextlib import suppress
from functools import cache
from importlib import metadata
from typing import Any

from irl_align.utils.version import __version__

logger = logging.getLogger("irl_align.utils.hardware")


def environment() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that decide its numbers."""
    versions = {"python": platform.python_version(), "irl_align": __version__}
    for name in ("torch", "transformers", "trl", "datasets", "tokenizers", "numpy", "vllm"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16; where it cannot that is emulated, at a twentieth of
    the speed of float32."""
    import torch

    mkldnn: Any = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and bool(mkldnn._is_mkldnn_bf16_supported())


def in_bf16(asked: bool, on_cpu: bool) -> bool:
    """Whether what asks for bf16 computes in it: that is for speed, so where a CPU only emulates it
    float32 takes its place."""
    return asked and (not on_cpu or cpu_has_bf16())


def use_bf16(asked: bool, on_cpu: bool) -> bool:
    """The same, and told, once a process, where float32 takes its place."""
    found = in_bf16(asked, on_cpu)
    if asked and not found:
        _say_float32()
    return found


@cache
def _say_float32() -> None:
    logger.warning(
        "bf16: this CPU has no instructions for bfloat16 and would take many times as long; it "
        "computes in float32"
    )


def reset_peak_memory() -> None:
    """Have the GPU's peak counted from here on, where one is in use."""
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, float]:
    """Peak memory in MiB: of this process so far, and of the current GPU since the reset."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss: bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    memory = {"peak_rss_mib": round(peak, 1)}
    if cuda := _cuda():
        memory["peak_cuda_mib"] = round(cuda.max_memory_allocated() / 2**20, 1)
    return memory


def _cuda() -> Any:
    """``torch.cuda`` if it is in use; a process that has not imported torch does not for this."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
