"""The E2E tables of README.md and recipes/results are those of the recorded runs."""

import re
import shutil
import tarfile
from pathlib import Path

import pytest
from benchmarks import headline

README = Path("README.md")
RESULTS = Path("recipes/results/e2e-main-comparison.md")


def test_tables_in_the_documents_are_those_of_the_recorded_runs() -> None:
    assert f"\n\n{headline.readme_table()}\n\n" in README.read_text(encoding="utf-8")
    results = RESULTS.read_text(encoding="utf-8")
    assert f"\n\n{headline.full_table()}\n\n" in results
    assert f"\n\n{headline.differences_table()}\n\n" in results


def test_every_policy_has_five_seeds() -> None:
    recorded = headline.comparison()
    assert recorded.seeds == [1, 2, 3, 4, 5]
    assert set(headline.POLICIES) <= {headline.short(row.label) for row in recorded.rows}
    for row in recorded.rows:
        assert sorted(row.values[f"{headline.ERRORS}@1"]) == recorded.seeds, row.label
    assert not recorded.missing and not recorded.differences


def test_recorded_runs_name_no_folder_of_a_machine() -> None:
    with tarfile.open(headline.ARCHIVE) as tar:
        names = tar.getnames()
    runs = {name.partition("/")[0] for name in names}
    assert len(runs) == len(headline.comparison().runs)
    assert sorted(names) == sorted(f"{run}/{file}" for run in runs for file in headline.FILES)
    with headline.extracted() as folder:
        for name in names:
            text = (folder / name).read_text(encoding="utf-8")
            absolute = re.search(r'(?<=["\' ])/\w[^"\' ]*', text)
            assert absolute is None, f"{name}: {absolute}"


def test_record_adds_a_run_without_its_folders(tmp_path: Path) -> None:
    archive = tmp_path / "recorded.tar.gz"
    with headline.extracted() as folder:
        first, second = sorted(folder.iterdir())[:2]
        shutil.copytree(second, tmp_path / second.name)
        run = tmp_path / "runs" / first.name
        shutil.copytree(first, run)
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
    mine = recipe.replace("output_dir: runs", "output_dir: /home/me/runs")
    mine = mine.replace("path: ../data/e2e", "path: /home/me/e2e")
    assert mine.count("/home/me") == 2
    (run / "recipe.yaml").write_text(mine, encoding="utf-8")
    headline.record([tmp_path / second.name], archive)
    headline.record([run], archive)
    with headline.extracted(archive) as folder:
        assert {path.name for path in folder.iterdir()} == {first.name, second.name}
        assert (folder / run.name / "recipe.yaml").read_text(encoding="utf-8") == recipe
    (run / "summary.json").unlink()
    with pytest.raises(SystemExit, match=r"found no summary\.json, expected a finished run"):
        headline.record([run], archive)
