"""One vLLM server: requests to it over HTTP, new weights, samples.

Every completion names the weights that it was sampled with, so a server that came back with other
weights is noticed. A server loads weights from the same paths as this process: they share a file
system.
"""

from __future__ import annotations

import json
import threading
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from irl_align.errors import UserError
from irl_align.models.generation.vllm_common import PolicyFolder, RawSample, Request


class Unreachable(Exception):
    """A server did not answer, or not as it should; another attempt may succeed."""


class Server:
    """One server: its address, its state, and requests to it."""

    def __init__(self, url: str, api_key: str, timeout: float) -> None:
        self.timeout = timeout
        self.lock = threading.Lock()
        self.recoveries = 0
        self.failures = 0  # consecutive recoveries without an answer to a request between them
        self.ready = threading.Event()  # cleared during a recovery: the server gets no work
        self.ready.set()
        self.name = ""  # model name that requests ask for
        self.version = ""  # key of the weights that were loaded last
        self.weights: Any = None  # identity of the whole model among them
        self.move(url, api_key)

    def move(self, url: str, api_key: str) -> None:
        """Use this address from now on. Raises UserError unless it is an HTTP URL."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"generation.server.urls: found {url!r}, expected http://HOST:PORT")
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def call(self, path: str, body: Any = None) -> Any:
        """POST a body, or GET without one; returns the answer's JSON, or its text.

        Raises:
            Unreachable: no answer, or a status of 5xx.
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

    def _failure(self, path: str, status: int, text: str) -> Exception:
        if status in (401, 403):
            return UserError(
                f"{self.url}: refused the API key ({status}); expected the server's own in the "
                "variable that generation.server.api_key_env names"
            )
        if "lora_adapter" in path and status in (400, 404, 500):
            return UserError(
                f"{self.url}: refused {path} ({status}): {text}; expected a server that sees the "
                "adapter's folder and was started by irl-align vllm-serve on a LoRA policy, or "
                "with --lora-rank"
            )
        if status == 404 and "/generate" not in path:
            return UserError(
                f"{self.url}: has no {path}; expected a server started by irl-align vllm-serve"
            )
        if 400 <= status < 500:
            return UserError(f"{self.url}: refused {path} ({status}): {text}")
        return Unreachable(f"{path}: {status} {text}")

    def load(self, policy: PolicyFolder, key: str, context_length: int) -> None:
        """Have the server sample from these weights, and mark its samples with their key.

        Raises:
            Unreachable, UserError: as :meth:`call` does; or the server cannot load the weights.
        """
        models = self.call("/v1/models")["data"]
        [model] = [m for m in models if m.get("parent") is None]
        if model["max_model_len"] < context_length:
            raise UserError(
                f"{self.url}: its context is {model['max_model_len']} tokens, expected at least "
                f"{context_length}"
            )
        self.call("/abort_requests", {})  # those of an earlier stream
        weights = policy.weights
        if weights != self.weights or not self.has(self.version):  # a new server lacks the version
            call = {"method": "load_policy", "kwargs": {"path": str(policy.model)}}
            [result, *_] = self.call("/collective_rpc", call)["results"]
            if "error" in result:
                raise UserError(f"{self.url}: cannot load {policy.model}: {result['error']}")
            self.weights = weights
        # Each adapter has its own name: vLLM reads an adapter that is replaced in place at every
        # step.
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

    def has(self, key: str) -> bool:
        """Whether the server samples from these weights."""
        return bool(self.call("/weight_info")["weight_version"] == key)

    def generate(self, request: Request, key: str) -> list[RawSample]:
        """Samples of one request. Raises Unreachable where their weights are not ``key``'s."""
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
