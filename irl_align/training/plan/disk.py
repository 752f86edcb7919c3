"""The disk that a run will need, told before it starts."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from irl_align.config.schema import Recipe
from irl_align.errors import UserError
from irl_align.training.plan.devices import device_named
from irl_align.training.plan.dry_run import unsaid
from irl_align.training.plan.plan import Assumptions, make_plan

logger = logging.getLogger(__name__)
MEGABYTE = 1e6


def announce_disk(recipe: Recipe) -> None:
    """Tell what the stages to do will leave on the disk, checkpoints included, and what is free.

    What the store has already is not counted, so that an interrupted run needs less. Nothing is
    told of a recipe whose sizes are not known. Raises UserError where less is free.
    """
    try:
        with unsaid():
            need = make_plan(recipe, Assumptions(device_named("cpu"), 1.0, 1.0)).disk
    except UserError as unknown:
        logger.debug("disk: the need is not known: %s", unknown)
        return
    folder = Path(recipe.output_dir)
    while not folder.exists():
        folder = folder.absolute().parent
    free = shutil.disk_usage(folder).free
    told = f"{need / MEGABYTE:,.0f} MB for {recipe.output_dir}, {free / MEGABYTE:,.0f} MB are free"
    if need > free:
        raise UserError(
            f"disk: the run needs about {told}; free space (irl-align prune), choose another "
            "output_dir, or give --any-disk to run all the same"
        )
    logger.info("disk: the run needs about %s", told)
