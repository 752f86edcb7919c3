"""Ablation recipes differ from the recipe they are compared with only in their subject, and run."""

from typing import Any

import pytest
from support.smoked import SMOKED, built_roles, planned_roles
from support.tiny_runs import session_folder

from irl_align.config.recipe import load_recipe, to_dict
from irl_align.config.resources import recipes_dir
from irl_align.errors import UserError
from irl_align.training.smoke import smoke_recipe
from irl_align.training.train import train

pytestmark = pytest.mark.timeout(240)
IRL, SPIN = "e2e/irl-best-of-n.yaml", "e2e/spin.yaml"
# Recipe -> (the recipe it is compared with, the options that differ).
DIFFERENCES = {
    "e2e/ablations/linear.yaml": (IRL, {"reward.loss", "reward.bound"}),
    "e2e/ablations/demonstrations-5.yaml": (IRL, {"data.share"}),
    "e2e/ablations/demonstrations-25.yaml": (IRL, {"data.share"}),
    "e2e/ablations/noise-10.yaml": (IRL, {"data.noise"}),
    "e2e/ablations/noise-30.yaml": (IRL, {"data.noise"}),
    "e2e/ablations/window-all.yaml": (IRL, {"loop.iterations"}),
    "e2e/ablations/window-latest.yaml": ("e2e/ablations/window-all.yaml", {"pairs.window"}),
    "e2e/ablations/window-last-2.yaml": ("e2e/ablations/window-all.yaml", {"pairs.window"}),
    "e2e/ablations/reward-cold.yaml": (IRL, {"reward.init", "reward.schedule"}),
    "e2e/ablations/negatives-t0.7.yaml": (IRL, {"generation.temperature"}),
    "e2e/ablations/negatives-t0.01.yaml": (IRL, {"generation.temperature", "pairs.truncated"}),
    "e2e/ablations/afd-sft-init.yaml": (
        IRL,
        {"pairs.sources", "pairs.truncated", "loop.iterations"},
    ),
    "e2e/ablations/afd-demonstration-init.yaml": (
        IRL,
        {"pairs.sources", "pairs.truncated", "loop.iterations"},
    ),
    "e2e/ablations/iqlearn.yaml": ("e2e/sft-more.yaml", {"policy_update"}),
    "e2e/ablations/iqlearn-from-start.yaml": (
        "e2e/base.yaml",
        {"sft.enabled", "reward.kind", "policy_update", "loop.iterations"},
    ),
    "e2e/ablations/reference-mixture.yaml": (SPIN, {"reward.reference"}),
    "e2e/dpo-fixed-ref.yaml": (SPIN, {"reward.reference"}),
    "e2e/dpo-fixed-ref-contrast.yaml": ("e2e/dpo-fixed-ref.yaml", {"pairs.sources"}),
    "e2e/spin-contrast.yaml": (SPIN, {"pairs.sources"}),
    "e2e/irl-best-of-n-contrast.yaml": (IRL, {"pairs.sources"}),
    "e2e/irl-select-edits.yaml": (
        "e2e/irl-select.yaml",
        {
            "pairs.sources",
            "pairs.contrast",
            "pairs.contrast_edits",
            "reward.echo",
            "reward.max_pairs",
            "loop.iterations",
        },
    ),
    "e2e/sft.yaml": ("e2e/base.yaml", set()),
    "sfx/preference-rlhf.yaml": (
        "sfx/irl-best-of-n.yaml",
        {"reward.preferences", "reward.args", "loop.signs"},
    ),
    "sfx/irl-preferences.yaml": ("sfx/irl-best-of-n.yaml", {"reward.preferences"}),
    "sfx/irl-best-of-n.yaml": ("sfx/irl-select.yaml", {"policy_update"}),
    "sfx/irl-select-contrast.yaml": ("sfx/irl-select.yaml", {"pairs.sources", "reward.lm_coef"}),
}


def options(name: str) -> dict[str, Any]:
    """Options by group and name, without the name and the description of the recipe."""
    values: dict[str, Any] = {}
    for group, inner in to_dict(load_recipe(recipes_dir() / name)).items():
        if isinstance(inner, dict) and group != "policy_update":  # its kinds have other options
            values |= {f"{group}.{option}": value for option, value in inner.items()}
        elif group not in ("name", "description"):
            values[group] = inner
    return values


@pytest.mark.parametrize("name", DIFFERENCES)
def test_ablation_differs_only_in_its_subject(name: str) -> None:
    base, expected = DIFFERENCES[name]
    own, other = options(name), options(base)
    assert {key for key in own if own[key] != other[key]} == expected


def test_every_ablation_has_a_recipe_to_compare_with() -> None:
    names = {
        path.relative_to(recipes_dir()).as_posix()
        for folder in ("e2e/ablations", "sfx")
        for path in (recipes_dir() / folder).glob("*.yaml")
    }
    assert names - set(DIFFERENCES) <= {"sfx/base.yaml", "sfx/irl-select.yaml", "sfx/spin.yaml"}


@pytest.mark.parametrize("name", SMOKED)
def test_ablation_runs_to_its_end(name: str) -> None:
    recipe = load_recipe(recipes_dir() / name, ["device=cpu", *SMOKED[name]])
    # Recipes of one task share the tiny SFT stage, which run_smoke would train for each.
    folder = session_folder(f"ablation-{recipe.name}") / "runs"
    result = train(smoke_recipe(recipe, folder))
    summary = result.view().summary
    assert summary is not None
    assert summary["ended"] == f"{recipe.loop.iterations} iterations done"
    small = load_recipe(result.folder / "recipe.yaml")
    assert built_roles(result.folder) == planned_roles(small)


def test_load_recipe_refuses_a_weight_for_preferences_alone() -> None:
    recipe = recipes_dir() / "sfx/preference-rlhf.yaml"
    with pytest.raises(UserError, match="weight is an option of use beside, not of alone"):
        load_recipe(recipe, ["reward.preferences.weight=2"])
