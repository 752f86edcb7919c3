"""Finished tiny runs that test files share; a test session trains each at most once a worker.

Their stages lie in the session's store, so that a second worker only reads them. A test must not
change these folders; a test that does copies the run first.
"""

from functools import cache

from irl_align.training.train import Result, train
from support.tiny_runs import BEST, SPIN, session_folder, tiny_recipe

_CONTRAST = "pairs.sources=[demonstration/policy, demonstration/contrast]"
OVERRIDES = {
    "irl": BEST,
    "judge": (*BEST, "seed=3"),  # another reward model, trained on other data
    "contrast": (*BEST, _CONTRAST, "evaluation.temperatures=[1.0, 0.0]"),
    "select": (_CONTRAST, "policy_update={n: 3, use: select}"),
    "spin": SPIN,
    "ratio": (*SPIN, "policy_update={kind: best_of_n, n: 2, use: select}", "reward.mean=true"),
    "sft": ("loop.iterations=0",),
}


@cache
def shared_run(name: str) -> Result:
    """The finished run of one of OVERRIDES."""
    return train(tiny_recipe(session_folder("shared"), f"name={name}", *OVERRIDES[name]))
