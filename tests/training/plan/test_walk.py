"""The loop on stages that are only looked up."""

from collections.abc import Iterator

from support.smoked import SHIPPED, SMOKED, planned_roles

from irl_align.config.recipe import load_recipe
from irl_align.config.resources import recipe_files, recipes_dir


def shapes() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each recipe with the roles of its stages, at one iteration and one temperature."""
    plain = ("evaluation.temperatures=[1.0]", "generation.temperature=1.0")
    for path in recipe_files():
        iterations = min(load_recipe(path).loop.iterations, 1)
        overrides = (f"loop.iterations={iterations}", "evaluation.match_entropy=false", *plain)
        name = path.relative_to(recipes_dir()).as_posix()
        yield name, tuple(planned_roles(load_recipe(path, overrides)))


def test_every_recipe_has_the_stages_of_a_recipe_that_tests_smoke() -> None:
    """Smoke runs of the recipes in SHIPPED and SMOKED build exactly the stages of their plans."""
    by_recipe = dict(shapes())
    smoked = {by_recipe[name] for name in (*SHIPPED, *SMOKED)}
    assert {name for name, roles in by_recipe.items() if roles not in smoked} == set()
