"""Before the loop: load, divide and encode the demonstrations; make the start model and its SFT."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from irl_align.config.model import ModelOptions, SFTOptions
from irl_align.config.schema import Recipe
from irl_align.data.cards import Card, load_card
from irl_align.data.columns import by_prompt_key, column, read_parquet
from irl_align.data.encoding import encode_demonstrations, training_texts
from irl_align.data.loading import load_demonstrations, load_preferences
from irl_align.data.noise import with_noise
from irl_align.data.parsing import learned_turns
from irl_align.data.prompt_keys import same_prompts
from irl_align.data.rows import Demonstration, opening
from irl_align.data.splits import data_checksum, divide
from irl_align.data.tokenizer import check_tokenizer, prepare_tokenizer, train_tokenizer
from irl_align.errors import UserError
from irl_align.models.loading import (
    check_adapter,
    check_classifier,
    embedding_rows,
    eos_ids,
    load_config,
    load_model,
    load_tokenizer,
    save_model,
    scratch_model,
    seeded,
    vocabulary_size,
)
from irl_align.models.lora import base_of, is_adapter
from irl_align.models.packing import context_length
from irl_align.models.sft import conversation_columns, fit_sft
from irl_align.policy import Policy
from irl_align.policy.roles import DATA, SFT, START, Role
from irl_align.reward.model import require_plain_logits
from irl_align.training.context import RunContext
from irl_align.training.extra_prompts import extra_prompts, unread_prompts
from irl_align.training.function_inputs import prepare_functions
from irl_align.training.iteration import Data, RawData
from irl_align.training.keys import checksum, derive_seed
from irl_align.training.store import Stage
from irl_align.utils.files import file_checksum

logger = logging.getLogger(__name__)
USES = ("sft", "reward", "held_out", "evaluation")
_COLUMNS = (
    "prompt",
    "messages",
    "completion",
    "prompt_ids",
    "completion_ids",
    "prompt_key",
    "seen",
)


def recipe_card(recipe: Recipe) -> Card:
    """The data's card, with the recipe's own edit if it names one."""
    card, edit = load_card(recipe.data.card), recipe.data.edit
    return card if edit is None else card.model_copy(update={"edit": edit})


def load_data(recipe: Recipe, needs_tokenizer: bool = True) -> RawData:
    """Load the texts that a recipe reads, and divide the demonstrations by use.

    Prompts that the model's tokenizer encodes as the same ids are in the same part.
    needs_tokenizer: if it is False and the tokenizer cannot be loaded, only prompts of the same
    text count as the same.

    Raises UserError: data cannot be read, a part of it would be empty, or there is no tokenizer.
    """
    options, card = recipe.data, recipe_card(recipe)
    seed = derive_seed(recipe.seed, "data")

    def load(split: str) -> list[Demonstration]:
        return load_demonstrations(card, split, options.path, options.task, recipe.seed)

    train = load("train")
    tokenizer = _known_tokenizer(recipe, needs_tokenizer)
    same = same_prompts((opening(row["prompt"]) for row in train), tokenizer, card)
    division, noisy = with_noise(divide(train, options, seed, same), options.noise, seed)
    rows = {
        "sft": division.sft,
        "reward": division.reward,
        "held_out": division.held_out,
        "evaluation": load(recipe.evaluation.split),
    }
    _log_turns(division.sft, recipe.sft)
    own = (row["prompt"] for row in division.reward)
    extra = extra_prompts(recipe.policy_update, card, own, recipe.seed)
    unread = unread_prompts(card, {"train", recipe.evaluation.split}, load) if extra else []
    pairs = recipe.reward.preferences
    return RawData(
        card,
        rows,
        {use: data_checksum(texts) for use, texts in rows.items()},
        division.counts(same),
        noisy,
        [] if pairs is None else load_preferences(load_card(pairs.card), pairs.split, pairs.path),
        extra,
        unread,
    )


def _known_tokenizer(recipe: Recipe, needed: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a recipe's model; None if it is trained from scratch, or is not needed and
    cannot be loaded."""
    if recipe.model.from_scratch is not None:
        return None
    try:
        return model_tokenizer(recipe.model)
    except UserError:
        if needed:
            raise
        return None


