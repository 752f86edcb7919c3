"""Folders of the recipes and data cards that ship with the package."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def recipes_dir() -> Path:
    """Folder of ``<task>/<method>.yaml``: the checkout's, or the installed package's copy."""
    return _shipped("recipes")


def recipe_files() -> list[Path]:
    """Every shipped recipe; the folder ``accelerate`` holds configs of `accelerate launch`."""
    paths = recipes_dir().rglob("*.yaml")
    return sorted(path for path in paths if path.parent.name != "accelerate")


def data_cards_dir() -> Path:
    """Folder of ``<name>.md`` data cards: the checkout's, or the installed package's copy."""
    return _shipped("data_cards")


def _shipped(name: str) -> Path:
    # Only the wheel has the copy inside the package (see pyproject.toml). The copy goes first: next
    # to an installed package, site-packages may hold another package's "recipes".
    inside = PACKAGE / f"_{name}"
    return inside if inside.is_dir() else PACKAGE.parent / name
