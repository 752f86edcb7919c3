"""Runs beside each other only as far as memory goes."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.synthetic_runs import synthetic_run

from irl_align.evaluation.compare.memory_guard import (
    CONTEXT,
    GIB,
    HEADROOM,
    UNKNOWN,
    MemoryGuard,
    gpu_in_use,
)
from irl_align.training.run_folder import Run


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The machine's free memory, as the guard sees it."""
    memory = SimpleNamespace(available=16 * GIB)
    monkeypatch.setattr(
        "irl_align.evaluation.compare.memory_guard.psutil.virtual_memory", lambda: memory
    )
    return memory


def test_what_runs_may_still_take_is_not_free(
    free: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {1: 3 * GIB, 2: 1 * GIB}
    monkeypatch.setattr("irl_align.evaluation.compare.memory_guard._resident", held.__getitem__)
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


class Gpu:
    """A GPU of 16 GiB, as torch.cuda tells of it."""

    def __init__(self) -> None:
        self.free = 16 * GIB

    def mem_get_info(self) -> tuple[float, int]:
        return self.free, 16 * GIB


def test_what_runs_may_still_take_of_a_gpu_is_not_free(
    free: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("irl_align.evaluation.compare.memory_guard._resident", lambda pid: GIB)
    free.available = 1000 * GIB
    gpu = Gpu()
    guard = MemoryGuard([], gpu)
    assert guard.need_cuda == UNKNOWN and guard.fits([])
    # 5 GiB of one run: each may come to 6. It may take 1 more, and the next needs 6.
    gpu.free = 11 * GIB
    assert guard.fits([1]) and guard.need_cuda == pytest.approx(6 * GIB)
    # Two hold 9: they may take 3 more, and the third needs 6.
    gpu.free = 7 * GIB
    assert not guard.fits([1, 2])
    # Another's process took what would have been enough for a second one.
    gpu.free = 3 * GIB
    assert not guard.fits([1]) and guard.fits([])
    assert MemoryGuard([]).need_cuda == 0.0  # and without a GPU none is asked for


def test_a_finished_run_says_what_one_needs_of_a_gpu(tmp_path: Path, free: SimpleNamespace) -> None:
    record = {"stage": "ppo", "stage_key": "x", "reused": False, "peak_rss_mib": 100.0}
    extra = {"stage/policy-1": {**record, "peak_cuda_mib": 6.0 * 1024}}
    run = synthetic_run(tmp_path, "m", 1, [(0.3, 0.2), (0.2, 0.1)], extra=extra)
    guard = MemoryGuard([], Gpu())
    guard.note(Run.load(run))
    assert guard.largest_cuda == 6 * GIB + CONTEXT and guard.largest == 512 * 2**20
    guard = MemoryGuard([Run.load(run)], Gpu())
    assert guard.fits([]) and guard.need_cuda == pytest.approx(HEADROOM * 6.5 * GIB)
    assert guard.fits([1])  # it has taken nothing yet, and two need 15.6 GiB
    assert not guard.fits([1, 2])


def test_a_gpu_is_looked_at_for_several_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_in_use(1) is None and gpu_in_use(2) is torch.cuda
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_in_use(2) is None


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
    (held,) = guard.measure([process.pid])
    assert 200 * 2**20 < held < 400 * 2**20 and guard.largest == held
    process.communicate("\n")
    assert guard.measure([process.pid]) == [0] and guard.largest == held
