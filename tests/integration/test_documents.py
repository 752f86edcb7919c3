"""Documents: links lead to files and headings, and the catalogue lists every recipe."""

import re
from pathlib import Path

import pytest
from support.tiny_runs import metrics, tiny_recipe

from irl_align.config.resources import recipe_files, recipes_dir
from irl_align.training.train import train

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (".", "docs", "recipes", "recipes/results", "data_cards")
    for path in (ROOT / folder).glob("*.md")
)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    own = ROOT / page
    for link in re.findall(r"\]\(([^)\s]+)\)", own.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        target = own.parent / path if path else own
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_files_named_on_a_page_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in re.findall(r"`((?:irl_align|tests)/[a-z0-9_/]+\.(?:py|gz))`", text):
        assert (ROOT / name).exists(), f"{page}: {name}"


def test_reward_functions_of_the_guide_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = (ROOT / "docs/guide.md").read_text().partition("## Rewards of your own\n")[2]
    [source] = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.S)
    [override] = re.findall(r"'(reward\.functions=.*?)'", section)
    (tmp_path / "my_rewards.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    update = "policy_update={use: select, n: 2}"
    alone = ("reward.kind=functions", "reward.args={}", "reward.schedule={}")
    result = train(tiny_recipe(tmp_path, *alone, update, override))
    parts = metrics(result.folder)["vitals/1"]["reward_parts"]
    assert set(parts) == {"my_rewards:brief", "my_rewards:new_words"}


def test_catalogue_lists_every_recipe_once() -> None:
    catalogue = (recipes_dir() / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\| `([\w./-]+\.yaml)`", catalogue)
    assert sorted(listed) == [path.relative_to(recipes_dir()).as_posix() for path in recipe_files()]
