"""Stages are built once, committed whole, resumed after a kill; run folders stay readable."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from irl_align.errors import TryAgain, UserError
from irl_align.policy.roles import SFT
from irl_align.training import store as stages
from irl_align.training.run_folder import Run, read_replaced
from irl_align.training.store import Stage, Store, environment, stage_key

ROOT = Path(__file__).resolve().parents[2]


def build_text(text: str = "hello") -> Callable[[Path], dict[str, Any]]:
    def build(work: Path) -> dict[str, Any]:
        (work / "out").mkdir(exist_ok=True)
        (work / "out" / "text.txt").write_text(text)
        return {"loss": 0.5, "bad": math.nan}

    return build


def never(work: Path) -> None:
    raise AssertionError("built again")


# --- keys -----------------------------------------------------------------------------------------


def test_key_is_the_hash_of_canonical_json() -> None:
    # sha256sum of {"format":2,"inputs":{"data":"abc"},"name":"sft","settings":{"lr":0.001,
    # "name":"\u00e9","steps":[1,2]}}, on one line. It may change only together with FORMAT.
    options = {"steps": (1, 2), "name": "é", "lr": 0.001}
    assert stage_key("sft", options, {"data": "abc"}) == "51156ab08b168943"


def test_settings_without_a_json_form_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        stage_key("sft", {"lr": math.nan}, {})
    with pytest.raises(TypeError, match="Path"):
        stage_key("sft", {"file": Path("x")}, {})


# --- building and reusing -------------------------------------------------------------------------


def test_built_once_then_reused(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    first = store.stage("sft", {"lr": 1.0}, {"data": "abc"}, build_text())
    again = store.stage("sft", {"lr": 1.0}, {"data": "abc"}, never)
    assert (first.reused, again.reused) == (False, True)
    assert first.path == again.path == tmp_path / "store" / f"sft-{first.key}"
    assert (again.path / "out" / "text.txt").read_text() == "hello"
    assert first.metrics == again.metrics == {"loss": 0.5, "bad": None}


def test_the_record_says_where_the_stage_came_from(tmp_path: Path) -> None:
    stage = Store(tmp_path).stage("sft", {"lr": 1.0}, {"data": "abc"}, build_text())
    record = json.loads((stage.path / "stage.json").read_text())
    assert record == stage.record
    assert (record["name"], record["key"]) == ("sft", stage.key)
    assert (record["settings"], record["inputs"]) == ({"lr": 1.0}, {"data": "abc"})
    assert record["files"] == {"out/text.txt": 5}
    assert record["resumed"] is False
    assert record["seconds"] >= 0
    assert record["peak_rss_mib"] > 5  # a bare interpreter has more
    assert record["environment"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers", "trl", "datasets", "irl_align"} <= set(environment())


@pytest.mark.parametrize(
    ("name", "options", "inputs"),
    [("sft", {"lr": 2.0}, {"data": "a"}), ("sft", {"lr": 1.0}, {"data": "b"}), ("x", {}, {})],
)
def test_other_settings_or_inputs_are_another_stage(
    tmp_path: Path, name: str, options: dict[str, Any], inputs: dict[str, str]
) -> None:
    store = Store(tmp_path)
    one = store.stage("sft", {"lr": 1.0}, {"data": "a"}, build_text("one"))
    two = store.stage(name, options, inputs, build_text("two"))
    assert not two.reused
    assert (one.path / "out/text.txt").read_text() == "one"
    assert (two.path / "out/text.txt").read_text() == "two"


def test_scratch_is_deleted_at_the_commit(tmp_path: Path) -> None:
    def build(work: Path) -> None:
        (work / "scratch" / "checkpoint-1").mkdir(parents=True)
        (work / "scratch" / "checkpoint-1" / "optimizer.bin").write_bytes(b"0" * 10)
        (work / "model.bin").write_bytes(b"12")

    stage = Store(tmp_path).stage("sft", {}, {}, build)
    assert sorted(path.name for path in stage.path.iterdir()) == ["model.bin", "stage.json"]
    assert stage.record["files"] == {"model.bin": 2}
    assert stage.metrics == {}


def truncate(stage: Stage) -> None:
    (stage.path / "out/text.txt").write_text("he")


def lose_file(stage: Stage) -> None:
    (stage.path / "out/text.txt").unlink()


def lose_record(stage: Stage) -> None:
    (stage.path / "stage.json").unlink()


def cut_record(stage: Stage) -> None:
    (stage.path / "stage.json").write_text('{"name": "sf')


def swap_record(stage: Stage) -> None:
    (stage.path / "stage.json").write_text('{"key": "0123"}')


def flip_a_bit(stage: Stage) -> None:
    (stage.path / "out/text.txt").write_text("hellp")


def link_out(stage: Stage) -> None:
    path = stage.path / "out/text.txt"
    elsewhere = stage.path.parent / "elsewhere.txt"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def change_a_number(stage: Stage) -> None:
    path = stage.path / "stage.json"
    path.write_text(path.read_text().replace('"loss": 0.5', '"loss": 0.4'))


@pytest.mark.parametrize(
    ("damage", "file", "actual"),
    [
        (truncate, "out/text.txt", "found 2 bytes, expected 5 bytes"),
        (lose_file, "out/text.txt", "found no such file, expected 5 bytes"),
        (flip_a_bit, "out/text.txt", "found other bytes than the stage wrote"),
        (link_out, "out/text.txt", "found no such file, expected 5 bytes"),
        (lose_record, "stage.json", "found no such file, expected the record"),
        (cut_record, "stage.json", "found no JSON"),
        (swap_record, "stage.json", "found a record that is not that of stage "),
        (change_a_number, "stage.json", "found a record that is not that of stage "),
    ],
)
def test_stage_logs_moves_and_rebuilds_a_damaged_stage(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Stage], None],
    file: str,
    actual: str,
) -> None:
    store = Store(tmp_path / "store")
    stage = store.stage("sft", {}, {}, build_text())
    damage(stage)
    left = (stage.path / "out/text.txt").exists()
    again = store.stage("sft", {}, {}, build_text())
    aside = tmp_path / f"store/.work/{stage.path.name}.damaged"
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"{stage.path / file}: {actual}") and "\n" not in message
    assert message.endswith(f"; the stage is built again, and the damaged one is moved to {aside}")
    assert (again.reused, again.path) == (False, stage.path)
    assert (again.path / "out/text.txt").read_text() == "hello"
    assert (aside / "out/text.txt").exists() == left
    assert store.stage("sft", {}, {}, never).reused


def test_a_fault_that_may_not_come_again_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def build(work: Path) -> dict[str, Any]:
        if not (work / "checkpoint").exists():
            (work / "checkpoint").write_text("kept")
            raise TryAgain("update 3: loss is nan")
        return {"found": (work / "checkpoint").read_text()}

    assert Store(tmp_path).stage("ppo", {}, {}, build).metrics == {"found": "kept"}
    expected = "stage ppo: update 3: loss is nan; trying again from its last checkpoint"
    assert [record.getMessage() for record in caplog.records] == [expected]


# --- failures, kills and a full disk --------------------------------------------------------------


def test_an_error_or_interrupt_passes_and_keeps_the_work(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def interrupted(work: Path) -> None:
        (work / "half").write_text("kept")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.stage("sft", {}, {}, interrupted)
    assert [path.name for path in tmp_path.iterdir()] == [".work"]

    def go_on(work: Path) -> dict[str, Any]:
        return {"found": (work / "half").read_text()}

    stage = store.stage("sft", {}, {}, go_on)
    assert stage.metrics == {"found": "kept"}
    assert stage.record["resumed"] is True


# Sums 1 to 5 with a checkpoint after each step, and appends each step done to steps.log. The
# process kills itself with SIGKILL at the point that argv names.
SUMMING = """
    import json, os, signal, sys
    from pathlib import Path
    from irl_align.training import store as stages

    root, point = Path(sys.argv[1]), sys.argv[2]

    def die_at(here):
        if here == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def build(work):
        checkpoint = work / "scratch" / "checkpoint.json"
        step, total = json.loads(checkpoint.read_text()) if checkpoint.exists() else (0, 0)
        while step < 5:
            step, total = step + 1, total + step + 1
            with open(root / "steps.log", "a") as log:
                log.write(f"{step}\\n")
            die_at(f"before-checkpoint-{step}")
            stages.atomic_write(checkpoint, json.dumps([step, total]))
            die_at(f"after-checkpoint-{step}")
        with open(work / "total.txt", "w") as file:
            file.write(str(total)[0])
            file.flush()
            die_at("half-an-artefact")
            file.write(str(total)[1:])
        return {"total": total}

    def dying(function, point):
        def call(*args, **options):
            die_at("before-" + point)
            result = function(*args, **options)
            die_at("after-" + point)
            return result
        return call

    stages.to_json = dying(stages.to_json, "record-is-written")
    os.rename = dying(os.rename, "rename")
    stages._commit = dying(stages._commit, "commit")
    stage = stages.Store(root / "store").stage("sum", {"to": 5}, {}, build)
    print(json.dumps([stage.metrics, stage.record["resumed"], stage.reused]))
