"""Write what a run made to a folder that others can load: `irl-align export`."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from irl_align.data.columns import column
from irl_align.data.encoding import Templated
from irl_align.errors import UserError
from irl_align.evaluation.inference import PromptFormat
from irl_align.hub.adapter import base_name, rename_base, require_whole
from irl_align.hub.card import policy_card, reward_card
from irl_align.hub.facts import KINDS, Artefact, Facts, ratio_interval
from irl_align.hub.licences import UNKNOWN, Licence, derive
from irl_align.hub.pairs import read_pairs, write_pairs
from irl_align.hub.sections import Measured
from irl_align.hub.weights import chat_ids, chat_template, fold_normaliser, plain_scores
from irl_align.models.loading import load_model, load_tokenizer, pick_device
from irl_align.models.lora import base_of, is_adapter
from irl_align.reward.model import RewardModel
from irl_align.utils.files import (
    atomic_folder,
    atomic_write,
    explains_full_disk,
    file_checksum,
    files_of,
)

logger = logging.getLogger(__name__)
CHECKED = 256  # held-out demonstrations on which an exported reward is compared with ours
TOLERANCE = 1e-5
_TOKENIZER = ("tokenizer", "special_tokens", "vocab", "merges", "added_tokens", "chat_template")


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    what: str
    iteration: int | None
    """k of the reward or policy; None for pairs."""
    licence: Licence


@dataclass(frozen=True)
class Form:
    """How a LoRA reward or policy is written: merged into its base, or as the adapter alone."""

    adapter: bool = False
    base: str | None = None
    """What the adapter names as its base; None is the recipe's Hub model."""


def export(
    run: Path,
    what: str,
    to: Path,
    iteration: int | None = None,
    licence: str | None = None,
    form: Form = Form(),
) -> Exported:
    """Write the reward, the policy or the pairs of a finished run to the new folder `to`.

    iteration: which reward or policy; the last by default. licence: in place of the one derived
    from data and base model. form: of a model that is an adapter. The folder appears whole or not
    at all. Raises UserError: the run is not finished or has no such thing, `to` exists, the disk is
    full, an adapter alone is asked for and cannot be had.
    """
    if what not in KINDS:
        raise UserError(f"--what: found {what!r}, expected one of {', '.join(KINDS)}")
    facts = Facts.of(run)
    if what == "pairs" and iteration is not None:
        raise UserError("--iteration: pairs are exported together; leave it out with --what pairs")
    if form.base is not None and not form.adapter:
        raise UserError("--base: names the base of an adapter; expected --adapter too")
    if form.adapter and what == "pairs":
        raise UserError("--adapter: pairs are no model; expected --what reward or policy")
    if to.exists():
        raise UserError(f"--to: {to} exists; give a new folder, or delete it first")
    derived = derive(facts, licence)
    if derived.name == UNKNOWN:
        logger.warning(
            "licence: %s; give `license` in the data card or the base model's card, or --license; "
            "a push needs one",
            derived.why,
        )
    writers: dict[str, Callable[..., int | None]] = {
        "reward": partial(_write_reward, form=form),
        "policy": partial(_write_policy, form=form),
        "pairs": write_pairs,
    }
    with explains_full_disk("export", to.parent), atomic_folder(to) as folder:
        number = writers[what](folder, facts, iteration, derived)
        atomic_write(folder / "recipe.yaml", facts.recipe_text())
    return Exported(to, what, number, derived)


def _write_reward(
    folder: Path, facts: Facts, iteration: int | None, licence: Licence, form: Form
) -> int:
    found = facts.reward(iteration)
    rows = _held_out(facts)
    base = base_name(facts, found.path, form.base) if form.adapter else None
    ours = _save_folded(found.path, folder, rows, form.adapter)
    again: dict[str, Any] = {}
    if base is not None:
        rename_base(folder, base, _revision(facts, form))
        again = {"merge": False, "base": base_of(found.path)}  # as it lies here
    reward = RewardModel.from_pretrained(folder, pick_device("auto"), **again)  # as others load it
    measured = _measure(facts, found, reward, rows, ours)
    text = reward_card(facts, found, reward.settings, measured, licence, base)
    atomic_write(folder / "README.md", text)
    return found.iteration


def _revision(facts: Facts, form: Form) -> str | None:
    return facts.view.recipe["model"]["revision"] if form.base is None else None