def model_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.path`, with `model.chat_template` if it is set.

    Raises UserError: it cannot be loaded.
    """
    assert options.path is not None
    tokenizer = load_tokenizer(
        options.path, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    if options.chat_template is not None:
        tokenizer.chat_template = read_template(options.chat_template)
    return tokenizer


def _log_turns(rows: Sequence[Demonstration], options: SFTOptions) -> None:
    """Log which turns are learned, where conversations have several of the assistant."""
    earlier = sum(len(row.get("earlier", ())) for row in rows)
    if earlier and options.enabled:
        learned = "also" if options.turns == "all" else "not"
        logger.info(
            "%d conversations: SFT learns the last turn of the assistant and %s the %d turns "
            "before it (sft.turns: %s); pairs are made with the last turn",
            *(len(rows), learned, earlier, options.turns),
        )


def prepare(context: RunContext, raw: RawData) -> tuple[Data, Policy]:
    """Make or load the start model, and encode the demonstrations."""
    recipe = context.recipe
    stage = _start_model(context, raw)
    start = Policy(stage.path / "model", stage.key)
    context.models.start_from(start)
    if not stage.missing:
        config = load_config(start.path, trust_remote_code=recipe.model.trust_remote_code)
        check_model(recipe, config, start.path)
    for option, lora in (("model", recipe.model.lora), ("reward", recipe.reward.lora)):
        if lora is not None and not stage.missing:
            check_adapter(start.path, lora, f"{option}.lora", recipe.model.trust_remote_code)

    encoded = _encode(context, raw, start)
    texts = {"checksums": dict(raw.checksums), "licence": raw.card.license, "noisy": raw.noisy}
    context.log(DATA, {**texts, **encoded.metrics})
    if seen := encoded.metrics.get("evaluation_seen"):
        logger.warning(
            "evaluation: %d of the %d prompts of split %s are in the training data as well; "
            "results are also reported for seen and unseen prompts apart",
            seen,
            encoded.metrics["evaluation_prompts"],
            recipe.evaluation.split,
        )
    sums = encoded.metrics.get("token_checksums", dict.fromkeys(USES, encoded.key))
    parts = {use: _encoded_rows(encoded, use) for use in USES}
    data = Data(raw, checksums=sums, context=encoded.metrics.get("context"), **parts)
    prepare_functions(context, data)
    return data, start


def check_model(recipe: Recipe, config: PreTrainedConfig, folder: Path | None) -> None:
    """Raise UserError, before any training, if the model cannot do what the loop asks of it.

    folder: of the model, if its weights are there.
    """
    if not recipe.loop.iterations:
        return
    if recipe.reward.kind == "explicit":
        check_classifier(config)
    if recipe.reward.lm_coef and folder is not None:
        remote = recipe.model.trust_remote_code
        require_plain_logits(load_model(folder, trust_remote_code=remote))


def _encoded_rows(stage: Stage, use: str) -> Dataset:
    if stage.missing:
        return Dataset.from_dict({name: [] for name in _COLUMNS})
    return read_parquet(stage.path / f"{use}.parquet")


def _encode(context: RunContext, raw: RawData, start: Policy) -> Stage:
    """Token ids of the rows of every use, as a stage: a file each, and counts."""
    options, card, turns = context.recipe.data, raw.card, context.recipe.sft.turns

    def build(work: Path) -> dict[str, Any]:
        limit = context_length(context.models.load_policy(start.path))
        sums = dict[str, str]()
        metrics: dict[str, Any] = {**raw.counts, "context": limit, "token_checksums": sums}
        trained = set[tuple[int, ...]]()
        for use, demonstrations in raw.rows.items():
            all_turns = use == "sft" and turns == "all"
            texts = learned_turns(demonstrations) if all_turns else demonstrations
            encoded = encode_demonstrations(texts, context.tokenizer, card, options, limit)
            known = [tuple(ids) in trained for ids in column(encoded.rows, "prompt_ids")]
            rows = encoded.rows.add_column("seen", known)
            if use in ("sft", "reward"):
                trained |= set(map(tuple, column(encoded.rows, "prompt_ids")))
            rows.to_parquet(str(work / f"{use}.parquet"))
            metrics[f"{use}_overlong"] = encoded.dropped
            prompts, completions = (
                column(encoded.rows, name) for name in ("prompt_ids", "completion_ids")
            )
            metrics[f"{use}_tokens"] = sum(map(len, completions))
            pairs = zip(prompts, completions, strict=True)
            sums[use] = checksum([ids for pair in pairs for ids in pair])
        seen = by_prompt_key(rows, "seen")  # of the last use, evaluation
        return {**metrics, "evaluation_prompts": len(seen), "evaluation_seen": sum(seen.values())}

    limits = ("max_prompt_tokens", "max_completion_tokens", "overlong")
    return context.stage(
        DATA,
        "data",
        {
            "card": {"template": card.template, "lowercase": card.lowercase, "name": card.name},
            "limits": {name: getattr(options, name) for name in limits},
            "faulty": card.faulty,
            "turns": turns,
            "columns": _COLUMNS,
        },
        {"tokenizer": start.key, **raw.checksums},
        build,
        main_only=True,
    )


def _start_model(context: RunContext, raw: RawData) -> Stage:
    """The model before SFT with its tokenizer: made from scratch, or copied once."""
    options, card = context.recipe.model, raw.card

    def build(work: Path) -> dict[str, Any]:
        model, tokenizer, resized = _make_start(context, card, raw.rows["sft"])
        check_tokenizer(tokenizer, card.template)
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

    settings = options.model_dump(exclude={"path", "lora"})
    settings["card"] = [card.name, card.template, card.lowercase]
    if options.path is None:
        inputs = {"tokenizer_rows": raw.checksums["sft"]}
    elif Path(options.path).exists():
        inputs = {"model": file_checksum(Path(options.path))}
        if is_adapter(options.path) and Path(base := base_of(options.path)).exists():
            inputs["base"] = file_checksum(Path(base))
    else:
        inputs = {"model": f"{options.path}@{options.revision or 'main'}"}
    return context.stage(START, "start", settings, inputs, build, main_only=True)


def _make_start(context: RunContext, card: Card, rows: Sequence[Any]) -> tuple[Any, Any, bool]:
    """The start model, its tokenizer, and whether its embeddings grew for the tokenizer."""
    options = context.recipe.model
    if options.from_scratch is not None:
        tokenizer: Any = train_tokenizer(
            training_texts(rows, card), options.from_scratch.vocab_size
        )
        seed = derive_seed(context.recipe.seed, "weights") % 2**63
        return scratch_model(options.from_scratch, tokenizer, seed), tokenizer, False
    assert options.path is not None
    hub: dict[str, Any] = {
        "revision": options.revision,
        "trust_remote_code": options.trust_remote_code,
    }
    tokenizer, model = model_tokenizer(options), load_model(options.path, **hub)
    stops = set() if tokenizer.eos_token_id is None else set(eos_ids(model, tokenizer))
    prepare_tokenizer(tokenizer, card.template)
    end = int(tokenizer.eos_token_id)
    if others := sorted(stops - {end}):  # other tools stop there as well
        model.generation_config.eos_token_id = [end, *others]
    needed = vocabulary_size(tokenizer)
    resized = needed > embedding_rows(model)  # many models have more rows than tokens
    if resized:
        with seeded(derive_seed(context.recipe.seed, "weights") % 2**63):
            model.resize_token_embeddings(needed)
    return model, tokenizer, resized


def supervise(context: RunContext, start: Policy, data: Data) -> Policy:
    """pi_0: SFT of the start model on the demonstrations, or the start model itself."""
    options, models = context.recipe.sft, context.models
    if not options.enabled:
        return start

    def build(work: Path) -> dict[str, Any]:
        load = models.load_policy if options.full else models.load_trainable
        model = load(start.path)
        prompts, completions = (column(data.sft, name) for name in ("prompt_ids", "completion_ids"))
        columns = conversation_columns(prompts, completions)
        training = context.training(work, "SFT")
        metrics = fit_sft(
            model, context.tokenizer, columns, options.args, training, checkpoint=options.checkpoint
        )
        save_model(model, context.tokenizer, work / "model")
        return metrics

    kept = {} if options.checkpoint is None else {"checkpoint": options.checkpoint}
    stage = context.stage(
        SFT,
        "sft",
        {"args": options.args, **({} if options.full else models.adapted), **kept},
        {"start": start.key, "data": data.checksums["sft"]},
        build,
    )
    policy = Policy(stage.path / "model", stage.key)
    models.name(policy, str(Role.policy(0)))
    return policy


def read_template(path: str) -> str:
    """Text of a chat template's file."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template: {path}: cannot be read: {error}") from error
