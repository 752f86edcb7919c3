"""Finished tiny runs that the tests of export, cards and push share, each made once."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from irl_align.training.train import Result, train
from support.tiny_runs import BEST, SPIN, tiny_recipe


@cache
def folder() -> Path:
    """Where the runs lie; deleted at the end."""
    made = Path(tempfile.mkdtemp(prefix="hub-runs-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@cache
def best_of_n() -> Result:
    """Explicit reward, Best-of-N distillation, contrast pairs, two temperatures."""
    sources = "pairs.sources=[demonstration/policy, demonstration/contrast]"
    temperatures = "evaluation.temperatures=[1.0, 0.0]"
    return train(tiny_recipe(folder(), "name=best", *BEST, sources, temperatures))


@cache
def selecting() -> Result:
    """The same reward; the policy selects the best of 3."""
    sources = "pairs.sources=[demonstration/policy, demonstration/contrast]"
    update = "policy_update={n: 3, use: select}"
    return train(tiny_recipe(folder(), "name=select", sources, update))


@cache
def spin() -> Result:
    """Implicit reward."""
    return train(tiny_recipe(folder(), "name=spin", *SPIN))
