"""Whether another run fits into memory, the machine's and the GPU's, beside those that go on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import psutil

from irl_align.training.run_folder import RunView

GIB = 2**30
UNKNOWN = 2 * GIB  # what a run is taken to need before one has been seen
HEADROOM = 1.2  # a run may need more than others of its kind did
CONTEXT = GIB // 2  # what CUDA itself takes of a process, which torch does not count


class MemoryGuard:
    """Peak memory of runs that are seen, and what it says of the next one.

    cuda: `torch.cuda` where the runs have a GPU, of which the current one is looked at; None where
    they have not.
    """

    def __init__(self, finished: Iterable[RunView] = (), cuda: Any = None) -> None:
        self.largest = 0.0
        """Bytes of the largest run so far; 0 before there is one."""
        self.largest_cuda = 0.0
        """The same on the GPU."""
        self.told = 0
        """Number of running runs at which waiting was told."""
        self._cuda = cuda
        self._free_alone = 0.0 if cuda is None else float(cuda.mem_get_info()[0])
        for view in finished:
            self.note(view)

    def note(self, view: RunView) -> None:
        """Take a finished run's peaks into account."""
        for record in view.metrics:
            peak, peak_cuda = (record.get(f"peak_{of}_mib") or 0.0 for of in ("rss", "cuda"))
            self.largest = max(self.largest, 2**20 * float(peak))
            if peak_cuda:
                self.largest_cuda = max(self.largest_cuda, 2**20 * float(peak_cuda) + CONTEXT)

    @property
    def need(self) -> float:
        """Bytes that a run is taken to need."""
        return HEADROOM * self.largest if self.largest else float(UNKNOWN)

    @property
    def need_cuda(self) -> float:
        """Bytes that a run is taken to need on the GPU; 0 where there is none."""
        if self._cuda is None:
            return 0.0
        return HEADROOM * self.largest_cuda if self.largest_cuda else float(UNKNOWN)

    def look(self, pids: Iterable[int]) -> list[int]:
        """Bytes that each running run holds now, its children's too; notes the largest."""
        held = [_resident(pid) for pid in pids]
        self.largest = max([self.largest, *held])
        return held

    def fits(self, pids: Iterable[int]) -> bool:
        """Whether another run fits: it, and what those that run may still take, is free."""
        held = self.look(pids)
        on_gpu = self._fits_on_gpu(len(held))
        if not held:
            return True  # alone it may try
        growth = sum(max(0.0, self.need - own) for own in held)
        return on_gpu and float(psutil.virtual_memory().available) >= self.need + growth

    def _fits_on_gpu(self, running: int) -> bool:
        """The same on the GPU, which tells what is free and not who holds the rest: what is held
        since nothing ran is taken to be the runs', the same for each."""
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
    """`torch.cuda` where several runs at a time share a GPU, else None: to look at it takes some of
    its memory, and torch some seconds."""
    if parallel < 2:
        return None
    import torch

    return torch.cuda if torch.cuda.is_available() else None


def _resident(pid: int) -> int:
    """Resident bytes of a process and its children; 0 when it has ended."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return sum(one.memory_info().rss for one in family)
    except psutil.Error:
        return 0
