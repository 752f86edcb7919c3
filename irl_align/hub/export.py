"""Export a reward, a policy or pairs of a run to a folder that other tools load."""

from __future__ import annotations

import json
import logging
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from irl_align.data.columns import column
from irl_align.data.pairs import load_pairs
from irl_align.errors import UserError
from irl_align.evaluation.inference import prompt_format
from irl_align.hub.card import policy_card, reward_card
from irl_align.hub.facts import KINDS, UNKNOWN, Artefact, Facts, Licence, derive, ratio_interval
from irl_align.hub.pairs import write_pairs
from irl_align.hub.results import Measured
from irl_align.hub.weights import chat_ids, chat_template, fold_normaliser, plain_scores
from irl_align.models.loading import load_model, load_tokenizer, pick_device
from irl_align.models.lora import ADAPTER_CONFIG, base_of, has_adapter, is_adapter
from irl_align.reward.model import RewardModel
from irl_align.utils.files import (
    atomic_folder,
    atomic_write,
    explains_full_disk,
    file_checksum,
    files_of,
    to_json,
)
from irl_align.utils.statistics import Estimate

logger = logging.getLogger(__name__)
CHECKED = 256  # at most as many held-out demonstrations are scored by the export and by the run
TOLERANCE = 1e-5
TOKENIZER = ("tokenizer", "special_tokens", "vocab", "merges", "added_tokens", "chat_template")


class Exported(NamedTuple):
    """An exported folder and its content."""

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
    from data and base model. form: how a LoRA model is written. The folder appears whole or not at
    all. Raises UserError: the run is not finished or has no such artefact, `to` exists, the disk is
    full, or the model is no adapter that can be exported alone.
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
            "a push needs one, unless the repository is private",
            derived.why,
        )
    with explains_full_disk("export", to.parent), atomic_folder(to) as folder:
        number = None
        if what == "pairs":
            write_pairs(folder, facts, derived)
        else:
            artefact = facts.reward(iteration) if what == "reward" else facts.policy(iteration)
            number = artefact.iteration
            write = _write_reward if what == "reward" else _write_policy
            write(folder, facts, artefact, derived, form)
        atomic_write(folder / "recipe.yaml", facts.recipe_text())
    return Exported(to, what, number, derived)


