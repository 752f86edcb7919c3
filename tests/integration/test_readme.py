"""The README's file map names exactly what is there."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def file_map(readme: str) -> dict[str, str]:
    """Path -> description, from the first fenced block after the heading ``## Files``."""
    block = re.search(r"^## Files\n.*?^```\w*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert block, "README.md has no fenced block after '## Files'"
    rows = [line.split(maxsplit=1) for line in block[1].splitlines() if line.strip()]
    assert all(len(row) == 2 for row in rows), "each line is: path  description"
    paths = [path for path, _ in rows]
    assert len(paths) == len(set(paths)), "a path is listed twice"
    return dict(rows)


def tracked_top_level() -> set[str]:
    """Top-level files, and folders with a slash; hidden ones aside, but for ``.ci/run``."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode != 0 or not listing.stdout:
        pytest.skip("not in a git checkout")
    tops = {
        top + ("/" if rest else "")
        for top, _, rest in (line.partition("/") for line in listing.stdout.splitlines())
    }
    return {top for top in tops if not top.startswith(".")} | {".ci/run"}


def test_file_map_reads_path_and_description() -> None:
    readme = "# x\n\n## Files\n\nText.\n\n```text\na.py   does a\nb/c.py does c well\n```\n"
    assert file_map(readme) == {"a.py": "does a", "b/c.py": "does c well"}


def test_file_map_names_every_file_and_no_other() -> None:
    modules = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "irl_align").rglob("*.py")
        if path.name != "__init__.py"
    }
    listed = set(file_map((ROOT / "README.md").read_text(encoding="utf-8")))
    assert listed == modules | tracked_top_level()


PAGES = ("README.md", "CHANGELOG.md", "dependencies.md", "recipes/README.md", "recipes/tutorial.md")


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    own = ROOT / page
    for link in re.findall(r"\]\(([^)\s]+)\)", own.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        to = own.parent / path if path else own
        assert to.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(to), f"{page}: {link}"
