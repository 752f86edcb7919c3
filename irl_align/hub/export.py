"""Export a reward, a policy or pairs of a run to a folder that other tools load."""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedModel

from irl_align.data.columns import column, read_parquet
from irl_align.data.pairs import load_pairs
from irl_align.errors import UserError
from irl_align.evaluation.inference import prompt_format
from irl_align.hub.card import policy_card, reward_card
from irl_align.hub.check import RunScores, adapter_options, check_scores
from irl_align.hub.facts import KINDS, UNKNOWN, Artefact, Facts, Licence, derive
from irl_align.hub.pairs import write_pairs
from irl_align.hub.results import Measured
from irl_align.hub.weights import as_one_head, chat_template, edit_json, keep_attention, save_plain
from irl_align.models.loading import folder_eos_ids, load_model, load_tokenizer, pick_device
from irl_align.models.lora import (
    ADAPTER_CONFIG,
    base_of,
    has_adapter,
    is_adapter,
)
from irl_align.reward.composed import member_folders
from irl_align.reward.model import RewardModel
from irl_align.utils.files import (
    atomic_folder,
    atomic_write,
    explains_full_disk,
    file_checksum,
    files_of,
)
from irl_align.utils.statistics import Estimate, clustered_share

logger = logging.getLogger(__name__)
CHECKED = 256  # at most as many held-out demonstrations are scored by the export and by the run
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
    rows = read_parquet(path)
    rows = rows.select(range(0, len(rows), -(-len(rows) // CHECKED)))
    base = _base_name(facts, artefact.path, form.base) if form.adapter else None
    if count := len(member_folders(artefact.path)):
        raise UserError(
            f"export: found an ensemble of {count} models, expected one model or an ensemble of "
            f"heads; each is a model of its own: {member_folders(artefact.path)[0]}"
        )
    reward = RewardModel.from_pretrained(artefact.path, pick_device("auto"), merge=base is None)
    if base is None:
        _require_whole(reward.model, artefact.path)
    own = RunScores.of(reward, rows)
    as_one_head(reward)
    save_plain(reward, folder)
    if base is not None:  # until the check is done: the base's folder in this store
        _name_base(folder, base_of(artefact.path), None)
    reward = RewardModel.from_pretrained(folder, pick_device("auto"), merge=base is None)
    pairs = load_pairs(facts.pairs()[artefact.iteration] / "held_out.parquet")
    measured = Measured(
        rows=len(rows),
        difference=check_scores(folder, reward, own),
        held_out=_accuracy(reward, pairs),
        pairs=len(pairs),
        source_checksum=file_checksum(artefact.path),
    )
    if base is not None:
        _name_base(folder, base, _base_revision(facts, form))
    options = None if base is None else adapter_options(folder)
    text = reward_card(facts, artefact, reward.settings, measured, licence, adapter=options)
    atomic_write(folder / "README.md", text)


def _accuracy(reward: RewardModel, pairs: Dataset) -> dict[str, Estimate]:
    """Pair source -> accuracy with its interval, with the pairs of one prompt as one group."""
    chosen = reward.score_ids(column(pairs, "prompt_ids"), column(pairs, "chosen_ids"), None)
    rejected = reward.score_ids(
        column(pairs, "rejected_prompt_ids"), column(pairs, "rejected_ids"), None
    )
    right = ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).tolist()
    groups: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for source, key, value in zip(
        column(pairs, "source"), column(pairs, "prompt_key"), right, strict=True
    ):
        groups[source].append((value, key))
    return {
        source: clustered_share(*zip(*rows, strict=True)) for source, rows in sorted(groups.items())
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
        _name_base(folder, base, _base_revision(facts, form))
    keep_attention(folder)
    tokenizer = load_tokenizer(artefact.path)
    template = chat_template(prompt_format(artefact.path), tokenizer)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    stops = folder_eos_ids(artefact.path, tokenizer)
    edit_json(folder / "generation_config.json", eos_token_id=stops)  # other tools stop there too
    checksum = file_checksum(artefact.path)
    options = None if base is None else adapter_options(folder)
    text = policy_card(facts, artefact, checksum, licence, adapter=options)
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


def _base_revision(facts: Facts, form: Form) -> str | None:
    """The revision of the base that an adapter names: the recipe's, if the base is the recipe's."""
    revision: str | None = facts.view.recipe["model"]["revision"]
    return revision if form.base is None else None


def _name_base(folder: Path, base: str, revision: str | None) -> None:
    """Write the base's name and revision into an adapter's settings."""
    edit_json(folder / ADAPTER_CONFIG, base_model_name_or_path=base, revision=revision)


def sizes(folder: Path) -> list[tuple[str, int]]:
    """Files of an exported folder and their sizes in bytes."""
    return [(f.relative_to(folder).as_posix(), f.stat().st_size) for f in files_of(folder)]
