"""`train RECIPE --smoke`: run the code of a recipe in seconds, with a tiny model and tiny data.

Losses, credit, pair sources, windows, schedules and the policy update are those of the recipe. The
model has the same architecture with tiny sizes. The data are made up, in the columns and with the
template of the recipe's card. So the numbers mean nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from irl_align.config.data import DataOptions
from irl_align.config.model import ModelOptions
from irl_align.config.recipe import load_recipe, to_dict
from irl_align.config.schema import Recipe
from irl_align.config.yaml import dump_yaml
from irl_align.data.cards import Card, load_card
from irl_align.data.encoding import encode_demonstrations
from irl_align.data.loading import load_demonstrations
from irl_align.data.rows import Demonstration, completion_text, prompt_text
from irl_align.data.tokenizer import prepare_tokenizer, train_tokenizer
from irl_align.errors import UserError
from irl_align.models.loading import load_tokenizer, pick_device, seeded
from irl_align.training.prepare import read_template
from irl_align.training.smoke_data import NOTICE, write_demonstrations, write_preferences
from irl_align.training.train import Result, train
from irl_align.utils import distributed
from irl_align.utils.files import atomic_write

_MARK = "SMOKE"  # a file in folders that a smoke run may clear
# A text has more tokens in a tiny vocabulary.
_LIMITS: dict[str, Any] = {"max_prompt_tokens": 256, "max_completion_tokens": 192}
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}
_KEY_VALUE_HEADS = 1  # grouped-query attention where the architecture has it
_VOCABULARY = 512
_LARGEST = 5_000_000  # parameters; an architecture with other names for its sizes is larger
_LEARN: dict[str, Any] = {"max_steps": 40, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
"""Training after which the samples of a tiny model end; without EOS they would make no pairs."""
_STEPS = 2  # of every training of the recipe

_NAMES = {
    "mistral": "mistral",
    "zephyr": "mistral",
    "pythia": "gpt_neox",
    "gpt-neox": "gpt_neox",
    "gpt2": "gpt2",
    "gpt-j": "gptj",
    "gptj": "gptj",
    "llama": "llama",
    "smollm": "llama",
    "qwen3": "qwen3",
    "qwen": "qwen2",
    "gemma-2-": "gemma2",
    "gemma": "gemma",
    "phi-2": "phi",
    "phi": "phi3",
    "opt-": "opt",
}
"""Part of a Hub id -> architecture, for models that cannot be reached; the first match counts."""

# The template for chat cards when the tokenizer on the Hub cannot be reached.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def smoke_folder(recipe: Recipe) -> Path:
    """Folder of a recipe's smoke run: its inputs, its store and its run folder."""
    return Path(recipe.output_dir) / "smoke" / f"{recipe.name}-seed{recipe.seed}"


def run_smoke(recipe: Recipe) -> Result:
    """Run the tiny copy of a recipe from its start, in a folder of its own.

    No earlier smoke run is reused, since the code may have changed. Raises UserError: there is no
    tiny model of the architecture, or the run itself fails with one.
    """
    folder = smoke_folder(recipe)
    if folder.exists() and not (folder / _MARK).exists():
        raise UserError(
            f"output_dir: {folder} is not the folder of a smoke run; move it, or choose another"
        )

    def prepare() -> Recipe:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / _MARK).write_text(NOTICE + "\n", encoding="utf-8")
        return smoke_recipe(recipe, folder)

    with distributed.joined(distributed.own_device(pick_device(recipe.device))):
        return train(distributed.on_main(prepare))