"""


def python(code: str, *args: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes, **options)


@pytest.mark.parametrize(
    ("point", "steps", "resumed"),
    [
        ("never", "12345", False),
        ("before-checkpoint-1", "112345", False),  # nothing had been kept yet
        ("after-checkpoint-2", "12345", True),
        ("before-checkpoint-4", "123445", True),
        ("half-an-artefact", "12345", True),
        ("before-record-is-written", "12345", True),
        ("before-commit", "12345", False),  # the record of the first try is committed
        ("before-rename", "12345", False),
        ("after-rename", "12345", False),
    ],
)
def test_stage_resumes_a_killed_build(
    tmp_path: Path, point: str, steps: str, resumed: bool
) -> None:
    first = python(SUMMING, tmp_path, point)
    first.communicate()
    assert first.returncode == (0 if point == "never" else -signal.SIGKILL)
    second = python(SUMMING, tmp_path, "never")
    out, err = second.communicate()
    assert second.returncode == 0, err
    assert json.loads(out) == [{"total": 15}, resumed, point in ("never", "after-rename")]
    assert (tmp_path / "steps.log").read_text().split() == list(steps)
    (folder,) = (tmp_path / "store").glob("sum-*")
    assert sorted(path.name for path in folder.iterdir()) == ["stage.json", "total.txt"]
    assert (folder / "total.txt").read_text() == "15"


def test_a_work_folder_damaged_after_its_record_is_built_again(tmp_path: Path) -> None:
    first = python(SUMMING, tmp_path, "before-rename")
    first.communicate()
    (work,) = (tmp_path / "store" / ".work").glob("sum-*/")
    (work / "total.txt").write_text("1")
    second = python(SUMMING, tmp_path, "never")
    assert json.loads(second.communicate()[0]) == [{"total": 15}, True, False]


SAFETENSORS = "Error while serializing: I/O error: No space left on device (os error 28)"


def wrapped(inner: Exception, outer: Exception) -> None:
    try:
        raise inner
    except Exception:
        raise outer  # noqa: B904 - as torch.save does it: the errno is in the context only


def write_to_a_full_device() -> None:
    with open("/dev/full", "w") as file:
        file.write("x")


@pytest.mark.parametrize(
    "fail",
    [
        pytest.param(
            write_to_a_full_device,
            marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only"),
        ),
        lambda: wrapped(OSError(errno.EDQUOT, "Disk quota exceeded"), RuntimeError("torch")),
        lambda: wrapped(ValueError("other"), RuntimeError(SAFETENSORS)),
    ],
    ids=["device", "quota", "safetensors"],
)
def test_stage_reports_a_full_disk_and_loses_nothing(
    tmp_path: Path, fail: Callable[[], None]
) -> None:
    store = Store(tmp_path)

    def build(work: Path) -> None:
        (work / "checkpoint").write_text("kept")
        fail()

    with pytest.raises(UserError) as error:
        store.stage("sft", {}, {}, build)
    message = str(error.value)
    assert message.startswith(f"stage sft: no space left for {tmp_path} (")
    assert message.endswith(
        " MiB free); finished work is not lost: free space and run the same command again"
    )

    def go_on(work: Path) -> dict[str, Any]:
        return {"found": (work / "checkpoint").read_text()}

    assert store.stage("sft", {}, {}, go_on).metrics == {"found": "kept"}


def test_a_full_disk_is_known_where_the_error_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def numpy_says(work: Path) -> None:
        raise OSError("1000000 requested and 131056 written")

    with pytest.raises(OSError, match="requested"):
        Store(tmp_path).stage("sft", {}, {}, numpy_says)
    full = shutil.disk_usage(tmp_path)._replace(free=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match="no space left"):
        Store(tmp_path).stage("sft", {}, {}, numpy_says)


def test_stage_reports_a_disk_that_is_full_at_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)

    def rename(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(stages.os, "rename", rename)
        with pytest.raises(UserError, match="stage sft: no space left"):
            store.stage("sft", {}, {}, build_text())
    stage = store.stage("sft", {}, {}, never)  # whole, only not in its place yet
    assert (stage.path / "out/text.txt").read_text() == "hello"


def test_other_errors_of_a_build_pass_unchanged(tmp_path: Path) -> None:
    def build(work: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        Store(tmp_path).stage("sft", {}, {}, build)


# --- two processes --------------------------------------------------------------------------------

# Says "building", then waits for a line on stdin before it finishes.
SLOW_STAGE = """
    import sys
    from pathlib import Path
    from irl_align.training.store import Store

    def build(work):
        print("building", flush=True)
        sys.stdin.readline()
        (work / "out.txt").write_text("done")

    stage = Store(Path(sys.argv[1])).stage("slow", {}, {}, build)
    print(stage.reused)
