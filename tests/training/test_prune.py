"""What prune deletes, and what it must not: whatever a run links or would go on from."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support.tiny_runs import irl_align, the_line, tiny_recipe, write_recipe

from irl_align.errors import UserError
from irl_align.training.plan.disk import announce_disk
from irl_align.training.prune import delete, find_waste, holding, runs_folder
from irl_align.training.run_folder import Run
from irl_align.training.store import Stage, Store
from irl_align.training.train import train
from irl_align.utils.files import seal


def stage(store: Store, name: str, inputs: dict[str, str] | None = None) -> Stage:
    def build(work: Path) -> None:
        (work / "model.bin").write_bytes(b"0" * 1000)

    return store.stage(name, {}, inputs or {}, build)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A finished run of start, sft and policy; a stage that no run links."""
    store = Store(tmp_path / "store")
    start = stage(store, "start")
    sft = stage(store, "sft", {"start": start.key})
    policy = stage(store, "policy", {"policy": f"{sft.key}+0123", "data": "abc"})
    with Run.open(tmp_path / "a-seed0", {"name": "a"}, "name: a") as run:
        run.link("policy-1", policy)
        run.finish({"ended": "done"})
    stage(store, "reward")
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.name.split("-")[0] for path in (folder / "store").glob("[!.]*")}


def test_what_a_run_was_made_from_is_kept(runs: Path) -> None:
    actual = find_waste(runs)
    assert [waste.path.name.split("-")[0] for waste in actual.waste] == ["reward"]
    assert actual.runs == ["a-seed0"] and actual.bytes > 1000 and actual.kept > 3000
    delete(actual)
    assert names(runs) == {"start", "sft", "policy"}
    assert find_waste(runs).waste == []


def test_find_waste_keeps_what_a_replaced_run_linked(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(runs / "store")
    with Run.open(runs / "a-seed0", {"name": "a", "bound": 3}, "", replace=True) as run:
        run.link("policy-1", stage(store, "ppo"))
        run.finish({"ended": "done"})
    kept = find_waste(runs)
    assert [waste.path.name.split("-")[0] for waste in kept.waste] == ["reward"]
    assert 3000 < kept.replaced < kept.kept
    asked = irl_align(capsys, "prune", runs)
    assert "kept for replaced runs: 0.0 MB (--replaced lists it)" in asked.out
    ended = irl_align(capsys, "prune", runs, "--replaced", "--yes")
    assert "only replaced runs linked it" in ended.out
    assert names(runs) == {"ppo"}
    assert find_waste(runs).replaced == 0 and not (runs / "a-seed0/replaced.json").exists()


def checkpoint(work: Path, number: int, sealed: bool = True) -> Path:
    folder = work / f"scratch/checkpoint-{number}"
    folder.mkdir(parents=True)
    (folder / "optimizer.bin").write_bytes(b"0" * 100)
    if sealed:
        seal(folder)
    return folder


def test_unfinished_work_is_kept_while_a_run_wants_it(runs: Path) -> None:
    work = runs / "store/.work/ppo-0123456789abcdef"
    old, newest = checkpoint(work, 2), checkpoint(work, 4)
    half = checkpoint(work, 6, sealed=False)
    damaged = runs / "store/.work/sft-0123.damaged"
    damaged.mkdir()
    with Run.open(runs / "b-seed0", {"name": "b"}, "name: b"):
        pass
    actual = find_waste(runs)
    why = {waste.path: waste.why for waste in actual.waste if "reward" not in waste.path.name}
    superseded = "superseded by checkpoint-4"
    assert why == {old: superseded, half: superseded, damaged: "damaged, and built again"}
    assert actual.runs == ["a-seed0", "b-seed0 (unfinished)"]
    delete(actual)
    assert newest.exists() and not old.exists() and not half.exists() and not damaged.exists()

    (runs / "b-seed0/summary.json").write_text("{}")
    (waste,) = find_waste(runs).waste
    assert (waste.path, waste.why) == (work, "unfinished, and every run is finished")


HOLD = """
    import sys
    from pathlib import Path
    from irl_align.utils.files import locked

    with locked(Path(sys.argv[1]), print):
        print("held", flush=True)
        sys.stdin.readline()
"""


def test_what_is_in_use_is_left_alone(runs: Path) -> None:
    work = runs / "store/.work/ppo-0123456789abcdef"
    work.mkdir()
    (work / "model.bin").write_bytes(b"0")
    actual = find_waste(runs)
    for lock, refused in (
        (work.with_name(work.name + ".lock"), False),
        (runs / "a-seed0/.lock", True),
    ):
        holder = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(HOLD), str(lock)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            if refused:
                with pytest.raises(UserError, match=f"a-seed0 is in use by process {holder.pid}"):
                    holding(runs).__enter__()
            else:
                delete(actual)
                assert work.exists() and "reward" not in names(runs)
        finally:
            holder.kill()
            holder.communicate()


def test_the_command_asks_before_it_deletes(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--dry-run"]):
        ended = irl_align(capsys, "prune", runs, *options)
        assert ended.status == 0 and "no run links it" in ended.out
        assert ended.out.endswith("nothing was deleted; --yes deletes it\n")
    assert "reward" in names(runs)
    assert "expected one of them" in the_line(
        irl_align(capsys, "prune", runs, "--yes", "--dry-run")
    )
    ended = irl_align(capsys, "prune", runs / "store", "--yes")
    assert ended.status == 0 and "deleted: " in ended.out and "reward" not in names(runs)
    assert "not needed: 0.0 MB" in irl_align(capsys, "prune", runs).out


def test_announce_disk_logs_the_need_and_refuses_too_small_a_disk(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tiny_recipe(tmp_path)
    caplog.set_level("INFO", "irl_align")
    announce_disk(recipe)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "irl_align.training.plan.disk"]
    need = re.fullmatch(r"disk: the run needs about (\d+) MB for .*, [\d,]+ MB are free", line)
    assert need is not None and 0 < int(need[1]) < 20  # 0.6 MB of stages, 1 MB of checkpoints
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    out = f"output_dir={tmp_path / 'runs'}"
    message = the_line(irl_align(capsys, "train", write_recipe(tmp_path), out))
    assert message.startswith("disk: the run needs about ") and "0 MB are free" in message
    assert not (tmp_path / "runs").exists()


def test_announce_disk_counts_only_what_an_interrupted_run_still_needs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "irl_align.training.plan.disk")
    train(tiny_recipe(tmp_path, "loop.iterations=0"))
    announce_disk(tiny_recipe(tmp_path, "loop.iterations=0"))
    assert "the run needs about 0 MB" in caplog.text
    announce_disk(tiny_recipe(tmp_path, "loop.iterations=0", "seed=1"))
    assert "the run needs about 0 MB" not in caplog.records[-1].getMessage()


def test_no_store_and_a_damaged_run(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no store of stages"):
        runs_folder(tmp_path / "none")
    (runs / "a-seed0/stages.json").write_text("{")
    with pytest.raises(UserError, match=r"stages\.json: found no JSON"):
        find_waste(runs)
