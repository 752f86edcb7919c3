"""The README's E2E tables are what the recorded runs say."""

import re
import shutil
from pathlib import Path

import pytest
from benchmarks import headline

README = Path("README.md")


def test_the_readme_has_the_tables_of_the_recorded_runs() -> None:
    told = README.read_text(encoding="utf-8")
    first, second = "\n".join(headline.tables()).split("\n\n")
    assert first.count("\n") == len(headline.POLICIES) + 1
    assert second.count("\n") == len(headline.AGAINST) + 1
    assert f"\n\n{first}\n\n" in told and f"\n\n{second}\n\n" in told
    for table in (first, second):  # and no other beside it
        assert told.count(table[: table.index("\n")]) == 1


def test_every_policy_has_every_seed() -> None:
    found = headline.comparison()
    assert found.seeds == [1, 2, 3, 4, 5]  # "five seeds" in the README
    assert set(headline.POLICIES) <= {headline.short(row.label) for row in found.rows}
    for row in found.rows:
        assert sorted(row.values[f"{headline.ERRORS}@1"]) == found.seeds, row.label
    assert not found.missing and not found.differences


def test_recorded_runs_name_no_machine() -> None:
    runs = sorted(headline.RECORDED.iterdir())
    assert len(runs) == len(headline.comparison().runs)
    for run in runs:
        assert sorted(path.name for path in run.iterdir()) == sorted(headline.FILES)
        for path in run.iterdir():
            absolute = re.search(r'(?<=["\' ])/\w[^"\' ]*', path.read_text(encoding="utf-8"))
            assert absolute is None, f"{path}: {absolute}"


def test_a_run_is_recorded_without_its_folders(tmp_path: Path) -> None:
    one = sorted(headline.RECORDED.iterdir())[0]
    run = tmp_path / "runs" / one.name
    shutil.copytree(one, run)
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
    mine = recipe.replace("output_dir: runs", "output_dir: /home/me/runs")
    mine = mine.replace("path: ../data/e2e", "path: /home/me/e2e")
    assert mine.count("/home/me") == 2
    (run / "recipe.yaml").write_text(mine, encoding="utf-8")
    headline.record([run], tmp_path / "kept")
    kept = tmp_path / "kept" / one.name
    assert (kept / "recipe.yaml").read_text(encoding="utf-8") == recipe
    (run / "summary.json").unlink()
    with pytest.raises(SystemExit, match=r"found no summary\.json, expected a finished run"):
        headline.record([run], tmp_path / "kept")
