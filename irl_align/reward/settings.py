"""Settings of an explicit reward, saved in the config.json of its folder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from irl_align.data.cards import check_template
from irl_align.errors import UserError
from irl_align.utils.files import read_json

CONFIG_KEY = "irl_reward"  # name of the settings in config.json


@dataclass(frozen=True)
class RewardSettings:
    """What defines an explicit reward besides its weights."""

    lm_coef: float = 0.0
    """a in r = head + a * mean log-prob of the completion under the backbone."""
    bound: float | None = None
    """Largest |r| before the mean is subtracted."""
    echo: bool = False
    """Whether the model reads x again after y, and the head reads there: r = head([x; y; x])."""
    penalty: float | None = None
    """Of an ensemble: lambda in r = mean - lambda * standard deviation over its members. None: one
    model with one head, or heads that are scored separately."""
    centres: list[float] = field(default_factory=list)
    """Of an ensemble of heads: the demonstrations' mean reward by each, which is subtracted first:
    pairs do not determine it, so that heads would differ by it."""
    mean: float = 0.0
    """Mean reward of the demonstrations, which is subtracted. Rewards stay in nats: dividing them
    would give the KL penalty another weight for every reward."""
    template: str = "{prompt}"
    """Prompt template for text input; `chat` is the tokenizer's own."""
    lowercase: bool = False
    """Whether text input is lowercased first."""
    name: str = "reward"
    """Name of the data card that defines the template."""


DEFAULT_SETTINGS = RewardSettings()


def settings_of(
    path: str | Path,
    saved: dict[str, Any] | None,
    chat_template: object,
    template: str | None = None,
) -> RewardSettings:
    """Settings of a reward: those in its config.json, or of a reward that was not fitted here.

    chat_template and template: see own_template. Raises UserError: the settings are unknown, or the
    template is not used or cannot be.
    """
    if saved is None:
        return replace(DEFAULT_SETTINGS, template=own_template(path, chat_template, template))
    settings = parse_settings(path, saved)
    refuse_template(path, settings.template, template)
    return settings


def own_template(path: str | Path, chat_template: object, template: str | None) -> str:
    """The template of a model that was not made here: text with {prompt}, or chat.

    chat_template: that of its tokenizer, which is used if there is one. template: another choice.
    Raises UserError: the template is neither, or there is no chat template.
    """
    if template is None:
        return "chat" if chat_template else "{prompt}"
    try:
        check_template(template)
    except ValueError as error:
        raise UserError(f"{path}: template: found {template!r}: {error}") from error
    if template == "chat" and not chat_template:
        raise UserError(
            f"{path}: template: found chat, but its tokenizer has no chat template; expected text "
            "with {prompt}"
        )
    return template


def refuse_template(path: str | Path, saved: str, template: str | None) -> None:
    """Raise UserError if a template is given for a model that was made with another one."""
    if template is not None:
        raise UserError(
            f"{path}: template: found {template!r}, but this model was made with the template "
            f"{saved!r}, which it keeps; leave the option out"
        )


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
