"""One vLLM server: requests to it over HTTP, new weights, samples.

Every completion says which weights it was sampled with, so a server that came back with other
weights is found out. It loads weights from the same paths as this process: they share a file
system.
"""

from __future__ import annotations

import json
import threading
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from irl_align.errors import UserError
from irl_align.models.generation.vllm_common import PolicyFolder, RawSample, Request


class Unreachable(Exception):
    """A server did not answer, or not as it should; another try may do."""


class Server:
    """One server: its address, and requests to it."""

    def __init__(self, url: str, api_key: str, timeout: float) -> None:
        self.timeout = timeout
        self.lock = threading.Lock()
        self.recoveries = 0
        self.failures = 0  # in a row: recoveries with no answer to a request between them
        self.well = threading.Event()  # cleared while it is being seen to: it gets no work
        self.well.set()
        self.name = ""  # of the model to ask for
        self.version = ""  # of the weights that it was given last
        self.weights: Any = None  # of the whole model among them
        self.move(url, api_key)

    def move(self, url: str, api_key: str) -> None:
        """The address at which it is found from now on."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"generation.server.urls: found {url!r}, expected http://HOST:PORT")
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def call(self, path: str, body: Any = None) -> Any:
        """POST a body, or GET without one; the answer's JSON, or its text.

        Raises:
            Unreachable: no answer, or one of 5xx.
            UserError: the server refuses the key or the request.
        """
        parts = urlsplit(self.url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        line = kind(str(parts.hostname), parts.port, timeout=self.timeout)
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
        try:
            line.request(method, parts.path + path, data, self._headers)
            answer = line.getresponse()
            text = answer.read().decode("utf-8", "replace")
        except (OSError, HTTPException) as error:
            raise Unreachable(f"{path}: {type(error).__name__} {error}".strip()) from error
        finally:
            line.close()
        if answer.status != 200:
            raise self._failure(path, answer.status, " ".join(text.split())[:300])
        try:
            return json.loads(text)
        except ValueError:
            return text

    def _failure(self, path: str, status: int, said: str) -> Exception:
        if status in (401, 403):
            return UserError(
                f"{self.url}: refused the API key ({status}); expected the server's own in the "
                "variable that generation.server.api_key_env names"
            )
        if "lora_adapter" in path and status in (400, 404, 500):
            return UserError(
                f"{self.url}: refused {path} ({status}): {said}; expected a server that sees the "
                "adapter's folder and was started by irl-align vllm-serve on a LoRA policy, or "
                "with --lora-rank"
            )
        if status == 404 and "/generate" not in path:
            return UserError(
                f"{self.url}: has no {path}; expected a server started by irl-align vllm-serve"
            )
        if 400 <= status < 500:
            return UserError(f"{self.url}: refused {path} ({status}): {said}")
        return Unreachable(f"{path}: {status} {said}")

    def load(self, policy: PolicyFolder, key: str, context_length: int) -> None:
        """Have the server answer from these weights, and mark what it samples with their key."""
        models = self.call("/v1/models")["data"]
        [model] = [m for m in models if m.get("parent") is None]
        if model["max_model_len"] < context_length:
            raise UserError(
                f"{self.url}: its context is {model['max_model_len']} tokens, expected at least "
                f"{context_length}"
            )
        self.call("/abort_requests", {})  # of a stream that nobody reads any more
        weights = policy.weights
        if weights != self.weights or not self.has(self.version):  # a new server lacks the version
            self._load_whole(policy.model)
            self.weights = weights
        # Each adapter has a name of its own: one that is loaded in place is read at every step.
        for adapter in (m["id"] for m in models if m.get("parent") is not None):
            self.call("/v1/unload_lora_adapter", {"lora_name": adapter})
        if policy.adapter is not None:
            named = {"lora_name": key, "lora_path": str(policy.adapter)}
            self.call("/v1/load_lora_adapter", named)
        self.name = str(model["id"]) if policy.adapter is None else key
        if not self.call("/reset_prefix_cache?reset_running_requests=true", {})["success"]:
            raise Unreachable("/reset_prefix_cache: it could not")
        self.call("/update_weight_version", {"new_version": key})
        self.version = key

    def _load_whole(self, model: Path) -> None:
        call = {"method": "load_policy", "kwargs": {"path": str(model)}}
        [result, *_] = self.call("/collective_rpc", call)["results"]
        if "error" in result:
            raise UserError(f"{self.url}: cannot load {model}: {result['error']}")

    def has(self, key: str) -> bool:
        """Whether it answers from these weights."""
        return bool(self.call("/weight_info")["weight_version"] == key)

    def generate(self, request: Request, key: str) -> list[RawSample]:
        """Samples of one request; Unreachable when they are of other weights than ``key``."""
        body = {"model": self.name, "token_ids": request.prompt, "sampling_params": request.params}
        answer = self.call("/inference/v1/generate", body)
        samples: list[RawSample] = []
        for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
            versions = {span["version"] for span in choice["weight_versions"] or []}
            if versions != {key} or choice["finish_reason"] not in ("stop", "length"):
                raise Unreachable(
                    f"samples of weights {sorted(versions)}, ended by {choice['finish_reason']}"
                )
            logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
            samples.append((choice["token_ids"], logprobs))
        return samples
