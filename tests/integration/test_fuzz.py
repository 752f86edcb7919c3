"""Hostile inputs of each kind, 25 here; `make fuzz` runs 20,000 in all."""

from pathlib import Path

import pytest
from faults.fuzz import fuzz
from faults.guard import Hang, Watch
from faults.targets import TARGETS

from irl_align.errors import UserError


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.mark.parametrize("target", TARGETS)
def test_hostile_input_is_read_or_refused_in_one_line(
    target: str, tmp_path: Path, watch: Watch
) -> None:
    assert fuzz(target, 25, 1, tmp_path / "case", watch) >= 20


def test_watch_reports_what_a_case_may_not_do(
    tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with watch.on(inside):
        (inside / "a").write_text("x")
        raise UserError("a line")
    with pytest.raises(AssertionError, match="wrote outside"), watch.on(inside):
        (tmp_path / "b").write_text("x")
    with pytest.raises(AssertionError, match=r"one.nanother"), watch.on(inside):
        raise UserError("one\nanother")
    with pytest.raises(KeyError), watch.on(inside):
        raise KeyError("a traceback")
    monkeypatch.setattr("faults.guard.SECONDS", 0.05)
    with pytest.raises(Hang), watch.on(inside):
        while True:
            pass
