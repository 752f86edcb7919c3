"""Align language models from demonstrations alone, by inverse reinforcement learning."""

from typing import TYPE_CHECKING, Any

from irl_align.utils.version import __version__

__all__ = ["RewardModel", "__version__", "load_recipe", "train"]

if TYPE_CHECKING:
    from irl_align.config.recipe import load_recipe
    from irl_align.reward.model import RewardModel
    from irl_align.training.train import train

_HOMES = {
    "RewardModel": "irl_align.reward.model",
    "load_recipe": "irl_align.config.recipe",
    "train": "irl_align.training.train",
}


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used, so that the package itself is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