"""


@contextmanager
def first_and_waiting(root: Path) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[str]]]:
    """One process inside its build, and a second that has said that it waits for the first."""
    first = python(SLOW_STAGE, root)
    second = None
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "building\n"
        second = python(SLOW_STAGE, root)
        assert second.stderr is not None
        waiting = f"stage slow: waiting for process {first.pid}, which builds it\n"
        assert second.stderr.readline() == waiting
        yield first, second
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
                process.communicate()


def test_the_second_process_waits_and_reuses(tmp_path: Path) -> None:
    with first_and_waiting(tmp_path) as (first, second):
        assert first.communicate("go\n")[0] == "False\n"
        assert second.communicate(timeout=60)[0] == "True\n"


def test_the_second_process_takes_over_when_the_first_is_killed(tmp_path: Path) -> None:
    with first_and_waiting(tmp_path) as (first, second):
        first.kill()
        assert second.communicate("go\n", timeout=60)[0] == "building\nFalse\n"


HOLD_RUN = """
    import sys
    from pathlib import Path
    from irl_align.training.run_folder import Run

    with Run.open(Path(sys.argv[1]), {"name": "x"}, "name: x") as run:
        run.log("sft", {"loss": 1.0})
        print("open", flush=True)
        sys.stdin.readline()
"""


def test_a_run_in_use_is_refused_and_a_killed_one_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "x-seed0"
    holder = python(HOLD_RUN, folder)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with (
            pytest.raises(UserError, match=f"x-seed0 is in use by process {holder.pid}: "),
            Run.open(folder, {"name": "y"}, "name: y"),
        ):
            raise AssertionError("opened twice")
        assert Run.load(folder).recipe == {"name": "x"}
    finally:
        holder.kill()
        holder.communicate()
    with Run.open(folder, {"name": "x"}, "name: x"):
        assert Run.load(folder).metrics == [{"key": "sft", "loss": 1.0}]


# --- the run folder -------------------------------------------------------------------------------


def open_run(folder: Path, **recipe: Any) -> Any:
    return Run.open(folder, {"name": "x", **recipe}, "name: x  # as written\n")


def test_a_run_reads_back_what_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x-seed0"
    stage = Store(tmp_path / "runs" / "stages").stage("sft", {}, {}, build_text())
    with open_run(folder, seed=0, price="£") as run:
        assert Run.load(folder).summary is None
        run.link(SFT, stage)
        run.log("sft", {"loss": 1.5, "entropy": math.inf})
        run.log("iteration-0", {"margin": [1.0, math.nan]})
        run.save_answers(0, 0.7, [{"prompt": "é\u2028", "completion": "£5\n"}])
        run.finish({"accuracy": 0.75})
    view = Run.load(folder)
    assert view.recipe == {"name": "x", "seed": 0, "price": "£"}
    assert (folder / "recipe.source.yaml").read_text() == "name: x  # as written\n"
    assert view.metrics == [
        {"key": "sft", "loss": 1.5, "entropy": None},
        {"key": "iteration-0", "margin": [1.0, None]},
    ]
    rows = [{"prompt": "é\u2028", "completion": "£5\n"}]
    assert view.samples() == {"policy-0-t0.7": rows}
    assert view.answers(0) == {0.7: rows} and view.answers(1) == {}
    assert view.summary == {"accuracy": 0.75}
    linked = view.stages["sft"]
    assert (linked["name"], linked["key"]) == ("sft", stage.key)
    assert linked["path"] == f"../stages/sft-{stage.key}"
    assert (folder / linked["path"] / "stage.json").is_file()


def test_a_rerun_updates_lines_in_place(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.log("a", {"loss": 1})
        run.log("b", {"loss": 2})
    with open_run(tmp_path) as run:
        run.log("b", {"loss": 3})
        run.log("a", {"accuracy": 4})
        run.log("c", {"loss": 5})
        with pytest.raises(ValueError, match="'key'"):
            run.log("d", {"key": "e"})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"key": "a", "accuracy": 4}',
        '{"key": "b", "loss": 3}',
        '{"key": "c", "loss": 5}',
    ]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers())))
def test_lines_are_in_the_order_of_their_first_insertion(
    tmp_path_factory: pytest.TempPathFactory, logged: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    with open_run(folder) as run:
        for key, value in logged:
            run.log(key, {"value": value})
    order = sorted({key for key, _ in logged}, key=[key for key, _ in logged].index)
    last = {key: value for key, value in logged}  # noqa: C416 - the last of each key
    assert Run.load(folder).metrics == [{"key": key, "value": last[key]} for key in order]


def test_run_open_refuses_to_overwrite_a_finished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "x-seed0"
    with open_run(folder, seed=0, reward={"loss": "linear", "bound": 5.0}) as run:
        run.log("iteration-3", {"loss": 1})
        run.save_answers(3, 1.0, [{"completion": "old"}])
        run.finish({"loss": 1})
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refusal = r"x-seed0: found a finished run with other settings \(reward.bound, price\); add "
    with (
        pytest.raises(UserError, match=refusal + r"name=\.\.\. or --replace$"),
        open_run(folder, seed=0, reward={"loss": "linear", "bound": 3.0}, price=1),
    ):
        raise AssertionError("opened")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with open_run(folder, seed=0, reward={"loss": "linear", "bound": 5.0}):
        assert Run.load(folder).summary == {"loss": 1}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("finished", [True, False])
def test_run_open_deletes_the_results_of_a_replaced_recipe_and_remembers_its_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: bool
) -> None:
    folder, store = tmp_path / "x-seed0", Store(tmp_path / "store")
    first, second = (
        store.stage("sft", {}, {}, build_text()),
        store.stage("ppo", {}, {}, build_text()),
    )
    with open_run(folder, seed=0) as run:
        run.link(SFT, first)
        run.save_answers(3, 1.0, [{"completion": "old"}])
        if finished:
            run.finish({"loss": 1})
    with Run.open(folder, {"name": "x", "seed": 1}, "", replace=finished) as run:
        run.link(SFT, second)
    note = f"run {folder}: the recipe has changed; the old one is now recipe.previous.yaml\n"
    assert capsys.readouterr().err == note
    assert yaml.safe_load((folder / "recipe.previous.yaml").read_text())["seed"] == 0
    view = Run.load(folder)
    assert view.recipe["seed"] == 1
    assert (view.metrics, view.summary, view.samples()) == ([], None, {})
    assert read_replaced(folder) == [f"../store/{first.path.name}"]
    with Run.open(folder, {"name": "x", "seed": 2}, ""):
        pass
    assert read_replaced(folder) == [f"../store/{s.path.name}" for s in (first, second)]


def test_run_link_remembers_the_stage_that_had_the_role_before(tmp_path: Path) -> None:
    folder, store = tmp_path / "x-seed0", Store(tmp_path / "store")
    first, second = (
        store.stage("sft", {}, {}, build_text()),
        store.stage("ppo", {}, {}, build_text()),
    )
    with open_run(folder) as run:
        run.link(SFT, first)
        run.link(SFT, first)
        assert read_replaced(folder) == []
        run.link(SFT, second)
    assert read_replaced(folder) == [f"../store/{first.path.name}"]


def test_run_open_counts_inputs_as_settings(tmp_path: Path) -> None:
    folder = tmp_path / "ppo-seed0"
    with Run.open(folder, {"name": "ppo"}, "", inputs={"reward": "abc"}) as run:
        run.finish({})
    with Run.open(folder, {"name": "ppo"}, "", inputs={"reward": "abc"}):
        assert Run.load(folder).summary == {}
    with (
        pytest.raises(UserError, match=r"a finished run with other settings \(reward\); add name"),
        Run.open(folder, {"name": "ppo"}, "", inputs={"reward": "abd"}),
    ):
        raise AssertionError("opened")


def test_run_open_reports_a_full_disk(tmp_path: Path) -> None:
    folder = tmp_path / "x-seed0"
    with pytest.raises(UserError, match=r"^run x-seed0: no space left for "), open_run(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("name", "content", "actual"),
    [
        ("recipe.yaml", "a: [1", "recipe.yaml: found while parsing a flow sequence"),
        ("recipe.yaml", "- 1", "recipe.yaml: found no mapping, expected a recipe"),
        ("metrics.jsonl", '{"key": "a"}\n{"key', "metrics.jsonl:2: found '{\"key', expected a"),
        ("metrics.jsonl", '{"loss": 1}\n', "metrics.jsonl:1: found no field key"),
        ("summary.json", "", "summary.json: found no JSON"),
        ("summary.json", "[1]", "summary.json: found a JSON list, expected a summary"),
        ("stages.json", "\udcff", "stages.json: found no JSON"),
    ],
)
def test_a_damaged_run_names_the_file(tmp_path: Path, name: str, content: str, actual: str) -> None:
    with open_run(tmp_path) as run:
        run.log("a", {"loss": 1})
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as error:
        Run.load(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/{actual}")
    assert "delete this file and run the recipe again" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_sample_file_names_the_line(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.save_answers(0, 1.0, [{"completion": "a"}])
    (tmp_path / "samples/policy-0-t1.jsonl").write_text('{"completion": "a"}\n[]\n')
    with pytest.raises(
        UserError, match=r"policy-0-t1\.jsonl:2: found '\[\]', expected a JSON object"
    ):
        Run.load(tmp_path).samples()


def test_run_load_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing: found no such folder, expected the folder"):
        Run.load(tmp_path / "missing")
    with pytest.raises(UserError, match=r"found no recipe\.yaml, expected the folder of a run"):
        Run.load(tmp_path)
