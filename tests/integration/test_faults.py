"""Four cases of the fault harness in tests/faults; `make faults` runs fifty."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from faults.harness import SHARES, Outcome, available, plan
from faults.kinds import Damage, Reference
from faults.table import markdown

from irl_align.utils.files import content_hash

TESTS = Path(__file__).resolve().parents[1]
KINDS = ("kill", "nan", "damage", "disk")
LOOP = "ppo"  # one loop, so that one undisturbed run is enough


@pytest.mark.timeout(600)
def test_runs_end_with_the_same_weights_after_four_faults(tmp_path: Path) -> None:
    """The harness has its own process: cases fork, and a process that runs torch should not."""
    kinds = available(KINDS)
    chosen = [f"{kind}:{LOOP}" for kind in kinds]
    done = subprocess.run(
        [sys.executable, "-m", "faults", "--report", str(tmp_path), "--chosen", *chosen],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(kinds)} of {len(kinds)}" in done.stdout
    assert (tmp_path / "faults.md").read_text().count("same weights") == len(kinds)


def test_plan_has_every_kind_and_depends_only_on_the_seed() -> None:
    kinds = ["kill", *SHARES]
    cases = plan(50, 3, kinds)
    assert len(cases) == 50 and {kind for kind, _ in cases} == set(kinds)
    assert sum(kind == "kill" for kind, _ in cases) >= 15
    assert cases == plan(50, 3, kinds) != plan(50, 4, kinds)
    assert {kind for kind, _ in plan(9, 0, ["kill"])} == {"kill"}


def test_damage_harm_changes_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    for seed in range(20):
        file.write_bytes(b"some content" * 20)
        before = content_hash(file)
        fault = Damage(random.Random(seed), Reference((), 1.0, 1, 1, 0))
        fault.harm(file)
        assert not file.exists() or content_hash(file) != before


def test_markdown_lists_lost_cases() -> None:
    won = Outcome(0, "ppo", "kill", "kill -9 after 1 s", "status -9", 1, 0.1, [])
    lost = Outcome(1, "spin", "nan", "NaN", "a|b", 3, None, ["weights of policy differ"])
    text = markdown([won, lost], 0)
    assert text.startswith("# Faults: 1 of 2 cases won (seed 0)")
    assert "| nan | 1 | 0 |" in text and "| weights of policy differ |" in text and "a\\|b" in text
