"""Export of LoRA adapters: alone, with a base that others can load, or merged into the base."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedModel

from irl_align.errors import UserError
from irl_align.hub.facts import Facts
from irl_align.models.lora import ADAPTER_CONFIG, base_of, has_adapter, is_adapter
from irl_align.utils.files import atomic_write, to_json


def base_name(facts: Facts, model: Path, given: str | None) -> str:
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


def require_whole(model: PreTrainedModel, source: Path) -> None:
    """Raise UserError where an adapter could not be merged, because its base has 4 bits."""
    if has_adapter(model):
        raise UserError(
            f"{source}: found an adapter on a base of 4 bits; merged, it would be another model; "
            "expected --adapter"
        )


def rename_base(folder: Path, base: str, revision: str | None) -> None:
    """Write the name of the base into the settings of the adapter in a folder."""
    file = folder / ADAPTER_CONFIG
    values = json.loads(file.read_text(encoding="utf-8"))
    values |= {"base_model_name_or_path": base, "revision": revision}
    atomic_write(file, to_json(values, indent=2) + "\n")
