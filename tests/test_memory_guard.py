"""Runs beside each other only as far as memory goes."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from synthetic_runs import synthetic_run

from irl_align.memory_guard import GIB, HEADROOM, UNKNOWN, MemoryGuard
from irl_align.stages import Run


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The machine's free memory, as the guard sees it."""
    memory = SimpleNamespace(available=16 * GIB)
    monkeypatch.setattr("irl_align.memory_guard.psutil.virtual_memory", lambda: memory)
    return memory


def test_what_runs_may_still_take_is_not_free(
    free: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {1: 3 * GIB, 2: 1 * GIB}
    monkeypatch.setattr("irl_align.memory_guard._resident", held.__getitem__)
    guard = MemoryGuard()
    assert guard.need == UNKNOWN and guard.fits([])
    # The largest is 3 GiB: each run may come to 3.6. Run 1 may take 0.6 more, run 2 2.6, and the
    # next needs 3.6: 6.8 GiB.
    free.available = 6.9 * GIB
    assert guard.fits([1, 2]) and guard.need == pytest.approx(HEADROOM * 3 * GIB)
    free.available = 6.7 * GIB
    assert not guard.fits([1, 2])
    free.available = 4.3 * GIB
    assert guard.fits([1])
    free.available = 0
    assert guard.fits([])  # alone it may try


def test_finished_runs_say_what_one_needs(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path, "m", 1, [(0.3, 0.2), (0.2, 0.1)])
    assert MemoryGuard([Run.load(run)]).largest == 512 * 2**20


def test_a_process_is_seen_and_one_that_has_ended_is_nothing() -> None:
    code = "x = bytearray(200 * 2**20); print('there', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    guard = MemoryGuard()
    (held,) = guard.look([process.pid])
    assert 200 * 2**20 < held < 400 * 2**20 and guard.largest == held
    process.communicate("\n")
    assert guard.look([process.pid]) == [0] and guard.largest == held
