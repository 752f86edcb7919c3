"""Signs of life between the processes of a run: one that dies or hangs ends the others, told.

A thread of each process counts up in the launcher's key-value store and looks at the others'. The
main thread may be waiting for a process that is no more, so the thread itself ends the process:
what is on the disk is whole at any moment.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

GRACE = 3.0  # seconds in which the process with a fault tells it before the others end
_ENDED = b"ended"


class Watch:
    """Watches the other processes from the moment it is made until :meth:`end`.

    silence: seconds without a sign of life after which a process is taken for lost.
    """

    def __init__(self, rank: int, count: int, silence: float) -> None:
        from torch.distributed import PrefixStore
        from torch.distributed.distributed_c10d import _get_default_store

        self.rank, self.silence = rank, silence
        self.others = [other for other in range(count) if other != rank]
        shared: Any = _get_default_store()
        # A connection of its own: collectives may hold the other one while they wait.
        self.store: Any = PrefixStore("irl-align", shared.clone())
        self.beats = 0
        self.over = threading.Event()
        self._beat()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()

    def fault(self) -> bool:
        """Tell the others that this process ends with an error; whether it was the first to."""
        try:
            return bool(self.store.add("faults", 1) == 1)
        except RuntimeError:  # the launcher is gone, and the store with it
            return True

    def end(self) -> None:
        """Stop watching, and have the others not miss this process."""
        self.over.set()
        self.thread.join()
        try:
            self.store.set(f"beat-{self.rank}", _ENDED)
        except RuntimeError:  # the last one to end may find the store gone
            return

    def _run(self) -> None:
        seen = {other: (b"", time.monotonic()) for other in self.others}
        while not self.over.wait(min(1.0, self.silence / 10)):
            try:
                self._beat()
                self._look(seen)
            except RuntimeError as error:
                if not self.over.wait(GRACE):
                    self._leave(f"the processes' store is out of reach ({_line(error)})")

    def _beat(self) -> None:
        self.beats += 1
        self.store.set(f"beat-{self.rank}", str(self.beats))

    def _look(self, seen: dict[int, tuple[bytes, float]]) -> None:
        now = time.monotonic()
        for other, (before, since) in seen.items():
            key = f"beat-{other}"
            beat = self.store.get(key) if self.store.check([key]) else b""
            if beat not in (before, _ENDED) or beat == _ENDED:
                seen[other] = (beat, now)
            elif now - since > self.silence:
                self._leave(
                    f"process {other} of {len(self.others) + 1} has given no sign of life for "
                    f"{now - since:.0f} s: it hangs or was killed"
                )
        if self.store.check(["faults"]) and not self.over.wait(GRACE):
            os._exit(1)  # the process with the fault tells it

    def _leave(self, fault: str) -> None:
        """End this process; the first one to do so says why."""
        if self.fault():
            message = f"irl-align: {fault}; the same command goes on from the last checkpoint"
            print(f"\n{message}", file=sys.stderr, flush=True)
        os._exit(1)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