def smoke_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """The tiny copy of a recipe; its data and model are written to folder/inputs."""
    inputs = folder / "inputs"
    values = to_dict(recipe)
    values["output_dir"], values["report_to"] = str(folder), []
    card = load_card(write_demonstrations(recipe, inputs))
    values["data"] |= {
        "card": str(card.folder / f"{card.name}.md"),
        "path": None,
        "task": {},
        "edit": None,
        "share": 1.0,
        "held_out": 0.25,
        **_LIMITS,
    }
    preferences = recipe.reward.preferences
    if preferences is not None:
        path = write_preferences(load_card(preferences.card), preferences.split, inputs)
        values["reward"]["preferences"] |= {"card": str(path), "path": None}
    if recipe.pairs.contrast == "edit" and card.edit is None:  # the edit needs the card's prompts
        plain = {"contrast": "neighbour", "contrast_edits": 1, "contrast_crossed": False}
        values["pairs"] |= plain
    if card.gold is None:
        values["evaluation"]["match_entropy"] = False
    update = values["policy_update"]
    if "edited_prompts" in update:
        edits = update["edited_prompts"] if card.edit is not None else 0
        update |= {"edited_prompts": edits, "prompts_from": None}
    if recipe.model.from_scratch is None:
        write_model(recipe.model, card, inputs / "model")
        values["model"] |= {"path": str(inputs / "model"), "revision": None}
    else:
        heads = recipe.model.from_scratch.num_key_value_heads and _KEY_VALUE_HEADS
        sizes = {**_SIZES, "vocab_size": _VOCABULARY, "num_key_value_heads": heads}
        values["model"]["from_scratch"] |= sizes
    _shrink(values)
    if recipe.model.from_scratch is not None:
        values["sft"]["args"] |= {**_LEARN, "warmup_steps": 0}
    path = inputs / "recipe.yaml"
    atomic_write(path, dump_yaml(values))
    return load_recipe(path)


# ---- sizes


