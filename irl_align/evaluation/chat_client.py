"""A client for a chat model behind any OpenAI-compatible endpoint: one question, one reply."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from irl_align.errors import UserError

LONGEST_PAUSE = 60.0  # seconds between two tries
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}


class NoReply(Exception):
    """The endpoint did not answer in any of the tries."""


@dataclass(frozen=True)
class Endpoint:
    """Address of a chat model, and how often and how long to wait for its replies."""

    url: str
    """Address, which ends with /v1."""
    model: str
    key: str = field(default="", repr=False)
    """Sent as a bearer token; empty for none."""
    timeout: float = 120.0
    """Seconds for one reply."""
    retries: int = 4
    pause: float = 1.0
    """Seconds before the second try; twice as long before each further try."""
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            valid = False
        if not valid:
            raise UserError("--judge: found no valid address, expected https://HOST/v1")
        if parts.username or parts.password or parts.query:
            raise UserError(
                f"--judge: found a user, password or query in the address of {parts.hostname}, "
                "expected https://HOST/v1; set the key in the environment (JUDGE_API_KEY)"
            )

    def reply(self, messages: list[dict[str, str]]) -> str:
        """The model's reply to a conversation, at temperature 0; empty if it is no chat completion.

        Raises NoReply after all tries, and UserError if another try cannot help.
        """
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": 0.0,
            "max_tokens": self.max_tokens,
        }
        error, pause = "", self.pause
        for attempt in range(1 + self.retries):
            if attempt:
                time.sleep(min(pause, LONGEST_PAUSE))
                pause *= 2.0
            try:
                status, wait, text = self._post(body)
            except (OSError, HTTPException) as fault:
                error = f"{type(fault).__name__} {fault}".strip()
                continue
            if status == 200:
                return _content(text)
            error = f"status {status}: {self._shown(text)}"
            if status not in RETRIED:
                raise UserError(f"--judge: {self.url}: {error}; expected a reply of {self.model}")
            pause = max(pause, wait)
        raise NoReply(error)

    def _post(self, body: Any) -> tuple[int, float, str]:
        """(status, seconds that the server asks to wait, text). Redirects are not followed, so that
        the key goes to this address only."""
        parts = urlsplit(self.url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(str(parts.hostname), parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            path = f"{parts.path.rstrip('/')}/chat/completions"
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            after = response.getheader("Retry-After") or ""
            wait = float(after) if after.isdecimal() else 0.0
            return response.status, wait, response.read().decode("utf-8", "replace")
        finally:
            connection.close()

    def _shown(self, text: str) -> str:
        """A server's message, shortened, without the key, which some servers repeat."""
        words = " ".join(text.split())[:200]
        return words.replace(self.key, "***") if self.key else words


def _content(text: str) -> str:
    """The reply in a chat completion; empty if the text is no chat completion."""
    try:
        content = json.loads(text)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return ""
    return content if isinstance(content, str) else ""
