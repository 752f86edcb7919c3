"""Whether another run fits into the memory of the machine and of the GPU, next to running ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import psutil

from irl_align.training.run_folder import RunView

GIB = 2**30
UNKNOWN = 2 * GIB  # assumed need of a run before any run was measured
HEADROOM = 1.2  # a run may need more than earlier runs did
CONTEXT = GIB // 2  # memory of a process's CUDA context, which torch does not count


class MemoryGuard:
    """Estimates the memory of the next run from the peaks of finished and running ones.

    cuda: `torch.cuda` if the runs share a GPU, whose current device is measured; None otherwise.
    """

    def __init__(self, finished: Iterable[RunView] = (), cuda: Any = None) -> None:
        self.largest = 0.0
        """Bytes of the largest run so far; 0 before the first."""
        self.largest_cuda = 0.0
        """The same on the GPU."""
        self.logged_at = 0
        """Number of running runs at which waiting was last logged."""
        self._cuda = cuda
        self._free_alone = 0.0 if cuda is None else float(cuda.mem_get_info()[0])
        for view in finished:
            self.note(view)

    def note(self, view: RunView) -> None:
        """Take a finished run's peaks into account."""
        for record in view.metrics:
            peak = record.get("peak_rss_mib") or 0.0
            peak_cuda = record.get("peak_cuda_mib") or 0.0
            self.largest = max(self.largest, 2**20 * float(peak))
            if peak_cuda:
                self.largest_cuda = max(self.largest_cuda, 2**20 * float(peak_cuda) + CONTEXT)

    @property
    def need(self) -> float:
        """Bytes that a run is assumed to need."""
        return HEADROOM * self.largest if self.largest else float(UNKNOWN)

    @property
    def need_cuda(self) -> float:
        """Bytes that a run is assumed to need on the GPU; 0 without a GPU."""
        if self._cuda is None:
            return 0.0
        return HEADROOM * self.largest_cuda if self.largest_cuda else float(UNKNOWN)

    def measure(self, pids: Iterable[int]) -> list[int]:
        """Bytes that each running run holds now, with its children; the largest is recorded."""
        held = [_resident(pid) for pid in pids]
        self.largest = max([self.largest, *held])
        return held

    def fits(self, pids: Iterable[int]) -> bool:
        """Whether free memory suffices for another run and for the growth of the running ones."""
        held = self.measure(pids)
        on_gpu = self._fits_on_gpu(len(held))
        if not held:
            return True  # a single run may always try
        growth = sum(max(0.0, self.need - own) for own in held)
        return on_gpu and float(psutil.virtual_memory().available) >= self.need + growth

    def _fits_on_gpu(self, running: int) -> bool:
        """The same on the GPU, which reports free memory but not who holds the rest: what was taken
        since no run was running is assumed to be the runs', in equal shares."""
        if self._cuda is None:
            return True
        free = float(self._cuda.mem_get_info()[0])
        if not running:
            self._free_alone = free
            return True
        held = max(0.0, self._free_alone - free)
        self.largest_cuda = max(self.largest_cuda, held / running)
        growth = max(0.0, running * self.need_cuda - held)
        return free >= self.need_cuda + growth


def gpu_in_use(parallel: int) -> Any:
    """`torch.cuda` if several runs at a time share a GPU, else None: importing torch takes seconds,
    and querying the GPU takes some of its memory."""
    if parallel < 2:
        return None
    import torch

    return torch.cuda if torch.cuda.is_available() else None


def _resident(pid: int) -> int:
    """Resident bytes of a process and its children; 0 when it has ended."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return sum(member.memory_info().rss for member in family)
    except psutil.Error:
        return 0
