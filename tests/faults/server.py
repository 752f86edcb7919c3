"""A stand-in for a vLLM server, with the HTTP interface that our client uses; it fails on request.

It samples with transformers, one request at a time, so that its samples depend only on the request.
tests/models/generation/test_vllm_server.py tests the real server.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from irl_align.models.generation.protocol import Sampling, generate
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.models.loading import load_model

CONTEXT = 192
TIMEOUT = 40.0  # seconds that the client waits for an answer


@dataclass(frozen=True)
class Trick:
    """A fault at one request for samples; requests are counted from 0, over all restarts."""

    kind: str
    """delay, drop or error: what happens to the request. die: the process ends and starts again by
    itself. stay away: the process ends, and starts again at the next attempt of the run."""
    request: int


class FakeServer:
    """The server in another process, which is started again after it died."""

    def __init__(self, log: Path, trick: Trick | None = None) -> None:
        self.log, self.trick = log, trick
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.log.touch()
        self.context = multiprocessing.get_context("fork")
        self._start()
        if trick is not None and trick.kind == "die":
            threading.Thread(target=self._revive, daemon=True).start()

    def overrides(self) -> Sequence[str]:
        """Recipe options for sampling from this server."""
        return (
            "generation.backend=vllm-server",
            f"generation.server.urls=['http://127.0.0.1:{self.port}']",
            f"generation.server.timeout={TIMEOUT}",
            "generation.server.retries=3",
            "data.task.size=50",
        )

    def requests(self) -> int:
        """Number of requests for samples, over all restarts."""
        return self.log.stat().st_size

    def restart(self) -> None:
        """Start the process if it does not run."""
        if not self.process.is_alive():
            self._start()

    def stop(self) -> None:
        """End the process; it does not start again."""
        self.trick = None
        self.process.kill()
        self.process.join()

    def _start(self) -> None:
        self.process = self.context.Process(target=self._serve, daemon=True)
        self.process.start()

    def _revive(self) -> None:
        self.process.join()
        if self.trick is not None:
            time.sleep(0.5)
            self._start()

    def _serve(self) -> None:
        sampler = _Sampler(self.log, self.trick)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(sampler.get(self.path))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self._answer(sampler.post(self.path, json.loads(body)))

            def _answer(self, answer: Any) -> None:
                if answer is None:  # dropped: the connection closes without an answer
                    return
                text = json.dumps(answer).encode()
                self.send_response(500 if answer == "error" else 200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        _Server(("127.0.0.1", self.port), Handler).serve_forever()


class _Server(ThreadingHTTPServer):
    request_queue_size = 256  # as many as the client sends at once

    def handle_error(self, *_: Any) -> None:
        """Ignore clients that are gone: killed, or past their timeout."""


class _Sampler:
    """The policy that was loaded last, and the number of requests."""

    def __init__(self, log: Path, trick: Trick | None) -> None:
        self.log, self.trick = log, trick
        self.lock = threading.Lock()
        self.model: Any = None
        self.version = ""

    def get(self, path: str) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "policy", "max_model_len": CONTEXT}]}
        return {"weight_version": self.version} if path == "/weight_info" else {}

    def post(self, path: str, body: Any) -> Any:
        if path == "/collective_rpc":
            with self.lock:
                self.model = load_model(body["kwargs"]["path"])
            return {"results": [{}]}
        if path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/inference/v1/generate":
            return self._generate(body)
        return {"success": True}

    def _generate(self, body: Any) -> Any:
        with self.log.open("ab") as log:
            log.write(b".")
            number = log.tell() - 1
        kind = self.trick.kind if self.trick is not None and self.trick.request == number else ""
        if kind in ("die", "stay away"):
            os._exit(1)
        if kind == "drop":
            return None
        if kind == "error":
            return "error"
        if kind == "delay":
            time.sleep(TIMEOUT + 5.0)
        with self.lock:
            return {"choices": self._choices(body["token_ids"], body["sampling_params"])}

    def _choices(self, prompt: list[int], params: dict[str, Any]) -> list[dict[str, Any]]:
        sampling = Sampling(
            n=params["n"],
            temperature=params["temperature"],
            max_new_tokens=params["max_tokens"],
            seed=params["seed"],
        )
        stops = params.get("stop_token_ids") or [2**30]  # none: an id that is never sampled
        sampler = TransformersGenerator(self.model, stops, 0)
        (group,) = generate(sampler, [prompt], sampling)
        span = {"version": self.version}
        return [
            {
                "index": number,
                "finish_reason": "length" if completion.truncated else "stop",
                "token_ids": completion.sampled_ids,
                "logprobs": {
                    "content": [{"logprob": float(value)} for value in completion.logprobs]
                },
                "weight_versions": [span],
            }
            for number, completion in enumerate(group)
        ]
