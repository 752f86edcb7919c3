"""Conversations as rewards of other projects read them: whole, by their own chat template.

Model cards of such rewards call `apply_chat_template` once on prompt and answer, and read the logit
of the last token, whatever the template writes at the end. Some templates render no prompt without
an answer, and some write other text before the last answer than before earlier ones.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from irl_align.data.decoding import PROBE
from irl_align.data.encoding import Templated, encode_prompts
from irl_align.data.rows import (
    Completion,
    Message,
    Prompt,
    as_answer,
    as_messages,
    completion_text,
    lowered,
    prompt_key,
)
from irl_align.data.tokenizer import chat_text, text_end, tokenizer_name
from irl_align.errors import UserError

logger = logging.getLogger(__name__)


class Rendered(NamedTuple):
    """Text of a conversation in three parts."""

    before: str
    answer: str
    after: str

    @property
    def text(self) -> str:
        """The whole conversation."""
        return "".join(self)


def render_conversations(
    prompts: Sequence[Prompt],
    answers: Sequence[Completion],
    finished: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Rendered]:
    """Text of each conversation with its answer; an answer that is not finished has nothing after.

    Raises UserError: the template renders neither the conversation nor its prompt.
    """
    probes: dict[str, tuple[Rendered, bool]] = {}
    rendered = []
    for prompt, answer, is_finished in zip(prompts, answers, finished, strict=True):
        key = prompt_key(prompt)
        if key not in probes:
            probes[key] = _probe(tokenizer, as_messages(prompt))
        (before, _, after), whole = probes[key]
        text = before + completion_text(answer) + after
        if whole:  # the template may trim the answer
            text = _render(tokenizer, [*as_messages(prompt), *as_answer(answer)])
        start = _shared(before, text)
        end = max(start, len(text) - _shared(after[::-1], text[::-1]))
        rendered.append(Rendered(text[:start], text[start:end], text[end:] if is_finished else ""))
    return rendered


def encode_conversations(
    prompts: Sequence[Prompt],
    answers: Sequence[Completion],
    finished: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
    pad: int | None,
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of whole conversations, each divided at the first token that holds the answer.

    pad: the model's pad token; where it is also written at the end, transformers reads the logit
    before it. Other parameters and errors are those of render_conversations.
    """
    prompt_ids, completion_ids = [], []
    parts = render_conversations(prompts, answers, finished, tokenizer)
    for part, answer in zip(parts, answers, strict=True):
        whole = without_padding(_whole_ids(tokenizer, part, isinstance(answer, str)), pad)
        at = _shared(_ids(tokenizer, part.before), whole)
        prompt_ids.append(whole[:at])
        completion_ids.append(whole[at:])
    return prompt_ids, completion_ids


def encode_samples(
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    finished: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
    card: Templated,
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and sampled answers as token ids, as encode_completions encodes demonstrations.

    Nothing follows an answer that is not finished, and the name of a special token in an answer is
    encoded as text.
    """
    if card.lowercase:
        prompts = [lowered(prompt) for prompt in prompts]
        answers = [answer.lower() for answer in answers]
    prompt_ids = encode_prompts(prompts, tokenizer, card)
    end = text_end(tokenizer, card.template).id
    if card.template != "chat":
        spelled = [_ids(tokenizer, answer, split_special_tokens=True) for answer in answers]
        ends = [[end] if is_finished else [] for is_finished in finished]
        return prompt_ids, [ids + last for ids, last in zip(spelled, ends, strict=True)]
    completion_ids = []
    parts = render_conversations(prompts, answers, finished, tokenizer)
    for prompt, part, ids, is_finished in zip(prompts, parts, prompt_ids, finished, strict=True):
        start = _render(tokenizer, as_messages(prompt), prompt_only=True)
        whole = _whole_ids(tokenizer, part, is_text=True)
        rest = whole[len(ids) :] if whole[: len(ids)] == ids else None
        if rest is None:  # a token spans the end of the prompt, which the policy cannot write
            rest = _ids(tokenizer, part.text[len(start) :])
        if is_finished:
            rest = [*(rest[: rest.index(end)] if end in rest else rest), end]
        completion_ids.append(rest)
    return prompt_ids, completion_ids


def _whole_ids(tokenizer: PreTrainedTokenizerBase, part: Rendered, is_text: bool) -> list[int]:
    """Ids of a conversation; the name of a special token in an answer of text is no token."""
    if not is_text or not any(token in part.answer for token in tokenizer.all_special_tokens):
        return _ids(tokenizer, part.text)
    spelled = _ids(tokenizer, part.answer, split_special_tokens=True)
    return [*_ids(tokenizer, part.before), *spelled, *_ids(tokenizer, part.after)]


def without_padding(ids: list[int], pad: int | None) -> list[int]:
    """The ids up to the last one that is not the pad token."""
    while ids and ids[-1] == pad:
        ids = ids[:-1]
    return ids


def _probe(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> tuple[Rendered, bool]:
    """What a template writes around an answer, and whether it renders answers at all."""
    failure: Exception | str = "it leaves the answer out"
    try:
        text = _render(tokenizer, [*messages, *as_answer(PROBE)])
        if PROBE in text:
            return Rendered(*text.partition(PROBE)), True
    except UserError as error:
        failure = error
    try:  # a template of prompts only
        before = _render(tokenizer, messages, prompt_only=True)
    except UserError as error:
        raise failure if isinstance(failure, UserError) else error from None
    logger.warning("reward: an answer is put after its prompt and before EOS: %s", failure)
    return Rendered(before, PROBE, str(tokenizer.eos_token or "")), False


def _shared(one: Sequence[Any], two: Sequence[Any]) -> int:
    """Number of equal items at the start of both."""
    differ = (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    return next(differ, min(len(one), len(two)))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False, **options)[
        "input_ids"
    ]
    return ids


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], prompt_only: bool = False
) -> str:
    try:
        return chat_text(tokenizer, messages, prompt_only)
    except Exception as error:  # a template may raise anything that Python may
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"reward: the chat template of {tokenizer_name(tokenizer)} cannot render a "
            f"conversation of the roles {roles}: {' '.join(str(error).split())}; expected one that "
            "can, or another template (text with {prompt})"
        ) from error
