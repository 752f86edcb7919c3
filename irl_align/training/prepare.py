"""Before the loop: demonstrations loaded, divided and encoded, the start model, and its SFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from irl_align.config.data import DataOptions
from irl_align.data.cards import Card, load_card
from irl_align.data.columns import column
from irl_align.data.encoding import encode_demonstrations, training_texts
from irl_align.data.loading import load_demonstrations
from irl_align.data.noise import with_noise
from irl_align.data.rows import Demonstration, Prompt
from irl_align.data.splits import data_checksum, divide
from irl_align.data.tokenizer import check_tokenizer, prepare_tokenizer, train_tokenizer
from irl_align.errors import UserError
from irl_align.models.loading import (
    check_adapter,
    load_model,
    load_tokenizer,
    save_model,
    scratch_model,
)
from irl_align.models.packing import context_length
from irl_align.models.sft import fit_sft, sft_columns
from irl_align.policy import Demonstrations, Policy
from irl_align.policy.roles import DATA, SFT, START, Role
from irl_align.training.context import RunContext, checksum, derive_seed
from irl_align.training.extra_prompts import extra_prompts, unread_prompts
from irl_align.training.store import Stage
from irl_align.utils.files import file_checksum

PARTS = ("sft", "reward", "held_out", "evaluation")


@dataclass(frozen=True)
class Data:
    """Encoded demonstrations by use; see tokens.encode_demonstrations for the columns."""

    card: Card
    sft: Dataset
    reward: Dataset
    held_out: Dataset
    evaluation: Dataset
    checksums: dict[str, str]
    """Checksum of each part's token ids: what the stages that read the part are keyed by."""
    context: int | None
    """Most tokens of prompt and completion together, the model's positions."""
    extra_prompts: list[Prompt]
    """Prompts without demonstrations that the policy update is to use."""
    unread_prompts: list[Prompt]
    """Prompts of the splits that this run does not read: the extra ones must be none of these, so
    that the policy is the same whichever split is evaluated. Empty without extra prompts."""

    def demonstrations(self, part: str) -> Demonstrations:
        """Token ids of one part."""
        rows = getattr(self, part)
        return Demonstrations(
            column(rows, "prompt_ids"), column(rows, "completion_ids"), self.checksums[part]
        )


def prepare(context: RunContext) -> tuple[Data, Policy]:
    """Load and divide the demonstrations, make or load the start model, encode the rows."""
    recipe = context.recipe
    options = recipe.data
    card = _card(options)
    seed = derive_seed(recipe.seed, "data")

    def load(split: str) -> list[Demonstration]:
        return load_demonstrations(card, split, options.path, options.task, recipe.seed)

    division, noisy = with_noise(divide(load("train"), options, seed), options.noise, seed)
    rows = {
        "sft": division.sft,
        "reward": division.reward,
        "held_out": division.held_out,
        "evaluation": load(recipe.evaluation.split),
    }
    sums = {part: data_checksum(some) for part, some in rows.items()}
    own = (row["prompt"] for row in division.reward)
    extra = extra_prompts(recipe.policy_update, card, own, recipe.seed)
    unread = unread_prompts(card, {"train", recipe.evaluation.split}, load) if extra else []
    start = start_model(context, card, division.sft, sums["sft"])
    for option, lora in (("model", recipe.model.lora), ("reward", recipe.reward.lora)):
        if lora is not None:
            check_adapter(start.path, lora, f"{option}.lora", recipe.model.trust_remote_code)
    context.tokenizer = load_tokenizer(start.path)

    stage = _encoded(context, card, start, rows, division.counts(), sums)
    found = {"checksums": sums, "licence": card.license, "noisy": noisy, **stage.metrics}
    context.run.log(str(DATA), found)
    parts = {
        part: Dataset.from_parquet(str(stage.path / f"{part}.parquet"), keep_in_memory=True)
        for part in PARTS
    }
    limit = stage.metrics.get("context")
    sums = stage.metrics["token_checksums"]
    return Data(
        card, checksums=sums, context=limit, extra_prompts=extra, unread_prompts=unread, **parts
    ), start


