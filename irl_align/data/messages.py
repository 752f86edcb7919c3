"""Conversations of a row, as chat data sets write them, to messages as chat templates read them.

Turns may have the keys of OpenAI and transformers (role, content) or of ShareGPT (from, value).
"""

from __future__ import annotations

import json
from typing import Any, cast

from irl_align.config.yaml import show
from irl_align.data.rows import Message, Prompt, as_messages
from irl_align.data.sources import Raw

MAX_TEXT = 10_000_000  # characters; the longest contexts have a million tokens
ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}
_MAY_BE_EMPTY = ("system", "developer", "tool")
SPOKEN = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""Keys of a message, besides content, that hold what the assistant says."""
_TEXTS = (*SPOKEN[1:], "name", "tool_call_id")
READ = frozenset({"role", "from", "content", "value", "weight", "train", "tool_calls", *_TEXTS})
"""Keys of a turn that are read."""


def read_messages(raw: Raw, column: str) -> list[Message]:
    """The messages of a row, whose content is one text each.

    Raises FaultyRow, which names file, row and column, for what no chat template reads as text.
    """
    value = raw.column(column)
    if not isinstance(value, list) or not value:
        raise raw.fault(column, f"{kind(value)}, expected a list of messages")
    return [_message(raw, column, turn) for turn in value]


def read_tools(raw: Raw, column: str) -> list[Any]:
    """Definitions of the functions that the assistant may call: a list, or a list in JSON."""
    value = raw.values.get(column)
    tools = _parsed(value)
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise raw.fault(column, f"{kind(value)}, expected a list of definitions of functions")
    return tools or []


def with_tools(prompt: Prompt, tools: list[Any]) -> Prompt:
    """The prompt, whose first message holds the definitions of tools, if there are any."""
    if not tools:
        return prompt
    first, *later = as_messages(prompt)
    return [{**first, "tools": tools}, *later]


def unlearned(raw: Raw, column: str) -> set[int]:
    """Places of the turns that say that they are not to be learned: weight 0, or train false.

    Raises FaultyRow: a weight is neither 0 nor 1.
    """
    places = set()
    for place, turn in enumerate(raw.column(column)):
        weight, train = turn.get("weight"), turn.get("train")
        if weight not in (None, 0, 1) or train not in (None, False, True):
            wrong = f"weight {show(weight)} and train {show(train)} in a message"
            raise raw.fault(column, f"{wrong}, expected weight 0 or 1, train true or false")
        if 0 in (weight, train):  # false is 0, and null is not
            places.add(place)
    return places


def _message(raw: Raw, column: str, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise raw.fault(column, f"{kind(turn)} among the messages, expected an object")
    role = turn.get("role", turn.get("from"))
    role = _SHAREGPT.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise raw.fault(column, f"role {show(role)} in a message, expected {', '.join(ROLES)}")
    message: dict[str, Any] = {"role": role, "content": ""}
    message |= {key: checked_text(raw, column, turn[key]) for key in _TEXTS if turn.get(key)}
    if turn.get("tool_calls"):
        message["tool_calls"] = _tool_calls(raw, column, turn["tool_calls"])
    content = _joined(raw, column, turn.get("content", turn.get("value")))
    says_more = any(key in message for key in SPOKEN)
    empty = says_more or role in _MAY_BE_EMPTY
    if content is not None or not says_more:
        message["content"] = checked_text(raw, column, content, empty)
    return cast(Message, message)


def _joined(raw: Raw, column: str, content: Any) -> Any:
    """The texts of a content that is a list of parts, without anything between them."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            kind_name = show(part.get("type")) if isinstance(part, dict) else kind(part)
            raise raw.fault(column, f"a part of type {kind_name} in a message, expected text")
        texts.append(checked_text(raw, column, part.get("text"), may_be_empty=True))
    return "".join(texts)


def _tool_calls(raw: Raw, column: str, calls: Any) -> list[Any]:
    """Calls of functions as templates read them: arguments as an object, not as its JSON."""
    calls = _parsed(calls)
    if not isinstance(calls, list):
        raise raw.fault(column, f"tool_calls of {kind(calls)}, expected a list")
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        arguments = _parsed(function.get("arguments", {})) if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(arguments, dict):
            expected = "a function with a name, and its arguments as an object or its JSON"
            raise raw.fault(column, f"a tool call {show(str(call))}, expected {expected}")
        function = {**function, "arguments": arguments}
        read.append({**call, "function": function} if "function" in call else function)
    return read


def _parsed(value: Any) -> Any:
    """The value of a JSON text; other values, and other texts, as they are."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def read_text(raw: Raw, column: str) -> str:
    """Text of a column that is not empty. Raises FaultyRow."""
    return checked_text(raw, column, raw.column(column))


def checked_text(raw: Raw, column: str, value: Any, may_be_empty: bool = False) -> str:
    """The value, which must be text of a length that a model can read. Raises FaultyRow."""
    if not isinstance(value, str):
        raise raw.fault(column, f"{kind(value)}, expected text")
    if not value.strip() and not may_be_empty:
        raise raw.fault(column, "empty text")
    if len(value) > MAX_TEXT:
        size = f"a text of {len(value):,} characters, expected at most {MAX_TEXT:,}"
        raise raw.fault(column, size)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise raw.fault(column, "half of a surrogate pair, not text") from error
    return value


def kind(value: Any) -> str:
    """What a value is, for messages."""
    return "null" if value is None else f"a value of type {type(value).__name__}"
