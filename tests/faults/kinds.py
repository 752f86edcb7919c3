"""The faults: each is a small class that disturbs one attempt at a loop.

``strike`` starts the command, disturbs it, and returns how the command ended; the harness then
runs the same command again. ``prepare`` is called before, in the process of the case.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from .loops import Attempt, Ended, start
from .server import FakeServer, Trick

ENDED_WELL = (0, 2, -signal.SIGKILL)  # what a command under a fault may end with


@dataclass(frozen=True)
class Reference:
    """Measurements of the undisturbed loop, from which a fault draws a random point."""

    loop: Sequence[str]
    cpu: float
    """Seconds of processor time."""
    bytes: int
    """Size of the runs folder at the end."""
    linears: int
    """Calls of torch.nn.Linear."""
    generates: int
    """Requests for samples, if a server answers them."""


class Fault(Protocol):
    """One kind of fault, at a random point."""

    def prepare(self, folder: Path) -> Sequence[str]:
        """Set up the fault; return further overrides of the command."""

    def strike(self, folder: Path, loop: Sequence[str]) -> Ended:
        """Run the command with the fault in it."""

    def clear(self) -> None:
        """Undo what would stop the next attempt, as a user would."""

    def finish(self) -> None:
        """End what ``prepare`` started."""

    def described(self) -> str:
        """The fault in words, for the table."""


class _Plain:
    def prepare(self, folder: Path) -> Sequence[str]:
        return ()

    def clear(self) -> None:
        pass

    def finish(self) -> None:
        pass


class Kill(_Plain):
    """kill -9 of one process, one to three times, at random points."""

    def __init__(self, rng: random.Random, reference: Reference) -> None:
        self.rng = rng
        self.points = sorted(rng.uniform(0.0, reference.cpu) for _ in range(rng.randint(1, 3)))

    def strike(self, folder: Path, loop: Sequence[str]) -> Ended:
        for number, point in enumerate(self.points):
            # finished work is not repeated
            ended = killed_at(start(folder, loop), point / (number + 1), self.rng)
            if ended.status == 0:
                break
        return ended

    def described(self) -> str:
        return "kill -9 after " + ", ".join(f"{point:.1f} s" for point in self.points)


def killed_at(attempt: Attempt, cpu: float, rng: random.Random) -> Ended:
    """Kill one of an attempt's processes once its first has used so much processor time."""
    while attempt.cpu_seconds() < cpu:
        time.sleep(0.002)
    attempt.kill(rng.choice(attempt.pids))
    return attempt.wait()


class Damage(_Plain):
    """A file of the store is cut off, overwritten, has a bit flipped or is lost, after a kill."""

    def __init__(self, rng: random.Random, reference: Reference) -> None:
        self.rng = rng
        self.point = rng.uniform(0.3, 1.2) * reference.cpu  # may lie after the end of the run
        self.way = rng.choice(("cut off", "one bit flipped", "zeros in a block", "lost"))
        self.file = ""

    def strike(self, folder: Path, loop: Sequence[str]) -> Ended:
        ended = killed_at(start(folder, loop), self.point, self.rng)
        store = folder / "runs/store"
        files = [p for p in store.rglob("*") if p.is_file() and p.suffix not in (".lock", ".pid")]
        if files:
            file = self.rng.choice(sorted(files))
            self.file = file.relative_to(store).as_posix()
            self.harm(file)
        return ended

    def harm(self, file: Path) -> None:
        """Damage one file."""
        content = bytearray(file.read_bytes())
        at = self.rng.randrange(len(content)) if content else 0
        if self.way == "lost":
            file.unlink()
            return
        if self.way == "cut off":
            del content[at:]
        elif self.way == "zeros in a block":
            content[at : at + 64] = bytes(len(content[at : at + 64]))
        elif content:
            content[at] ^= 1 << self.rng.randrange(8)
        file.write_bytes(content)

    def described(self) -> str:
        return f"{self.file or 'nothing there yet'}: {self.way}, after {self.point:.1f} s"


class FullDisk(_Plain):
    """The runs are on a small file system, which fills up and is then enlarged."""

    def __init__(self, rng: random.Random, reference: Reference) -> None:
        self.size = int(reference.bytes * rng.uniform(0.05, 0.95))
        self.mount = Path()

    @staticmethod
    def available() -> bool:
        """Whether this system lets a user mount in their own name space."""
        command = ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False

    def prepare(self, folder: Path) -> Sequence[str]:
        self.mount = folder / "runs"
        self.mount.mkdir(parents=True)
        _enter_own_namespace()
        options = f"size={self.size}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.mount], check=True)
        return ()

    def strike(self, folder: Path, loop: Sequence[str]) -> Ended:
        return start(folder, loop).wait()

    def clear(self) -> None:
        subprocess.run(["mount", "-o", "remount,size=1g", self.mount], check=True)

    def described(self) -> str:
        return f"disk of {self.size / 2**20:.2f} MiB"


def _enter_own_namespace() -> None:
    """This process's own user and mount name space, in which it may mount."""
    user, group = os.getuid(), os.getgid()
    new_user, new_mount = 0x10000000, 0x00020000  # CLONE_NEWUSER, CLONE_NEWNS
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_user | new_mount):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {user} 1"),
        ("gid_map", f"0 {group} 1"),
    ):
        Path(f"/proc/self/{name}").write_text(line, encoding="ascii")


class NotANumber(_Plain):
    """One number of one layer's output becomes NaN, once."""

    def __init__(self, rng: random.Random, reference: Reference) -> None:
        self.call = rng.randrange(reference.linears)
        self.place = rng.random()

    def strike(self, folder: Path, loop: Sequence[str]) -> Ended:
        return start(folder, loop, self._arm).wait()

    def _arm(self) -> None:
        def harm(number: int, out: torch.Tensor) -> torch.Tensor:
            if number != self.call:
                return out
            wrong = torch.zeros_like(out).view(-1)
            wrong[int(self.place * wrong.numel())] = torch.nan
            return out + wrong.view_as(out)

        on_linear(harm)

    def described(self) -> str:
        return f"NaN in the output of linear layer call {self.call}"


def on_linear(change: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
    """Pass the number and output of each torch.nn.Linear call in this process to ``change``."""
    whole, calls = torch.nn.Linear.forward, iter(range(2**62))

    def forward(self: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
        return change(next(calls), whole(self, input))

    torch.nn.Linear.forward = forward  # type: ignore[method-assign]


class ServerFault:
    """The server that samples delays, drops or refuses requests, or dies and comes back."""

    def __init__(self, rng: random.Random, reference: Reference) -> None:
        kinds = ("delay", "drop", "error", "die", "stay away")
        self.trick = Trick(rng.choice(kinds), rng.randrange(reference.generates))
        self.server: FakeServer | None = None

    def prepare(self, folder: Path) -> Sequence[str]:
        folder.mkdir(parents=True)
        self.server = FakeServer(folder / "server.log", self.trick)
        return self.server.overrides()

    def strike(self, folder: Path, loop: Sequence[str]) -> Ended:
        return start(folder, loop).wait()

    def clear(self) -> None:
        assert self.server is not None
        self.server.restart()

    def finish(self) -> None:
        if self.server is not None:
            self.server.stop()

    def described(self) -> str:
        return f"server: {self.trick.kind} at request {self.trick.request}"


FAULTS: dict[str, Callable[[random.Random, Reference], Fault]] = {
    "kill": Kill,
    "disk": FullDisk,
    "damage": Damage,
    "nan": NotANumber,
    "server": ServerFault,
}
