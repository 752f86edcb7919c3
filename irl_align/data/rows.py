"""Rows of text: demonstrations, preferences and their prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, cast

from irl_align.errors import UserError


class Message(TypedDict):
    """One turn of a conversation. The chat template reads all of its keys but `tools`."""

    role: str
    content: str
    tool_calls: NotRequired[list[Any]]
    """Calls of functions, with their arguments as objects."""
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    thinking: NotRequired[str]
    tools: NotRequired[list[Any]]
    """Of the first message only: definitions of the functions that the assistant may call."""


Prompt = str | list[Message]
"""A text, or a conversation up to the turn that is to be written."""

Completion = str | list[Message]
"""A text, or turns of a conversation whose last is the answer."""


class Demonstration(TypedDict):
    """A prompt and the completion that was demonstrated for it."""

    prompt: Prompt
    completion: Completion
    earlier: NotRequired[list[int]]
    """Places in the prompt of the assistant's turns that are demonstrations too."""
    extra: NotRequired[dict[str, Any]]
    """The card's extra columns, which reward functions read."""
    place: NotRequired[str]
    """File and row, for messages."""


class Preference(TypedDict):
    """A prompt and two completions. The margin says how much better, in the unit of the data."""

    prompt: Prompt
    chosen: Completion
    rejected: Completion
    subset: str
    margin: float | None
    place: NotRequired[str]
    """File and row, for messages."""


def place_of(row: Mapping[str, Any], card: str, number: int) -> str:
    """File and line of a row, or its number among the rows of a card."""
    return str(row.get("place") or f"data.card {card}, row {number}")


def prompt_key(prompt: Prompt) -> str:
    """16 hex digits that name a prompt by its content."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def opening(prompt: Prompt) -> Prompt:
    """The prompt up to the assistant's first turn.

    Splits are divided by it, so that no two parts share the start of a conversation.
    """
    if isinstance(prompt, str):
        return prompt
    roles = [message["role"] for message in prompt]
    return prompt[: roles.index("assistant")] if "assistant" in roles else prompt


def as_messages(prompt: Prompt) -> list[Message]:
    """The prompt as a conversation: a text is one turn of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def template_input(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """What apply_chat_template takes: the messages without `tools`, and the tools if any."""
    first, *later = cast(Sequence[dict[str, Any]], messages)
    return [{name: first[name] for name in first if name != "tools"}, *later], first.get("tools")


def as_answer(completion: Completion) -> list[Message]:
    """The completion as turns of a conversation: a text is one turn of the assistant."""
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    return completion


def prompt_text(prompt: Prompt) -> str:
    """A prompt for people and gold metrics: its text, or one line per message.

    A conversation of one user turn is the text of that turn.
    """
    if isinstance(prompt, str):
        return prompt
    if is_one_turn(prompt):
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {_message_text(message)}" for message in prompt)


def stored_prompt(row: Mapping[str, Any]) -> Prompt:
    """The prompt of an encoded row as it is in the data: a text, or a conversation."""
    prompt: Prompt = json.loads(row["messages"]) if row.get("messages") else row["prompt"]
    return prompt


def is_one_turn(prompt: Prompt) -> bool:
    """Whether the prompt is a text, or one turn of the user."""
    return isinstance(prompt, str) or [turn["role"] for turn in prompt] == ["user"]


def answer_of(message: Message) -> Completion:
    """The completion that a message of the assistant is: its text, if it is nothing more."""
    return message["content"] if set(message) == {"role", "content"} else [message]


def exchange(prompt: Prompt | None, completion: Completion | None) -> tuple[Prompt, Completion]:
    """A prompt and its answer: a text, or one message if the answer also calls functions.

    A completion of several messages ends with the answer; its other turns belong to the prompt, or
    repeat it. Without a completion the prompt is the whole conversation, and the other way round.
    Raises UserError: there is no answer, or nothing before it.
    """
    if prompt is not None and isinstance(completion, str):
        return prompt, completion
    own = [] if prompt is None else as_messages(prompt)
    added = [] if completion is None or isinstance(completion, str) else completion
    turns = added if added[: len(own)] == own else [*own, *added]
    roles = [turn["role"] for turn in turns]
    if len(turns) < 2 or roles[-1] != "assistant" or not isinstance(turns[-1]["content"], str):
        raise UserError(
            f"found a conversation of the roles {', '.join(roles) or 'none'}, expected a prompt "
            "and at the end a text of the assistant"
        )
    asked = turns[:-1] if prompt is None or len(turns) != len(own) + 1 else prompt
    return asked, answer_of(turns[-1])


def exchanges(
    prompts: Sequence[Prompt], completions: Sequence[Completion] | None
) -> tuple[list[Prompt], list[Completion]]:
    """Prompts and answers of B rows by exchange. Raises UserError that names the row."""
    given = [None] * len(prompts) if completions is None else completions
    pairs = []
    for row, (prompt, completion) in enumerate(zip(prompts, given, strict=True)):
        try:
            pairs.append(exchange(prompt, completion))
        except UserError as error:
            raise UserError(f"row {row}: {error}") from error
    return [prompt for prompt, _ in pairs], [answer for _, answer in pairs]


def lowered(prompt: Prompt) -> Prompt:
    """The prompt in lower case."""
    if isinstance(prompt, str):
        return prompt.lower()
    return [{**message, "content": message["content"].lower()} for message in prompt]


def last_text(prompt: Prompt) -> str:
    """Text of a prompt, or of the last turn of a conversation."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def with_last_text(prompt: Prompt, text: str) -> Prompt:
    """The prompt with another text, a conversation with another last turn."""
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]


def completion_text(completion: Completion) -> str:
    """A completion for people: the text of its answer, with reasoning and calls of functions."""
    return completion if isinstance(completion, str) else _message_text(completion[-1])


def _message_text(message: Message) -> str:
    calls = json.dumps(message["tool_calls"]) if "tool_calls" in message else ""
    reasons = [str(message.get(key, "")) for key in ("reasoning_content", "reasoning", "thinking")]
    return "\n".join(part for part in (*reasons, message["content"], calls) if part)
