"""Tiny runs that the tests of `irl-align evaluate` share, each trained once in a test session."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from irl_align.training.train import Result, train
from support.tiny_runs import BEST, SPIN, tiny_recipe

OVERRIDES = {
    "irl": BEST,
    "judge": (*BEST, "seed=3"),  # another head, on other data
    "spin": SPIN,
    "sft": ("loop.iterations=0",),
}


@cache
def _folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="irl-align-evaluated-")  # removed when Python ends


@cache
def evaluated_run(name: str) -> Result:
    """One of OVERRIDES, finished; all have one store."""
    return train(tiny_recipe(Path(_folder().name), f"name={name}", *OVERRIDES[name]))
