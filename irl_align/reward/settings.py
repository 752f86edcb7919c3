"""Settings of an explicit reward, saved in the config.json of its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irl_align.errors import UserError
from irl_align.utils.files import read_json

CONFIG_KEY = "irl_reward"  # name of the settings in config.json


@dataclass(frozen=True)
class RewardSettings:
    """What defines an explicit reward besides its weights."""

    lm_coef: float = 0.0
    """a in r = head + a * mean log-prob of the completion under the backbone."""
    bound: float | None = None
    """Largest |r| before the normaliser."""
    echo: bool = False
    """Whether the model reads x again after y, and the head reads there: r = head([x; y; x])."""
    mean: float = 0.0
    """Mean reward of the demonstrations, which the normaliser subtracts."""
    std: float = 1.0
    """Standard deviation of the demonstrations' rewards, by which the normaliser divides."""
    template: str = "{prompt}"
    """Prompt template for text input; `chat` is the tokenizer's own."""
    lowercase: bool = False
    """Whether text input is lowercased first."""
    name: str = "reward"
    """Name of the data card that defines the template."""


DEFAULT_SETTINGS = RewardSettings()


def read_settings(folder: Path) -> RewardSettings:
    """Settings of a saved reward. Raises UserError: no config.json, or unknown fields in it."""
    config = read_json(folder / "config.json", "a reward's config", "write the reward again")
    return parse_settings(folder, config.get(CONFIG_KEY))


def parse_settings(path: str | Path, values: dict[str, Any] | None) -> RewardSettings:
    """Settings from the values in a config.json, which people edit. Raises UserError."""
    try:
        return RewardSettings(**(values or {}))
    except TypeError as error:
        raise UserError(
            f"{path}: config.json: {CONFIG_KEY}: {error}; expected the fields "
            f"{', '.join(RewardSettings.__dataclass_fields__)}"
        ) from error
