"""Facts of a finished run, its derived licence, and intervals of ratios."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.shared_runs import shared_run

from irl_align.errors import UserError
from irl_align.hub.facts import Facts, combine, derive


def facts_with(recipe: dict[str, Any], front: dict[str, Any]) -> Facts:
    facts = Facts.of(shared_run("contrast").folder)
    view = replace(facts.view, recipe={**facts.view.recipe, **recipe})
    return replace(facts, view=view, front=front)


def test_facts_name_a_base_model_of_the_hub(tmp_path: Path) -> None:
    recipe = {"model": {"path": "org/base", "revision": None, "from_scratch": None}}
    facts = facts_with(recipe, {"license": "mit"})
    assert facts.base_model == facts.base_hub_id == "org/base"
    assert derive(facts).name == "unknown"  # offline: its card cannot be read


def test_recipe_text_has_no_paths_and_no_servers(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    changes = {
        "data": {"card": str(tmp_path / "own.md"), "path": str(tmp_path), "share": 0.5},
        "model": {"path": str(tmp_path / "base"), "chat_template": "/home/me/chat.jinja"},
        "generation": {"server": {"urls": ["http://10.0.0.1:8000"], "port": None}, "top_p": 1.0},
        "reward": {"preferences": {"card": "/data/theirs.md", "path": "/data/gone"}},
        "output_dir": "runs",
    }
    published = yaml.safe_load(facts_with(changes, {}).recipe_text())
    assert {name: published.get(name) for name in changes} == {
        "data": {"card": "own.md", "path": None, "share": 0.5},
        "model": {"path": "base", "chat_template": "chat.jinja"},
        "generation": {"server": {"urls": [], "port": None}, "top_p": 1.0},
        "reward": {"preferences": {"card": "theirs.md", "path": "gone"}},
        "output_dir": None,
    }


def test_facts_of_a_run_whose_data_card_is_gone(tmp_path: Path) -> None:
    facts = facts_with({"data": {"card": str(tmp_path / "gone.md"), "path": None}}, {})
    assert facts.data_name == "gone"
    with pytest.raises(UserError, match="found no such folder"):
        Facts.of(tmp_path / "none")


@pytest.mark.parametrize(
    ("data", "base", "expected"),
    [
        ("mit", "apache-2.0", "apache-2.0"),  # permissive: the base model's
        ("cc-by-sa-4.0", "apache-2.0", "cc-by-sa-4.0"),  # the restrictive one
        ("mit", "llama3.1", "llama3.1"),
        ("llama3.1", "llama3.1", "llama3.1"),
        ("cc-by-nc-4.0", "llama3.1", "other"),  # both
        ("", "mit", "unknown"),
        ("mit", "", "unknown"),
    ],
)
def test_combine_prefers_the_restrictive_licence(data: str, base: str, expected: str) -> None:
    actual = combine(data, base, True, "facts")
    assert actual.name == expected
    assert actual.other == ("llama3.1 + cc-by-nc-4.0" if expected == "other" else None)


def test_combine_without_a_base_gives_the_licence_of_the_data() -> None:
    assert combine("other", "mit", True, "").other == "that-of-the-sources"
    assert combine("cc-by-sa-4.0", "", False, "").name == "cc-by-sa-4.0"
    assert combine("", "", False, "").name == "unknown"


def test_derive_reads_the_card_of_a_local_base_model(tmp_path: Path) -> None:
    recipe = {"model": {"path": str(tmp_path), "revision": None, "from_scratch": None}}
    facts = facts_with(recipe, {"license": "mit"})
    assert derive(facts).name == "unknown" and facts.base_model == tmp_path.name
    assert facts.base_hub_id is None
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n# Base\n")
    assert derive(facts).name == "gemma"
    assert derive(facts, "cc0-1.0").name == "cc0-1.0"
    assert "chosen by the publisher" in derive(facts, "cc0-1.0").why
