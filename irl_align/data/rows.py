"""Rows of text: demonstrations, preferences and their prompts."""

from __future__ import annotations

import hashlib
import json
from typing import TypedDict


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


Prompt = str | list[Message]
"""A text, or a conversation up to the turn that is to be written."""


class Demonstration(TypedDict):
    """A prompt and the completion that was demonstrated for it."""

    prompt: Prompt
    completion: str


class Preference(TypedDict):
    """A prompt and two completions. The margin says how much better, in the unit of the data."""

    prompt: Prompt
    chosen: str
    rejected: str
    subset: str
    margin: float | None


def prompt_key(prompt: Prompt) -> str:
    """16 hex digits that name a prompt by its content."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_text(prompt: Prompt) -> str:
    """A prompt for people and gold metrics: its text, or one line per message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
