"""The loop on stages that are only looked up."""

import json
from pathlib import Path

import pytest
import torch
from support.shared_runs import shared_run

from irl_align.config.recipe import load_recipe
from irl_align.config.schema import Recipe
from irl_align.training.context import RunContext
from irl_align.training.iteration import RawData
from irl_align.training.loop import bilevel
from irl_align.training.prepare import USES, load_data, recipe_card
from irl_align.training.run_folder import FollowedRun
from irl_align.training.setup import run_folder
from irl_align.training.stages import LookedUpStages


def looked_up(recipe: Recipe, root: Path | None, raw: RawData) -> LookedUpStages:
    stages = LookedUpStages(root, recipe.seed)
    run = FollowedRun(run_folder(recipe))
    bilevel(RunContext(recipe, stages, run, torch.device("cpu")), raw)
    return stages


@pytest.mark.parametrize("name", ["contrast", "select", "spin"])
def test_bilevel_looks_up_the_stages_that_it_builds(name: str) -> None:
    """In order, with the store and the data, and with neither."""
    folder = shared_run(name).folder
    recipe = load_recipe(folder / "recipe.yaml")
    built = list(json.loads((folder / "stages.json").read_text()))
    actual = looked_up(recipe, folder.parent / "store", load_data(recipe)).requests
    assert [str(role) for role in actual] == built
    assert not any(request.stage.missing for request in actual.values())

    nothing = RawData(
        card=recipe_card(recipe),
        rows={use: [] for use in USES},
        checksums=dict.fromkeys(USES, ""),
        counts={},
        noisy={},
        preferences=[],
        extra_prompts=[],
        unread_prompts=[],
    )
    planned = looked_up(recipe, None, nothing).requests
    assert [str(role) for role in planned] == built
    assert all(request.stage.missing for request in planned.values())
