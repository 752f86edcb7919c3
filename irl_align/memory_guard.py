"""Whether another run fits into memory beside those that go on."""

from __future__ import annotations

from collections.abc import Iterable

import psutil

from irl_align.stages import RunView

GIB = 2**30
UNKNOWN = 2 * GIB  # what a run is taken to need before one has been seen
HEADROOM = 1.2  # a run may need more than others of its kind did


class MemoryGuard:
    """Peak memory of runs that are seen, and what it says of the next one."""

    def __init__(self, finished: Iterable[RunView] = ()) -> None:
        peaks = [float(r["peak_rss_mib"]) for v in finished for r in v.metrics
                 if r.get("peak_rss_mib")]  # fmt: skip
        self.largest = max(peaks, default=0.0) * 2**20
        """Bytes of the largest run so far; 0 before there is one."""
        self.told = 0
        """Number of running runs at which waiting was told."""

    @property
    def need(self) -> float:
        """Bytes that a run is taken to need."""
        return HEADROOM * self.largest if self.largest else float(UNKNOWN)

    def look(self, pids: Iterable[int]) -> list[int]:
        """Bytes that each running run holds now, its children's too; notes the largest."""
        held = [_resident(pid) for pid in pids]
        self.largest = max([self.largest, *held])
        return held

    def fits(self, pids: Iterable[int]) -> bool:
        """Whether another run fits: it, and what those that run may still take, is free."""
        held = self.look(pids)
        if not held:
            return True  # alone it may try
        growth = sum(max(0.0, self.need - own) for own in held)
        return float(psutil.virtual_memory().available) >= self.need + growth


def _resident(pid: int) -> int:
    """Resident bytes of a process and its children; 0 when it has ended."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return sum(one.memory_info().rss for one in family)
    except psutil.Error:
        return 0