def _encoded(
    context: RunContext,
    card: Card,
    start: Policy,
    rows: Mapping[str, list[Demonstration]],
    counts: Mapping[str, int],
    sums: Mapping[str, str],
) -> Stage:
    """Token ids of every part's rows, as a stage: a file each, and what was counted."""
    options = context.recipe.data

    def build(work: Path) -> dict[str, Any]:
        limit = context_length(context.load_policy(start.path))
        found: dict[str, Any] = {**counts, "context": limit, "token_checksums": {}}
        for part, some in rows.items():
            encoded = encode_demonstrations(some, context.tokenizer, card, options, limit)
            encoded.rows.to_parquet(str(work / f"{part}.parquet"))
            found[f"{part}_overlong"] = encoded.dropped
            prompts, completions = (
                column(encoded.rows, name) for name in ("prompt_ids", "completion_ids")
            )
            found[f"{part}_tokens"] = sum(map(len, completions))
            pairs = zip(prompts, completions, strict=True)
            found["token_checksums"][part] = checksum([ids for pair in pairs for ids in pair])
        return found

    limits = ("max_prompt_tokens", "max_completion_tokens", "overlong")
    return context.stage(
        DATA,
        "data",
        {
            "card": {"template": card.template, "lowercase": card.lowercase, "name": card.name},
            "limits": {name: getattr(options, name) for name in limits},
        },
        {"tokenizer": start.key, **sums},
        build,
        alone=True,
    )


def _card(options: DataOptions) -> Card:
    """The data's card, with the recipe's own edit where it names one."""
    card = load_card(options.card)
    return card if options.edit is None else card.model_copy(update={"edit": options.edit})


def start_model(context: RunContext, card: Card, rows: Sequence[Any], rows_sum: str) -> Policy:
    """The model before SFT with its tokenizer, as a folder: made from scratch, or copied once."""
    options = context.recipe.model

    def build(work: Path) -> dict[str, Any]:
        resized = False
        if options.from_scratch is not None:
            tokenizer: Any = train_tokenizer(
                training_texts(rows, card), options.from_scratch.vocab_size
            )
            seed = derive_seed(context.recipe.seed, "weights") % 2**63
            model = scratch_model(options.from_scratch, tokenizer, seed)
        else:
            assert options.path is not None
            hub: dict[str, Any] = {
                "revision": options.revision,
                "trust_remote_code": options.trust_remote_code,
            }
            tokenizer = load_tokenizer(options.path, **hub)
            model = load_model(options.path, **hub)
            if options.chat_template is not None:
                tokenizer.chat_template = read_template(options.chat_template)
            resized = prepare_tokenizer(tokenizer)
            if resized:
                model.resize_token_embeddings(len(tokenizer))
        check_tokenizer(tokenizer, needs_chat=card.template == "chat")
        model.config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.config.irl_prompt = {
            "name": card.name,
            "template": card.template,
            "lowercase": card.lowercase,
        }
        save_model(model, tokenizer, work / "model")
        sizes = {"parameters": model.num_parameters(), "vocabulary": len(tokenizer)}
        return {**sizes, "resized": resized}

    settings = options.model_dump(exclude={"path", "lora", "quantization"})
    if options.quantization is not None:  # decides what the model says, though not its files
        settings["quantization"] = options.quantization.model_dump()
    settings["card"] = [card.name, card.template, card.lowercase]
    if options.path is None:
        inputs = {"tokenizer_rows": rows_sum}
    elif Path(options.path).exists():
        inputs = {"model": file_checksum(Path(options.path))}
    else:
        inputs = {"model": f"{options.path}@{options.revision or 'main'}"}
    stage = context.stage(START, "start", settings, inputs, build, alone=True)
    context.names[stage.key] = str(START)
    return Policy(stage.path / "model", stage.key)


def supervise(context: RunContext, start: Policy, data: Data) -> Policy:
    """pi_0: SFT of the start model on the demonstrations, or the start model itself."""
    options = context.recipe.sft
    if not options.enabled:
        return start

    def build(work: Path) -> dict[str, Any]:
        model = (
            context.load_policy(start.path) if options.full else context.load_trainable(start.path)
        )
        columns = sft_columns(column(data.sft, "prompt_ids"), column(data.sft, "completion_ids"))
        metrics = fit_sft(
            model, context.tokenizer, columns, options.args, context.training(work, "SFT")
        )
        save_model(model, context.tokenizer, work / "model")
        return metrics

    stage = context.stage(
        SFT,
        "sft",
        {"args": options.args, **({} if options.full else context.adapted)},
        {"start": start.key, "data": data.checksums["sft"]},
        build,
    )
    context.names[stage.key] = str(Role.policy(0))
    return Policy(stage.path / "model", stage.key)


def read_template(path: str) -> str:
    """Text of a chat template's file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template: {path}: cannot be read: {error}") from error
