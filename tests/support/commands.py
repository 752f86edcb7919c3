"""`irl-align` commands in processes of their own, which have imported the package already."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["irl_align.training.train", "irl_align.cli.main"])
LONGEST = 120.0  # seconds; a command that takes longer hangs


class Command:
    """A command under way. Its first start waits for the imports, later ones do not."""

    def __init__(self, log: Path, *arguments: object, **environment: str) -> None:
        self.log = log
        self._process: ForkServerProcess = _CONTEXT.Process(
            target=_run, args=(list(map(str, arguments)), log, environment)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """Number of its process."""
        assert self._process.pid is not None
        return self._process.pid

    def wait_for(self, happened: Callable[[], bool]) -> bool:
        """Poll until something has happened; False when the command ended well before."""
        while not happened():
            if self._process.exitcode is not None:
                assert self._process.exitcode == 0, self.log.read_text(encoding="utf-8")
                return False
            time.sleep(0.002)
        return True

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def ended(self) -> tuple[int, str]:
        """(exit status, all that it printed), when it has ended; -9 after a kill."""
        self._process.join(LONGEST)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"the command hangs: {self.log}")
        return self._process.exitcode, self.log.read_text(encoding="utf-8")


def _run(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """Run the command line as its entry point does; what it prints goes to the log."""
    os.environ.update(environment)
    # Ctrl-C does something, also where the tests run as a shell's background job.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["irl-align", *arguments]
    from irl_align.cli.main import main

    main()
