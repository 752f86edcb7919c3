"""Facts of a finished run for exports: artefacts, data, lineage, licence and the public recipe.

This module reads run folders and cards, never models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import DatasetCard, hf_hub_download, metadata_load

from irl_align.config.resources import data_cards_dir
from irl_align.data.cards import Card, load_card
from irl_align.errors import UserError
from irl_align.policy.roles import SFT, START, Role
from irl_align.training.run_folder import RERUN, Run, RunView, no_explicit_reward
from irl_align.utils.files import read_json

KINDS = ("reward", "policy", "pairs")
# Licences under which a derived work may have another licence if it keeps the notice.
PERMISSIVE = frozenset(
    {
        "afl-3.0",
        "apache-2.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "cc-by-2.0",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc0-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "isc",
        "mit",
        "odc-by",
        "pddl",
        "unlicense",
        "zlib",
    }
)
UNKNOWN = "unknown"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Artefact(NamedTuple):
    """A model of a run."""

    role: str
    """Role of its stage, as in stages.json."""
    path: Path
    """Folder of the model."""
    iteration: int
    """k of r_k, or of pi_k; pi_0 is the policy before the loop."""
    weights: int
    """Iteration of the weights: an earlier one where pi_k selects among the samples of another."""


@dataclass(frozen=True)
class Facts:
    """A finished run and the data card of its demonstrations."""

    view: RunView
    card: Card | None
    """The demonstrations' data card; None if it cannot be read any more."""
    front: dict[str, Any]
    """Hub metadata of the data card: pretty_name, language, license and others."""
    about: str
    """Text of the data card."""

    @classmethod
    def of(cls, run: Path) -> Facts:
        """Facts of a finished run. Raises UserError: no run, or not finished."""
        view = Run.load(run)
        view.require_finished()
        return cls(view, *_data_card(str(view.recipe["data"]["card"])))

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json."""
        return self.view.require_finished()

    @property
    def data_name(self) -> str:
        """The title of the demonstrations."""
        return str(self.front.get("pretty_name") or card_name(self.view.recipe["data"]["card"]))

    @property
    def data_hub_id(self) -> str | None:
        """The demonstrations' Hub id; None if they are not from the Hub."""
        return self.card.source.hub if self.card and self.card.source else None

    @property
    def base_model(self) -> str | None:
        """The recipe's model: a Hub id, or the name of a local folder; None from scratch."""
        path: str | None = self.view.recipe["model"]["path"]
        return Path(path).resolve().name if path and Path(path).exists() else path

    @property
    def base_hub_id(self) -> str | None:
        """The base model's Hub id; None if it is not from the Hub."""
        path = self.view.recipe["model"]["path"]
        return path if path and HUB_ID.fullmatch(path) and not Path(path).exists() else None

    def reward(self, iteration: int | None = None) -> Artefact:
        """The explicit reward r_k, by default the last. Raises UserError if there is none."""
        rewards = self.view.numbered_stages("reward")
        folders = {k: stage for k, stage in rewards.items() if stage["name"] == "reward"}
        if not folders:
            raise no_explicit_reward(self.view.folder, self.summary.get("log_ratio") is not None)
        k = max(folders) if iteration is None else iteration
        if k not in folders:
            raise self._no_iteration("reward", k, folders)
        return Artefact(str(Role.reward(k)), self._folder(folders[k]) / "model", k, k)

    def policy(self, iteration: int | None = None) -> Artefact:
        """The policy pi_k, by default the final one; pi_0 is the policy before the loop.

        Raises UserError: the run has no such policy.
        """
        last = int(self.summary["policy_number"])
        k = last if iteration is None else iteration
        # A policy that selects among the samples of an earlier policy has no weights of its own.
        selects = self.summary.get("ranking") is not None and k == last
        for number in range(k, -1 if selects else k - 1, -1):
            roles = [Role.policy(number)] if number else [SFT, START]
            if number and self.view.recipe["policy_update"]["kind"] == "identity":
                roles = [Role.reward(number - 1)]
            for role in map(str, roles):
                stage = self.view.stages.get(role)
                if stage is not None:
                    return Artefact(role, self._folder(stage) / "model", k, number)
        known = {0, last, *self.view.numbered_stages("policy")}
        raise self._no_iteration("policy", k, known)

    def pairs(self) -> dict[int, Path]:
        """Iteration -> folder of its pairs. Raises UserError if there are none."""
        stages = self.view.numbered_stages("pairs")
        if not stages:
            raise UserError(f"{self.view.folder}: this run made no pairs; expected one with a loop")
        return {k: self._folder(stage) for k, stage in sorted(stages.items())}

    def stage_folder(self, role: str) -> Path:
        """Folder of the stage with this role. Raises UserError if the run has no such stage."""
        if role not in self.view.stages:
            raise UserError(f"{self.view.folder}/stages.json: found no stage {role}; {RERUN}")
        return self._folder(self.view.stages[role])

    def record(self, role: str) -> dict[str, Any]:
        """The record stage.json of the stage with this role."""
        path = self.stage_folder(role) / "stage.json"
        return read_json(path, "the record of a finished stage", RERUN)

    def lineage(self, role: str) -> dict[str, str]:
        """Role -> `name-key` of a stage and of all stages that it was made from, itself first."""
        roles: dict[str, str] = {}
        for name, stage in self.view.stages.items():
            roles.setdefault(stage["key"], name)
        queue, lineage = [role], dict[str, str]()
        for current in queue:  # which grows
            if current in lineage:
                continue
            record = self.record(current)
            lineage[current] = f"{record['name']}-{record['key']}"
            # The key of a selecting policy is policy+reward+...: its parts are keys of stages.
            keys = [key for value in record["inputs"].values() for key in str(value).split("+")]
            queue += [roles[key] for key in keys if key in roles]
        return lineage

    def recipe_text(self) -> str:
        """The resolved recipe as YAML, without this machine's paths and addresses."""
        recipe = _public(self.view.recipe)
        recipe.pop("output_dir", None)
        return str(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))

    def _folder(self, stage: Mapping[str, str]) -> Path:
        return (self.view.folder / stage["path"]).resolve()

    def _no_iteration(self, what: str, k: int, known: Iterable[int]) -> UserError:
        numbers = ", ".join(map(str, sorted(known)))
        return UserError(
            f"--iteration: {self.view.folder} has no {what} {k}; expected one of {numbers}"
        )


