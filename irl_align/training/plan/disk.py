"""A check, before a run starts, that the disk has room for its models and checkpoints."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from irl_align.config.recipe import to_dict
from irl_align.config.schema import Recipe
from irl_align.errors import UserError
from irl_align.training.plan.costs import Costs, disk_of
from irl_align.training.plan.data import Counts, Lengths
from irl_align.training.plan.model_shapes import shape_of_recipe
from irl_align.training.plan.stage_costs import StageCosts
from irl_align.training.plan.walk import planned_stages
from irl_align.training.prepare import USES
from irl_align.training.run_folder import Run
from irl_align.training.setup import run_folder

logger = logging.getLogger(__name__)
MEGABYTE = 1e6
_NO_ROWS = dict.fromkeys(USES, 0)
_NO_TEXT = Counts(_NO_ROWS, _NO_ROWS, Lengths(0.0, 1), Lengths(0.0, 1), None, "not counted")


def announce_disk(recipe: Recipe) -> None:
    """Log what a run's models and checkpoints take, and what is free.

    Stages that the run has finished are not counted, so that an interrupted run needs less. Texts
    are small next to models and are not counted either. Nothing is logged where the model's size is
    not known. Raises UserError where less is free.
    """
    try:
        need = _need(recipe)
    except UserError as unknown:
        logger.debug("disk: the need is not known: %s", unknown)
        return
    folder = Path(recipe.output_dir)
    while not folder.exists():
        folder = folder.absolute().parent
    free = shutil.disk_usage(folder).free
    sizes = f"{need / MEGABYTE:,.0f} MB for {recipe.output_dir}, {free / MEGABYTE:,.0f} MB are free"
    if need > free:
        raise UserError(
            f"disk: the run needs about {sizes}; free space (irl-align prune), choose another "
            "output_dir, or give --any-disk to run anyway"
        )
    logger.info("disk: the run needs about %s", sizes)


def _need(recipe: Recipe) -> float:
    """Bytes of the stages that the run has not finished."""
    costs = Costs(recipe, shape_of_recipe(recipe.model), _NO_TEXT, on_cpu=True)
    cost_of = StageCosts(recipe, _NO_TEXT, costs).of
    folder, finished = run_folder(recipe), set[str]()
    if folder.is_dir():
        run = Run.load(folder)
        finished = set(run.stages) if dict(run.recipe) == to_dict(recipe) else finished
    stages, _ = planned_stages(recipe, None)
    return disk_of([cost_of(s.role) for s in stages if str(s.role) not in finished])
