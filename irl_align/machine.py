"""What a stage's record says of the machine: versions, and peak memory."""

import platform
import resource
import sys
from contextlib import suppress
from importlib import metadata
from typing import Any

from irl_align import __version__


def environment() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that decide its numbers."""
    versions = {"python": platform.python_version(), "irl_align": __version__}
    for name in ("torch", "transformers", "trl", "datasets", "tokenizers", "numpy", "vllm"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


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
