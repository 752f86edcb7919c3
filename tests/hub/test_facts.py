"""Facts of a finished run, its derived licence, and intervals of ratios."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.shared_runs import shared_run

from irl_align.errors import UserError
from irl_align.hub.facts import Facts, combine, derive, ratio_interval


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


def test_ratio_interval_equals_the_interval_by_hand() -> None:
    # Accuracies of three prompts with 2, 1 and 3 pairs: 1 of 2, 1 of 1, 1 of 3; R = 1/2.
    # Residuals 0, 1/2, -1/2; variance (3/2)(1/2) / 36; standard error 0.144338.
    actual = ratio_interval([1, 1, 1], [2, 1, 3])
    assert actual.mean == 0.5 and actual.high is not None and actual.low is not None
    assert actual.high - actual.mean == pytest.approx(1.96 * 0.1443376, abs=1e-6)
    assert actual.mean - actual.low == pytest.approx(actual.high - actual.mean)
    # Rows of one pair each: the usual interval of a mean, s / sqrt(n) with n - 1.
    rows = [1.0, 0.0, 0.0, 1.0, 1.0]
    error = torch.tensor(rows).std() / 5**0.5
    assert ratio_interval(rows, [1] * 5).high == pytest.approx(0.6 + 1.96 * float(error))
    assert ratio_interval([1], [1]).low is None


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
