"""Recipes written and read by the tests of recipes, in the current directory."""

from pathlib import Path
from typing import Any

import pytest

from irl_align.config.recipe import load_recipe
from irl_align.config.schema import Recipe
from irl_align.errors import UserError

SMALL = """\
name: small
data:
  card: toy
model:
  path: some/model
"""
BASE = """\
name: base
seed: 3
data:
  card: toy
  share: 0.5
model:
  path: some/model
reward:
  loss: linear
  bound: 2
  args:
    learning_rate: 1e-5
    max_steps: 4
policy_update:
  kind: best_of_n
  n: 4
  use: dpo
evaluation:
  temperatures: [1.0, 0.5]
"""


def write(text: str | bytes, name: str = "r.yaml") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def load(text: str | bytes, *overrides: str) -> Recipe:
    return load_recipe(write(text), overrides)


def update(recipe: Recipe) -> dict[str, Any]:
    return recipe.policy_update.model_dump()


def mistakes(text: str | bytes, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    return str(caught.value).split("\n")
