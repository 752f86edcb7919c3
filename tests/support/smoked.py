"""Recipes that tests smoke, and the stages that a plan and a finished run have of a recipe."""

from pathlib import Path

from irl_align.config.recipe import load_recipe
from irl_align.config.resources import recipe_files, recipes_dir
from irl_align.config.schema import Recipe
from irl_align.policy.roles import Role
from irl_align.training.plan.walk import planned_stages
from support.tiny_runs import metrics

# Recipes of the two built-in tasks are run at their own size by other tests and by hand.
SHIPPED = sorted(
    path.relative_to(recipes_dir()).as_posix()
    for path in recipe_files()
    if path.parent.name not in ("ablations", "countdown", "e2e", "restaurant", "sfx")
)
# One recipe for each kind of code path; `train RECIPE --smoke` tries any other one.
SMOKED = {
    "countdown/irl-best-of-n.yaml": ("loop.iterations=1",),
    "e2e/ablations/linear.yaml": ("loop.iterations=1",),
    "e2e/ablations/negatives-t0.01.yaml": ("loop.iterations=1",),
    "e2e/ablations/afd-sft-init.yaml": (),
    "e2e/ablations/afd-demonstration-init.yaml": ("loop.iterations=1",),
    "e2e/ablations/iqlearn.yaml": ("loop.iterations=1",),
    "e2e/ablations/iqlearn-from-start.yaml": (),
    "e2e/dpo-fixed-ref.yaml": ("loop.pick=nearest",),
    "e2e/ditto.yaml": ("loop.iterations=2",),
    "e2e/irl-select.yaml": ("loop.iterations=1",),
    "e2e/irl-select-edits.yaml": (),
    "restaurant/dense-path.yaml": (),
    "restaurant/endogenous-ppo.yaml": (),
    "restaurant/prime.yaml": ("loop.iterations=1",),
    "sfx/preference-rlhf.yaml": (),
}


def planned_roles(recipe: Recipe) -> list[str]:
    """Roles of the stages that a plan lists, in order."""
    stages, _ = planned_stages(recipe, None)
    return _without_search([stage.role for stage in stages], recipe)


def built_roles(folder: Path) -> list[str]:
    """Roles of the stages that a run built, in order."""
    keys = [key.removeprefix("stage/") for key in metrics(folder) if key.startswith("stage/")]
    return _without_search(list(map(Role.parse, keys)), load_recipe(folder / "recipe.yaml"))


def _without_search(roles: list[Role], recipe: Recipe) -> list[str]:
    """Roles without samples at temperatures that only a finished run knows."""
    known = recipe.evaluation.temperatures
    samples = [r for r in roles if r.kind == "samples" and r.use == "evaluation"]
    searched = {role for role in samples if role.temperature not in known}
    return [str(role) for role in roles if role not in searched]
