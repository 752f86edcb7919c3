"""Heartbeats between the processes of a run: when one dies or hangs, the others end with a message.

A thread in each process counts up in the launcher's key-value store and checks the others' counts.
The main thread may be waiting for a dead process, so the thread itself ends the process. This is
safe because files on the disk are complete at any moment.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

GRACE = 3.0  # seconds for the failed process to report its error before the others end
_ENDED = b"ended"


class Watch:
    """Watches the other processes from its creation until :meth:`end`.

    silence: seconds without a heartbeat after which a process counts as lost.
    """

    def __init__(self, rank: int, count: int, silence: float) -> None:
        from torch.distributed import PrefixStore
        from torch.distributed.distributed_c10d import _get_default_store

        self.rank, self.silence = rank, silence
        self.others = [other for other in range(count) if other != rank]
        shared: Any = _get_default_store()
        # This thread needs its own connection: collectives may block the other one.
        self.store: Any = PrefixStore("irl-align", shared.clone())
        self.beats = 0
        self.over = threading.Event()
        self._beat()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()

    def fault(self) -> bool:
        """Signal that this process ends with an error; True if it is the first one to do so."""
        try:
            return bool(self.store.add("faults", 1) == 1)
        except RuntimeError:  # the launcher is gone, and the store with it
            return True

    def end(self) -> None:
        """Stop watching, and let the others know that this process ended normally."""
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
                    self._leave(f"the processes' store cannot be reached ({_line(error)})")

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
                    f"process {other} of {len(self.others) + 1} has sent no heartbeat for "
                    f"{now - since:.0f} s: it hangs or was killed"
                )
        if self.store.check(["faults"]) and not self.over.wait(GRACE):
            os._exit(1)  # the failed process reports the error

    def _leave(self, fault: str) -> None:
        """End this process; the first one to do so prints why."""
        if self.fault():
            message = f"irl-align: {fault}; the same command resumes from the last checkpoint"
            print(f"\n{message}", file=sys.stderr, flush=True)
        os._exit(1)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