def _write_reward(
    folder: Path, facts: Facts, artefact: Artefact, licence: Licence, form: Form
) -> None:
    path = facts.stage_folder("data") / "held_out.parquet"
    rows = Dataset.from_parquet(str(path), keep_in_memory=True)
    rows = rows.select(range(0, len(rows), -(-len(rows) // CHECKED)))
    base = _base_name(facts, artefact.path, form.base) if form.adapter else None
    ours = _save_folded(artefact.path, folder, rows, form.adapter)
    local: dict[str, Any] = {}
    if base is not None:
        _rename_base(folder, facts, form, base)
        local = {"merge": False, "base": base_of(artefact.path)}  # the base's folder in this store
    reward = RewardModel.from_pretrained(folder, pick_device("auto"), **local)
    measured = _measure(facts, artefact, reward, rows, ours)
    settings = reward.settings
    text = reward_card(facts, artefact, settings, measured, licence, adapter=base is not None)
    atomic_write(folder / "README.md", text)


def _save_folded(source: Path, folder: Path, rows: Dataset, adapter: bool) -> torch.Tensor:
    """Write a reward with its normaliser folded in. Returns the scores (B,) before folding."""
    reward = RewardModel.from_pretrained(source, pick_device("auto"), merge=not adapter)
    if not adapter:
        _require_whole(reward.model, source)
    ours = reward.score_ids(column(rows, "prompt_ids"), column(rows, "completion_ids"), None)
    fold_normaliser(reward)
    template = chat_template(reward.settings, reward.tokenizer, reward.settings.echo)
    if template is not None:
        reward.tokenizer.chat_template = template
    config = reward.model.config
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}
    reward.save_pretrained(folder)
    return ours


def _measure(
    facts: Facts, artefact: Artefact, reward: RewardModel, rows: Dataset, ours: torch.Tensor
) -> Measured:
    """Compare the exported reward with the run's own scores `ours` (B,) of demonstrations, and
    measure its accuracy on held-out pairs."""
    settings = reward.settings
    prompts = column(rows, "prompt_ids")
    read = reward.as_read(prompts, column(rows, "completion_ids"))
    ids = [[*p, *c] for p, c in zip(prompts, read, strict=True)]
    difference = None
    as_chat = not (settings.echo and settings.template == "chat")  # its template has no echo
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
    pairs = load_pairs(facts.pairs()[artefact.iteration] / "held_out.parquet")
    return Measured(
        rows=len(rows),
        difference=difference,
        same_ids=same,
        held_out=_accuracy(reward, pairs),
        pairs=len(pairs),
        source_checksum=file_checksum(artefact.path),
    )


def _accuracy(reward: RewardModel, pairs: Dataset) -> dict[str, Estimate]:
    """Pair source -> accuracy with its interval, with the pairs of one prompt as one group."""
    chosen = reward.score_ids(column(pairs, "prompt_ids"), column(pairs, "chosen_ids"), None)
    rejected = reward.score_ids(
        column(pairs, "rejected_prompt_ids"), column(pairs, "rejected_ids"), None
    )
    right = ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).tolist()
    groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for source, key, value in zip(
        column(pairs, "source"), column(pairs, "prompt_key"), right, strict=True
    ):
        groups[source][key].append(value)
    return {
        source: ratio_interval([sum(v) for v in by.values()], [len(v) for v in by.values()])
        for source, by in sorted(groups.items())
    }


def _write_policy(
    folder: Path, facts: Facts, artefact: Artefact, licence: Licence, form: Form
) -> None:
    """Write the policy's weights unchanged, with a chat template where its own is plain."""
    base = _base_name(facts, artefact.path, form.base) if form.adapter else None
    if is_adapter(artefact.path) and base is None:
        model = load_model(artefact.path)
        _require_whole(model, artefact.path)
        model.save_pretrained(folder)
    else:
        for file in artefact.path.iterdir():
            if not file.name.startswith(TOKENIZER):
                shutil.copyfile(file, folder / file.name)
    if base is not None:
        _rename_base(folder, facts, form, base)
    tokenizer = load_tokenizer(artefact.path)
    template = chat_template(prompt_format(artefact.path), tokenizer)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    checksum = file_checksum(artefact.path)
    text = policy_card(facts, artefact, checksum, licence, adapter=base is not None)
    atomic_write(folder / "README.md", text)


def _base_name(facts: Facts, model: Path, given: str | None) -> str:
    """The base that an exported adapter names: the user's, or the recipe's model on the Hub.

    Raises UserError: the model is no adapter, or others cannot load its base.
    """
    if not is_adapter(model):
        raise UserError(
            f"--adapter: {facts.view.folder}: found a model whose weights are all trained, "
            "expected an adapter; leave --adapter out"
        )
    if given is not None:
        return given
    start = facts.stage_folder("start") / "model"
    own = Path(base_of(model)).resolve() != start.resolve()
    if own or facts.base_hub_id is None or facts.record("start")["metrics"].get("resized"):
        what = "a model of this run" if own else "no unchanged model of the Hub"
        raise UserError(
            f"--adapter: the adapter's base is {what}; expected --base, the Hub id or folder "
            "where others find the base, or leave --adapter out for a merged model"
        )
    return facts.base_hub_id


def _require_whole(model: PreTrainedModel, source: Path) -> None:
    """Raise UserError where an adapter could not be merged, because its base has 4 bits."""
    if has_adapter(model):
        raise UserError(
            f"{source}: found an adapter on a base of 4 bits; merged, it would be another model; "
            "expected --adapter"
        )


def _rename_base(folder: Path, facts: Facts, form: Form, base: str) -> None:
    """Write the base's name into an adapter's settings, and its revision if it is the recipe's."""
    revision = facts.view.recipe["model"]["revision"] if form.base is None else None
    file = folder / ADAPTER_CONFIG
    values = json.loads(file.read_text(encoding="utf-8"))
    values |= {"base_model_name_or_path": base, "revision": revision}
    atomic_write(file, to_json(values, indent=2) + "\n")


def sizes(folder: Path) -> list[tuple[str, int]]:
    """Files of an exported folder and their sizes in bytes."""
    return [(f.relative_to(folder).as_posix(), f.stat().st_size) for f in files_of(folder)]