def card_name(card: str) -> str:
    """The name of a data card that a recipe gives by name or by path."""
    return Path(card).stem


def _public(value: Any) -> Any:
    """A recipe's value without local folders and servers; the path of a file becomes its name."""
    if isinstance(value, Mapping):
        return {name: _public(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value if "://" not in str(item)]
    if isinstance(value, str) and "/" in value:
        path = Path(value)
        if path.is_absolute() or path.exists():
            is_model = (path / "config.json").is_file()
            return None if path.is_dir() and not is_model else path.name
    return value


def _data_card(name: str) -> tuple[Card | None, dict[str, Any], str]:
    """A data card, its Hub metadata and its text; None and empty if it cannot be read any more."""
    try:
        card = load_card(name)
        shipped = data_cards_dir() / f"{name}.md"
        hub = DatasetCard.load(Path(name) if name.endswith(".md") or "/" in name else shipped)
    except (UserError, ValueError):
        return None, {}, ""
    return card, hub.data.to_dict(), hub.text


class Licence(NamedTuple):
    """A licence by the Hub's name, and how it was derived."""

    name: str
    why: str
    other: str | None = None
    """With name `other`: what to call it."""
    data: bool = True
    """Whether the licence of the demonstrations is known."""


def derive(facts: Facts, given: str | None = None) -> Licence:
    """Licence of a run's models and pairs; `unknown` where that of the data or base is unknown.

    given: the publisher's choice, which takes precedence.
    """
    data, base = _joined(facts.front.get("license")), _base_licence(facts)
    model = f"the base model: {base or UNKNOWN}"
    if facts.base_model is None:
        model = "no base model (trained from scratch)"
    sources = f"the demonstrations: {data or UNKNOWN}; {model}"
    if given is not None:
        return Licence(given, f"chosen by the publisher. T{sources[1:]}")
    return combine(data, base, facts.base_model is not None, sources)


def combine(data: str, base: str, has_base: bool, sources: str) -> Licence:
    """The restrictive licence of the two if one is restrictive, else the base's, else the data's.

    Two different restrictive licences give `other`, which names both. One unknown licence makes the
    result unknown. sources: the two licences in words.
    """
    if not data or (has_base and not base):
        return Licence(UNKNOWN, f"unknown: {sources}", data=bool(data))
    parts = [part for part in dict.fromkeys((base, data)) if part]
    restrictive = [part for part in parts if part not in PERMISSIVE]
    if len(restrictive) > 1:
        return Licence("other", f"both apply. From {sources}", " + ".join(restrictive))
    name = (restrictive or parts)[0]
    return Licence(name, f"from {sources}", "that-of-the-sources" if name == "other" else None)


def _base_licence(facts: Facts) -> str:
    """The licence in the base model's card; empty if it cannot be read."""
    model = facts.view.recipe["model"]
    if model["path"] is None:
        return ""
    try:
        readme = Path(model["path"]) / "README.md"
        if facts.base_hub_id is not None:
            readme = Path(hf_hub_download(model["path"], "README.md", revision=model["revision"]))
        return _joined((metadata_load(readme) or {}).get("license"))
    except Exception:  # no card or no metadata, offline, or gated
        return ""


def _joined(value: Any) -> str:
    """A card's field license as one text; empty where it has none or says `unknown`."""
    names = value if isinstance(value, list) else [value or UNKNOWN]
    return "" if UNKNOWN in names else " and ".join(map(str, names))
