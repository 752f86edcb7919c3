"""Cases: run a loop with a fault at a random point, repeat the command, compare the results."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .kinds import ENDED_WELL, FAULTS, FullDisk, Reference, on_linear
from .loops import LOOPS, half_written, metrics, results, start
from .server import FakeServer

ATTEMPTS = 3  # commands after the fault, at most
SERVED = "spin"  # the loop that a server samples for
# of all cases; the others are kills
SHARES = {"disk": 0.16, "damage": 0.24, "nan": 0.16, "server": 0.12}


@dataclass(frozen=True)
class Outcome:
    """How a case went."""

    number: int
    loop: str
    kind: str
    fault: str
    first: str
    """How the command with the fault ended."""
    attempts: int
    """Commands after it."""
    overhead: float | None
    """Processor time of all attempts beyond that of the undisturbed loop, as a share of it."""
    wrong: list[str]
    """Checks that failed; empty if the case is won."""


def references(folder: Path, loops: Sequence[str]) -> dict[str, Reference]:
    """Run each loop undisturbed below a folder, unless its result is already there."""
    undisturbed = {}
    for name in loops:
        home = folder / name
        note = home / "reference.json"
        if not note.exists():
            in_own_process(lambda home=home, name=name: _run_reference(home, name), note)
        values = json.loads(note.read_text(encoding="utf-8"))
        if "error" in values:
            raise RuntimeError(f"reference {name}: {values['error']}")
        undisturbed[name] = Reference(LOOPS[name.removesuffix("-served")], **values)
    return undisturbed


def _run_reference(home: Path, name: str) -> dict[str, Any]:
    counted = home / "linears"
    home.mkdir(parents=True, exist_ok=True)

    def count() -> None:
        with counted.open("wb", buffering=1 << 16) as file:
            descriptor = os.dup(file.fileno())

        def note(number: int, out: Any) -> Any:
            os.pwrite(descriptor, str(number + 1).encode(), 0)
            return out

        on_linear(note)

    served = FakeServer(home / "server.log") if name.endswith("-served") else None
    loop = (*LOOPS[name.removesuffix("-served")], *(served.overrides() if served else ()))
    ended = start(home, loop, count).wait()
    if served is not None:
        served.stop()
    if ended.status != 0:
        return {"error": ended.said[-2000:]}
    size = sum(path.stat().st_size for path in (home / "runs").rglob("*") if path.is_file())
    return {
        "cpu": ended.cpu,
        "bytes": size,
        "linears": int(counted.read_text()),
        "generates": served.requests() if served else 0,
    }


def plan(cases: int, seed: int, kinds: Sequence[str]) -> list[tuple[str, str]]:
    """(kind, loop) of each case: kinds by their shares, loops in turn."""
    counts = {kind: round(cases * share) for kind, share in SHARES.items() if kind in kinds}
    if "kill" in kinds:
        counts["kill"] = cases - sum(counts.values())
    loops = list(LOOPS)
    chosen = []
    for kind, count in counts.items():
        chosen += [(kind, SERVED if kind == "server" else loops[i % 3]) for i in range(count)]
    random.Random(seed).shuffle(chosen)
    return chosen


def available(kinds: Sequence[str]) -> list[str]:
    """The kinds that this system allows."""
    return [kind for kind in kinds if kind != "disk" or FullDisk.available()]


def run_case(
    number: int, kind: str, loop: str, seed: int, reference: Path, folder: Path
) -> Outcome:
    """Run one case in its own folder, which is deleted if the case is won."""
    note = folder.with_suffix(".json")
    shutil.rmtree(folder, ignore_errors=True)
    in_own_process(lambda: asdict(_case(number, kind, loop, seed, reference, folder)), note)
    values = json.loads(note.read_text(encoding="utf-8"))
    if "error" in values:
        return Outcome(number, loop, kind, "", "", 0, None, [values["error"]])
    if not values["wrong"]:
        shutil.rmtree(folder, ignore_errors=True)
        note.unlink()
    return Outcome(**values)


def _case(number: int, kind: str, name: str, seed: int, reference: Path, folder: Path) -> Outcome:
    home = name + "-served" if kind == "server" else name
    undisturbed = references(reference, [home])[home]
    fault = FAULTS[kind](random.Random(f"{seed}/{number}"), undisturbed)
    try:
        loop = (*undisturbed.loop, *fault.prepare(folder))
        first = fault.strike(folder, loop)
        wrong = []
        if first.status not in ENDED_WELL:
            wrong.append(f"the fault: {_last(first.said)}")
        last, attempts, used = first, 0, first.cpu
        while attempts < ATTEMPTS and (attempts == 0 or last.status != 0):
            fault.clear()
            last = start(folder, loop).wait()
            attempts, used = attempts + 1, used + last.cpu
    finally:
        fault.finish()
    if last.status != 0:
        wrong.append(f"the same command: {last.status}: {_last(last.said)}")
    else:
        wrong += _compare(reference / home, folder)
    ended = {0: "done", 2: first.message}.get(first.status, f"status {first.status}")
    over = used / undisturbed.cpu - 1.0 if kind == "kill" else None
    return Outcome(number, name, kind, fault.described(), ended, attempts, over, wrong)


def _compare(reference: Path, folder: Path) -> list[str]:
    """Differences of a finished case from the undisturbed loop."""
    wrong = [f"half written: {name}" for name in half_written(folder)]
    expected, weights = results(reference), results(folder)
    wrong += [f"weights of {name} differ" for name in expected if weights[name] != expected[name]]
    logged, own = metrics(reference), metrics(folder)
    wrong += [f"metrics differ: {key}" for key in logged if own.get(key) != logged[key]]
    return wrong


def _last(said: str) -> str:
    lines = said.strip().splitlines()
    return lines[-1] if lines else "nothing said"


def in_own_process(work: Callable[[], dict[str, Any]], note: Path) -> None:
    """Do work in a forked process, which may mount and fork; write its result to ``note``."""
    note.parent.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            answer = work()
        except BaseException:
            answer = {"error": traceback.format_exc()}
        note.write_text(json.dumps(answer), encoding="utf-8")
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(pid, 0)