def _save_folded(source: Path, folder: Path, rows: Dataset, adapter: bool) -> torch.Tensor:
    """Write a reward with its normaliser folded in; its scores of the rows (B,) before that."""
    reward = RewardModel.from_pretrained(source, pick_device("auto"), merge=not adapter)
    if not adapter:
        require_whole(reward.model, source)
    ours = reward.score_ids(column(rows, "prompt_ids"), column(rows, "completion_ids"), None)
    fold_normaliser(reward)
    template = chat_template(reward.settings, reward.tokenizer, reward.settings.echo)
    if template is not None:
        reward.tokenizer.chat_template = template
    config = reward.model.config
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}
    reward.save_pretrained(folder)
    return ours


def _held_out(facts: Facts) -> Dataset:
    """Held-out demonstrations, evenly spaced, CHECKED at most."""
    path = facts.stage_folder("data") / "held_out.parquet"
    rows = Dataset.from_parquet(str(path), keep_in_memory=True)
    return rows.select(range(0, len(rows), -(-len(rows) // CHECKED)))


def _measure(
    facts: Facts, found: Artefact, reward: RewardModel, rows: Dataset, ours: torch.Tensor
) -> Measured:
    """The exported reward against the run's own on demonstrations, and on held-out pairs."""
    settings = reward.settings
    prompts = column(rows, "prompt_ids")
    read = reward.as_read(prompts, column(rows, "completion_ids"))
    ids = [[*p, *c] for p, c in zip(prompts, read, strict=True)]
    difference = None
    as_chat = not (settings.echo and settings.template == "chat")  # the model's own has no echo
    if not settings.lm_coef and settings.bound is None and as_chat:
        plain = plain_scores(reward.model, ids) - settings.mean
        difference = float((plain - ours).abs().max())
        if difference > TOLERANCE * max(1.0, float(ours.abs().max())):
            logger.warning(
                "export: scores by transformers differ by up to %.1e from the run's", difference
            )
    same = None
    if settings.template != "chat":
        chats = chat_ids(reward.tokenizer, column(rows, "prompt"), column(rows, "completion"))
        same = sum(a == b for a, b in zip(chats, ids, strict=True))
    pairs = read_pairs(facts.pairs()[found.iteration] / "held_out.parquet")
    return Measured(
        rows=len(rows),
        difference=difference,
        same_ids=same,
        held_out=_accuracy(reward, pairs),
        pairs=len(pairs),
        source_checksum=file_checksum(found.path),
    )


def _accuracy(reward: RewardModel, pairs: Dataset) -> dict[str, Any]:
    """Pair source -> accuracy with its interval, pairs of one prompt counted as one group."""
    chosen = reward.score_ids(column(pairs, "prompt_ids"), column(pairs, "chosen_ids"), None)
    rejected = reward.score_ids(
        column(pairs, "rejected_prompt_ids"), column(pairs, "rejected_ids"), None
    )
    right = ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).tolist()
    groups: dict[str, dict[str, list[float]]] = {}
    sources, keys = column(pairs, "source"), column(pairs, "prompt_key")
    for source, key, value in zip(sources, keys, right, strict=True):
        groups.setdefault(source, {}).setdefault(key, []).append(value)
    return {
        source: ratio_interval([sum(v) for v in by.values()], [len(v) for v in by.values()])
        for source, by in sorted(groups.items())
    }


def _write_policy(
    folder: Path, facts: Facts, iteration: int | None, licence: Licence, form: Form
) -> int:
    """The policy's weights as they are, with a chat template where its own template is plain."""
    found = facts.policy(iteration)
    base = base_name(facts, found.path, form.base) if form.adapter else None
    if is_adapter(found.path) and base is None:
        model = load_model(found.path)
        require_whole(model, found.path)
        model.save_pretrained(folder)
    else:
        _copy_model(found.path, folder)
    if base is not None:
        rename_base(folder, base, _revision(facts, form))
    tokenizer = load_tokenizer(found.path)
    template = chat_template(prompt_format(found.path), tokenizer)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    checksum = file_checksum(found.path)
    atomic_write(folder / "README.md", policy_card(facts, found, checksum, licence, base))
    return found.iteration


def _copy_model(source: Path, folder: Path) -> None:
    for file in files_of(source):
        if not file.name.startswith(_TOKENIZER):
            to = folder / file.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to)


def prompt_format(policy: Path) -> Templated:
    """How a saved policy's prompts are written."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(policy, trust_remote_code=False)
    return PromptFormat(**(getattr(config, "irl_prompt", None) or {}))


def sizes(folder: Path) -> Sequence[tuple[str, int]]:
    """Files of an exported folder and their bytes."""
    return [(f.relative_to(folder).as_posix(), f.stat().st_size) for f in files_of(folder)]