def _shrink(values: dict[str, Any]) -> None:
    """Reduce prompts, steps and samples in a recipe's plain values, and switch its signs off."""
    _at_most(values["generation"], max_new_tokens=48, samples_per_prompt=2)
    values["generation"] |= {"backend": "transformers", "engine": {}, "server": {}}
    _small_args(values["sft"]["args"])
    reward, update = values["reward"], values["policy_update"]
    if reward["kind"] != "none" and reward["numerator"] == "fitted":
        _small_args(reward["args"], reward["schedule"])
        _at_most(reward, max_pairs=32)
    if "args" in update and update.get("use") != "select":
        _small_args(update["args"])
    if update["kind"] == "best_of_n":
        _at_most(update, n=4, prompts=12)
        _at_most(update, keep=update["n"] // 2)
    if update["kind"] == "ppo":
        _at_most(update, n=2, epochs=2, minibatches=2, held_out_prompts=4)
        _at_most(update, evaluate_every=1, checkpoint_every=1)
        update["batch_size"] = 4 * update["n"]
        update["episodes"] = _STEPS * update["batch_size"]
    _at_most(values["evaluation"], prompts=4, held_out_prompts=8)
    values["evaluation"]["prompts"] = values["evaluation"]["prompts"] or 4
    bounds = ("entropy_high", "kl", "length_change", "demonstration_log_prob")
    values["loop"]["signs"] |= dict.fromkeys(bounds, 1e9)
    values["loop"]["signs"] |= {"older_drop": 1.0, "missing_eos": 1.0, "entropy_low": 0.0}
    values["loop"]["signs"] |= {"two_sample_accuracy": 0.0, "unfit_accuracy": 0.0, "action": "warn"}


def _at_most(options: dict[str, Any], **limits: int) -> None:
    for name, limit in limits.items():
        if options[name] is not None:
            options[name] = min(options[name], limit)


def _small_args(args: dict[str, Any], schedule: dict[str, Any] | None = None) -> None:
    """Two small steps of a TRL trainer; fields that the schedule sets are left alone."""
    few = {
        "max_steps": _STEPS,
        "per_device_train_batch_size": min(args.get("per_device_train_batch_size", 4), 4),
        "gradient_accumulation_steps": min(args.get("gradient_accumulation_steps", 1), 2),
        "logging_steps": 1,
    }
    args |= {name: value for name, value in few.items() if name not in (schedule or {})}


# ---- model


def write_model(options: ModelOptions, card: Card, folder: Path) -> None:
    """Write a tiny model of the architecture of options.path, and its tokenizer, to a folder.

    Random weights are trained for a few steps on the tiny data, so that samples end.
    Raises UserError: the architecture is not known, or has no tiny model.
    """
    rows = load_demonstrations(card, "train")
    architecture = _architecture(options)
    tokenizer = _tokenizer(options, card, rows)
    prepare_tokenizer(tokenizer, card.template)
    model = _tiny_model(architecture, tokenizer, str(options.path))
    limits = DataOptions(card=card.name, **_LIMITS)
    encoded = encode_demonstrations(rows, tokenizer, card, limits).rows
    _learn(model, list(zip(encoded["prompt_ids"], encoded["completion_ids"], strict=True)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _architecture(options: ModelOptions) -> str:
    """The model type in the config, or by the model's name if the Hub cannot be reached."""
    path = str(options.path)
    try:
        config = AutoConfig.from_pretrained(path, revision=options.revision)
        return str(config.get_text_config().model_type)
    except Exception as error:  # transformers and the hub raise many kinds
        if Path(path).exists():
            cause = " ".join(str(error).split())[:200]
            raise UserError(f"model.path: {path}: no config of a known model: {cause}") from error
        name = path.lower()
        for part, architecture in _NAMES.items():
            if part in name:
                return architecture
        raise UserError(
            f"model.path: {path}: found no such folder, the Hub cannot be reached, and the name "
            f"shows no architecture for --smoke; expected one of {', '.join(_NAMES)} in it"
        ) from error


def _tokenizer(
    options: ModelOptions, card: Card, rows: Sequence[Demonstration]
) -> PreTrainedTokenizerBase:
    """A tokenizer of the model's kind, special tokens and template, with a tiny vocabulary.

    If the model is on the Hub and cannot be reached, a plain tokenizer.
    """
    path = str(options.path)
    texts = [prompt_text(row["prompt"]) for row in rows]
    texts += [completion_text(row["completion"]) for row in rows]
    tokenizer: Any
    try:
        own: Any = load_tokenizer(path, revision=options.revision)
        size = _VOCABULARY + len(own.added_tokens_decoder)
        tokenizer = own.train_new_from_iterator(texts, size, show_progress=False)
    except UserError:
        if Path(path).exists():
            raise
        tokenizer = train_tokenizer(texts, _VOCABULARY)
        if card.template == "chat":
            tokenizer.chat_template = _CHAT_TEMPLATE
    if options.chat_template is not None:
        tokenizer.chat_template = read_template(options.chat_template)
    return tokenizer  # type: ignore[no-any-return]


def _tiny_model(
    architecture: str, tokenizer: PreTrainedTokenizerBase, path: str
) -> PreTrainedModel:
    """A two-layer model of random weights."""

    def make(device: str) -> PreTrainedModel:
        config = AutoConfig.for_model(
            architecture,
            **_SIZES,
            num_key_value_heads=_KEY_VALUE_HEADS,
            head_dim=_SIZES["hidden_size"] // _SIZES["num_attention_heads"],
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        with seeded(0), torch.device(device):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return model

    try:
        parameters = make("meta").num_parameters()
        if parameters > _LARGEST:
            raise ValueError(f"its sizes have other names: {parameters} parameters")
        return make("cpu")
    except Exception as error:  # each architecture has its own
        cause = " ".join(str(error).split())[:120]
        raise UserError(
            f"model.path: {path}: no tiny model of architecture {architecture} for --smoke, "
            f"expected a causal language model such as {', '.join(sorted(set(_NAMES.values())))}: "
            f"{cause}"
        ) from error


def _learn(model: PreTrainedModel, rows: Sequence[tuple[list[int], list[int]]]) -> None:
    """Train for a few steps on the cross-entropy of completions."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=_LEARN["learning_rate"])
    model.train()
    with seeded(1):
        for batch in _batches(len(rows)):
            ids = [torch.tensor(rows[i][0] + rows[i][1]) for i in batch]
            labels = [torch.tensor([-100] * len(rows[i][0]) + rows[i][1]) for i in batch]
            pad: Callable[..., torch.Tensor] = torch.nn.utils.rnn.pad_sequence  # (B, L), right
            loss = model(input_ids=pad(ids, True), labels=pad(labels, True, -100)).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.eval()


def _batches(rows: int) -> Iterator[list[int]]:
    for _ in range(_LEARN["max_steps"]):
        yield torch.randperm(rows)[: _LEARN["per_device_train_batch_size"]].tolist()
