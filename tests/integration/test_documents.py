"""Documents: links lead to files and headings, and the catalogue lists every recipe."""

import re
from pathlib import Path

import pytest

from irl_align.config.resources import recipe_files, recipes_dir

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


def test_catalogue_lists_every_recipe_once() -> None:
    catalogue = (recipes_dir() / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\| `([\w./-]+\.yaml)`", catalogue)
    assert sorted(listed) == [path.relative_to(recipes_dir()).as_posix() for path in recipe_files()]
