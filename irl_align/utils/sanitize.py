"""Text that comes from elsewhere, made fit for a terminal, a log and a run folder.

Control characters move a terminal's cursor, change its title or worse, and are shown as what they
are instead. Secrets are hidden wherever text leaves the program.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "***"
_NAME_OF_SECRET = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL", re.IGNORECASE
)
_SHORTEST = 8  # characters of a secret in the environment; shorter values are words like "false"
_IN_URL = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^\s/@?#'\"]+@", re.IGNORECASE)
_IN_QUERY = re.compile(
    r"([?&](?:[\w-]*token|[\w-]*key|auth|password|secret|sig|signature|x-amz-[\w-]+)=)[^&\s#'\"]+",
    re.IGNORECASE,
)
_WELL_KNOWN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{16,})")
_BEARER = re.compile(r"\b(Bearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE)


def printable(text: str) -> str:
    """``text`` with control characters, line breaks and tabs apart, written as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def redact(text: str) -> str:
    """``text`` without secrets: those of the environment, and what looks like one."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _NAME_OF_SECRET.search(name) and value in text:
            text = text.replace(value, HIDDEN)
    text = _IN_URL.sub(rf"\1{HIDDEN}@", text)
    text = _IN_QUERY.sub(rf"\1{HIDDEN}", text)
    text = _BEARER.sub(rf"\1{HIDDEN}", text)
    return _WELL_KNOWN.sub(HIDDEN, text)


def fit_to_show(text: str) -> str:
    """Both: for whatever goes to a terminal or a log."""
    return printable(redact(text))


def secrets_in(value: Any, loc: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Places of plain nested values whose text holds a secret."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from secrets_in(inner, (*loc, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from secrets_in(inner, (*loc, index))
    elif isinstance(value, str) and redact(value) != value:
        yield loc
