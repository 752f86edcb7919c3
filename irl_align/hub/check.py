"""Check an exported reward: other tools, which read text, must give the scores of the run.

Legend of shapes: B rows, L tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextClassificationPipeline,
)
from trl.trainer.reward_trainer import suppress_seqcls_warning

from irl_align.data.columns import column, prompts_of
from irl_align.data.rows import Prompt, as_answer, as_messages, template_input
from irl_align.errors import UserError
from irl_align.models.loading import classifier_class, has_capped_attention, load_config
from irl_align.models.lora import is_adapter, saved_quantization
from irl_align.models.packing import TOKENS_PER_BATCH, Ids, batches_by_tokens, pad_right
from irl_align.reward.forward import bounded_and_centred
from irl_align.reward.model import RewardModel

logger = logging.getLogger(__name__)
TOLERANCE = 1e-5
"""Difference of scores, relative to the largest one, from which the export warns."""
LIMIT = 1e-3
"""Difference of scores, relative to the largest one, beyond which the export fails: more than the
rounding of float32 on any device."""
LIMIT_4_BIT = 0.1
"""The same where the base has 4 bits, whose kernels depend on the number of rows."""


@dataclass(frozen=True)
class RunScores:
    """Scores of B demonstrations' texts by the run's own reward."""

    prompts: list[Prompt]
    completions: list[str]
    ids: list[list[int]]
    """Token ids that are scored, of prompt and completion."""
    scores: Tensor
    """(B,)"""

    @classmethod
    def of(cls, reward: RewardModel, rows: Dataset) -> RunScores:
        """Scores of encoded demonstrations by a reward that is not yet exported."""
        prompts, completions = prompts_of(rows), column(rows, "completion")
        ids = read_ids(reward, prompts, completions)
        return cls(prompts, completions, ids, reward.score(prompts, completions))

    def require_equal(self, way: str, ids: Ids, scores: Tensor, rounding: float) -> float:
        """Largest difference of other scores (B,) of the same texts.

        ids: token ids that they were read as. rounding: difference that is allowed where these are
        equal, relative to the largest score. Raises UserError: a difference is larger.
        """
        difference = (scores - self.scores).abs()
        scale = max(1.0, float(self.scores.abs().max()))
        other = torch.tensor([list(a) != b for a, b in zip(ids, self.ids, strict=True)])
        wrong = (difference > torch.where(other, TOLERANCE, rounding) * scale).nonzero().flatten()
        largest = float(difference.max())
        if len(wrong):
            cause = "the weights give other scores for the same tokens"
            if other[wrong].any():
                cause = (
                    "the tokenizer divides prompt and answer differently where they are one text; "
                    "a template that ends in a newline or a special token often prevents it"
                )
            raise UserError(
                f"export: through {way}, {len(wrong)} of {len(scores)} held-out demonstrations "
                f"have scores up to {largest:.2g} away from the run's (row {int(wrong[0])} first): "
                f"{cause}; expected equal scores. `irl-align score` on the run's own folder is "
                "not affected"
            )
        if largest > TOLERANCE * scale:
            logger.warning("export: scores through %s differ by up to %.1e", way, largest)
        return largest


def read_ids(
    reward: RewardModel, prompts: Sequence[Prompt], completions: Sequence[str]
) -> list[list[int]]:
    """Token ids that a reward reads of texts, in one row each."""
    prompt_ids, completion_ids = reward.text_format().encode(prompts, completions)
    read = reward.as_read(prompt_ids, completion_ids)
    return [[*prompt, *rest] for prompt, rest in zip(prompt_ids, read, strict=True)]


def chat_texts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    **options: Any,
) -> list[Any]:
    """Chats by the tokenizer's template, as the code of a card builds them: token ids, or texts
    with tokenize=False."""
    render: Callable[..., Any] = tokenizer.apply_chat_template
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        chat, tools = template_input([*as_messages(prompt), *as_answer(completion)])
        rows.append(render(chat, tools=tools, return_dict=False, **options))
    return rows


def check_scores(folder: Path, reward: RewardModel, run: RunScores) -> float | None:
    """Largest difference between scores of texts by an exported reward and those of the run.

    reward: the folder's, as irl-align loads it. Texts are read in every way that the card shows: by
    irl-align, by the tokenizer on the text of the chat template, by `apply_chat_template`, and,
    unless it is an adapter, by the pipeline of transformers. None if transformers alone cannot give
    the score, which then has a log-prob term. Raises UserError: one of the ways gives other scores.
    """
    tokenizer, (prompts, completions) = reward.tokenizer, (run.prompts, run.completions)
    rounding = LIMIT_4_BIT if getattr(reward.model, "is_quantized", False) else LIMIT
    by_product = read_ids(reward, prompts, completions)
    run.require_equal("irl-align", by_product, reward.score(prompts, completions), rounding)
    if reward.settings.lm_coef:
        return None
    model: Any = plain_model(folder, tokenizer)
    model.to(reward.model.device)
    texts = chat_texts(tokenizer, prompts, completions, tokenize=False)
    by_text = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    by_chat = chat_texts(tokenizer, prompts, completions)
    ways = [
        ("the text of its chat template", by_text, plain_logits(model, by_text)),
        ("apply_chat_template", by_chat, plain_logits(model, by_chat)),
    ]
    if not is_adapter(folder):
        classify = TextClassificationPipeline(model=model, tokenizer=tokenizer, device=model.device)
        results = classify(texts, add_special_tokens=False)
        logits = torch.tensor([result["score"] for result in results])
        ways.append(("transformers' pipeline", by_text, logits))
    return max(
        run.require_equal(way, ids, bounded_and_centred(logits, reward.settings), rounding)
        for way, ids, logits in ways
    )


def adapter_options(folder: Path) -> dict[str, Any]:
    """Options with which peft loads the base of an adapter in a folder as the run did."""
    options: dict[str, Any] = {"dtype": torch.float32}
    quantization = saved_quantization(folder)
    if quantization is not None:
        options["quantization_config"] = quantization
    if has_capped_attention(load_config(folder)):
        options["attn_implementation"] = "eager"
    return options


def plain_model(folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """An exported reward, or its adapter with its base, as the code of its card loads it."""
    if not is_adapter(folder):
        config = load_config(folder)
        if classifier_class(config) is not AutoModelForSequenceClassification:
            raise UserError(
                f"{folder}: transformers has no sequence classifier of a {config.model_type}, so "
                "the code of a card could not load this reward; use it with irl-align score"
            )
        whole: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        return whole
    with suppress_seqcls_warning():  # the base has no head; it is the adapter's
        model = AutoPeftModelForSequenceClassification.from_pretrained(
            str(folder), num_labels=1, **adapter_options(folder)
        ).eval()
    adapted: PreTrainedModel = model.get_base_model()
    adapted.config.pad_token_id = tokenizer.pad_token_id
    return adapted


@torch.no_grad()
def plain_logits(model: PreTrainedModel, rows: Ids) -> Tensor:
    """Logits (B,) of rows of L token ids by transformers alone, as any other tool computes them."""
    logits = torch.empty(len(rows))
    for batch in batches_by_tokens([len(row) for row in rows], TOKENS_PER_BATCH):
        ids, mask = pad_right([rows[i] for i in batch], int(model.config.pad_token_id))
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits[batch] = model(input_ids=ids, attention_mask=mask).logits[:, 0].float().cpu()
    return logits
