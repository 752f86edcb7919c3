"""Checks that hostile input is only refused in one line, without hangs or writes elsewhere."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from irl_align.errors import UserError

SECONDS = 20  # for one case, by the clock of a busy machine
_MOVES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate"}


class Hang(BaseException):
    """A case that does not end."""


class Watch:
    """Records what this process writes outside ``inside``, the only allowed folder."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.strayed: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writing = mode is None and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            paths = [path] if writing or (mode and set(mode) & set("wax+")) else []
        else:
            paths = list(arguments[:2]) if event in _MOVES else []
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike) and not self._fine(path):
                self.strayed.append(f"{event} {os.fsdecode(path)}")

    def _fine(self, path: Any) -> bool:
        name = os.path.abspath(os.fsdecode(path))
        caches = name.endswith((".pyc", "/dev/null")) or "__pycache__" in name
        return caches or name.startswith(str(self.inside))

    @contextmanager
    def on(self, folder: Path, lines: int = 1) -> Iterator[None]:
        """Run one case in a folder; it may raise only a UserError of at most `lines` lines.

        Raises:
            AssertionError: it wrote elsewhere, or its message is not printable or too long.
            Hang: it did not end.
        """
        self.inside, self.strayed = folder, []
        before = signal.signal(signal.SIGALRM, _hang)
        left, _ = signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            yield
        except UserError as error:
            text = str(error)
            assert text and all(c.isprintable() or c == "\n" for c in text), repr(text[:300])
            assert len(text) < 20_000, f"{len(text)} characters: {text[:300]!r}"
            assert text.count("\n") < lines, repr(text[:300])
        finally:
            signal.signal(signal.SIGALRM, before)
            signal.setitimer(signal.ITIMER_REAL, left)  # a test's own time limit
            self.inside = None
        assert self.strayed == [], f"wrote outside its folder: {self.strayed}"


def _hang(*_: Any) -> None:
    raise Hang(f"not done after {SECONDS} s")
