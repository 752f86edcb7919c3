"""Recipes and data cards are found in a checkout and in an installed package."""

from pathlib import Path

import pytest

from irl_align.config import resources

ROOT = Path(__file__).resolve().parents[2]


def test_a_checkout_uses_its_own_folders() -> None:
    assert resources.recipes_dir() == ROOT / "recipes"
    assert resources.data_cards_dir() == ROOT / "data_cards"


def test_an_installed_package_uses_the_copies_inside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "irl_align"
    for folder in ("_recipes", "_data_cards", "../recipes"):
        (package / folder).mkdir(parents=True)
    monkeypatch.setattr(resources, "PACKAGE", package)
    assert resources.recipes_dir() == package / "_recipes"
    assert resources.data_cards_dir() == package / "_data_cards"
