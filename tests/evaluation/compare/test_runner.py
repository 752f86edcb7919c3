"""`irl-align compare` as a user runs it: what runs, what is reused, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
from support.synthetic_runs import synthetic_run
from support.tiny_runs import RECIPE, irl_align, metrics, the_line

from irl_align.errors import UserError
from irl_align.evaluation.compare.runner import (
    Job,
    job_environment,
    next_job,
    plan,
    run_jobs,
)

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with sft.yaml (SFT alone) and best.yaml (one iteration)."""
    monkeypatch.chdir(tmp_path)
    write_recipes(tmp_path)
    return tmp_path


def write_recipes(folder: Path) -> None:
    texts = {
        "base": RECIPE,
        "sft": "extends: base.yaml\nname: tiny-sft\nloop: {iterations: 0}\n",
        "best": "extends: base.yaml\nname: tiny-best\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def test_plan_is_recipes_times_seeds(recipes: Path) -> None:
    arguments = ["sft.yaml", "best.yaml", "evaluation.prompts=5", "best:loop.iterations=2"]
    jobs = plan([*arguments, "tiny-sft:sft.args.num_train_epochs=1"], [4, 9])
    assert [(j.recipe.name, j.recipe.seed) for j in jobs] == [
        ("tiny-sft", 4),
        ("tiny-sft", 9),
        ("tiny-best", 4),
        ("tiny-best", 9),
    ]
    assert [j.recipe.loop.iterations for j in jobs] == [0, 0, 2, 2]
    assert {j.recipe.evaluation.prompts for j in jobs} == {5}
    assert [j.recipe.sft.args["num_train_epochs"] for j in jobs] == [1, 1, 4, 4]
    assert jobs[1].folder == Path("runs/tiny-sft-seed9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed=1"], "found no recipe"),
        (["sft.yaml", "sft.yaml"], "name: found 'tiny-sft', which sft.yaml also has"),
        (
            ["sft.yaml", "best.yaml", "name=x"],
            "best.yaml: name: found 'x', which sft.yaml also has",
        ),
        (["sft.yaml", "spin:seed=1"], "spin:seed=1: found no recipe 'spin'"),
        (["sft.yaml", "best.yaml", "best:output_dir=other"], "output_dir: found other and runs"),
        (
            ["sft.yaml", "--sweep", "data.path=x/a,x-a"],
            "--sweep: found data.path=x/a and data.path=x-a, whose runs would both be "
            "runs/tiny-sft-path-x-a-seed1",
        ),
        (["gone.yaml"], "gone.yaml"),
        (["sft.yaml", "loop.iteration=1"], "loop.iteration: unknown option"),
    ],
)
def test_compare_refuses_mistakes_before_any_work(
    arguments: list[str], message: str, recipes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in the_line(irl_align(capsys, "compare", *arguments))
    assert not (recipes / "runs").exists()


def test_jobs_of_another_seed_go_first_and_threads_are_divided(
    recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = plan(["sft.yaml", "best.yaml"], [1, 2])
    assert next_job(jobs, busy={1}) is jobs[1]
    assert next_job(jobs, busy={1, 2}) is jobs[0]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert [job_environment(n)["OMP_NUM_THREADS"] for n in (1, 2, 9)] == ["7", "3", "1"]


def test_compare_runs_shares_and_resumes(
    recipes: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    few = ("evaluation.prompts=4", "sft.args.num_train_epochs=1")
    arguments = ("compare", "sft.yaml", "best.yaml", *few, "--seed", "5", "--jobs", "2")
    caplog.set_level("INFO", logger="irl_align.evaluation.compare.runner")
    done = irl_align(capsys, *arguments)
    assert done.status == 0, done.err
    assert caplog.text.count("started") == 2
    runs = recipes / "runs"
    analysis = json.loads((runs / "comparison/comparison.json").read_text())
    assert [row["label"] for row in analysis["rows"]] == ["demonstrations", "SFT", "tiny-best"]
    assert [r["path"] for r in analysis["runs"]] == ["../tiny-sft-seed5", "../tiny-best-seed5"]
    # What a run's own records say; its SFT is built by one of the runs, and only once.
    records = [metrics(runs / f"tiny-{name}-seed5") for name in ("sft", "best")]
    stored = analysis["rows"][2]["values"]["slot_error_rate@1"]["5"]
    assert stored == records[1]["evaluation/1/t1"]["metrics"]["slot_error_rate"]
    assert sorted(r["stage/sft"]["reused"] for r in records) == [False, True]
    assert len(list((runs / "store").glob("sft-*"))) == 1

    # A finished comparison runs nothing; what is gone or of another recipe is not compared.
    caplog.clear()
    again = irl_align(capsys, *arguments)
    assert caplog.text.count("finished before") == 2 and "started" not in caplog.text
    assert again.out == done.out
    shutil.rmtree(runs / "tiny-best-seed5")
    partly = irl_align(capsys, *arguments, "--only-finished")
    assert partly.status == 0 and "started" not in caplog.text
    assert "tiny-best-seed5: no finished run of this recipe" in partly.out
    changed = the_line(irl_align(capsys, *arguments, "--only-finished", "evaluation.prompts=3"))
    assert changed == "compare: found no finished run, expected at least one"


def test_run_jobs_reports_a_failed_run(recipes: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="irl_align.evaluation.compare.runner")
    (job,) = plan(["sft.yaml"], [1])
    (recipes / "bad.yaml").write_text("extends: sft.yaml\nlerning: 1\n")
    bad = Job(Path("bad.yaml"), job.overrides, job.recipe)
    (line,) = run_jobs([bad], 1, recipes / "logs")
    assert line.startswith("tiny-sft-seed1: bad.yaml:2: lerning: unknown option")
    assert "failed after" in caplog.text
    assert "bad.yaml:2" in (recipes / "logs/tiny-sft-seed1.log").read_text()


def test_folders_of_runs_are_compared_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [synthetic_run(tmp_path, n, 1, [(0.3, 0.2), (0.2, 0.1)]) for n in ("a", "b")]
    stopped = synthetic_run(tmp_path, "c", 1, [(0.3, 0.2)], finished=False)
    ended = irl_align(capsys, "compare", *runs, stopped, "--baseline", "a")
    assert ended.status == 0, ended.err
    assert "against a, paired by seed" in ended.out
    assert "c-seed1: not finished" in " ".join(ended.out.split())  # a note may be wrapped
    assert (tmp_path / "comparison/comparison.csv").is_file()
    mixed = the_line(irl_align(capsys, "compare", *runs, "seed=1"))
    assert mixed == "compare: found runs and 'seed=1', expected only runs or only recipes"


def test_no_comparison_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped = synthetic_run(tmp_path, "c", 1, [(0.3, 0.2)], finished=False)
    line = the_line(irl_align(capsys, "compare", stopped))
    assert line == "compare: found no finished run, expected at least one"
    with pytest.raises(UserError, match="expected at least one YAML file"):
        plan([], [1])


def test_the_same_seed_twice_is_refused(recipes: Path) -> None:
    with pytest.raises(UserError, match="seeds: found 3 twice"):
        plan(["sft.yaml"], [3, 3])


@pytest.mark.parametrize("command", ["compare", "report", "evaluate"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    ended = irl_align(capsys, command, "--help")
    assert ended.status == 0 and f"Example: irl-align {command}" in " ".join(ended.out.split())
