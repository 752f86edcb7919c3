"""Make foreign text safe for a terminal, a log and a run folder.

Control characters can move a terminal's cursor or change its title, so they are shown as escapes.
Secrets are hidden wherever text leaves the program.
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
_SHORTEST = 8  # characters of a secret in the environment: shorter values are words like "false"
_IN_URL = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^\s/@?#'\"]+@", re.IGNORECASE)
_IN_QUERY = re.compile(
    r"([?&](?:[\w-]*token|[\w-]*key|auth|password|secret|sig|signature|x-amz-[\w-]+)=)[^&\s#'\"]+",
    re.IGNORECASE,
)
_WELL_KNOWN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{16,})")
_BEARER = re.compile(r"\b(Bearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE)


def one_line(text: str) -> str:
    """``text`` with all unprintable characters as escapes, line breaks included."""
    return printable(text, keep="")


def printable(text: str, keep: str = "\n\t") -> str:
    """``text`` with control characters as escapes, except those in `keep`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def redact(text: str) -> str:
    """``text`` without the secrets of the environment and without what looks like a secret."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _NAME_OF_SECRET.search(name) and value in text:
            text = text.replace(value, HIDDEN)
    text = _IN_URL.sub(rf"\1{HIDDEN}@", text)
    text = _IN_QUERY.sub(rf"\1{HIDDEN}", text)
    text = _BEARER.sub(rf"\1{HIDDEN}", text)
    return _WELL_KNOWN.sub(HIDDEN, text)


def fit_to_show(text: str) -> str:
    """``text`` for a terminal or a log: without secrets and control characters."""
    return printable(redact(text))


def secrets_in(value: Any, loc: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Places of the texts that hold a secret, in nested plain values."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from secrets_in(inner, (*loc, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from secrets_in(inner, (*loc, index))
    elif isinstance(value, str) and redact(value) != value:
        yield loc
