"""Sample from vLLM servers: one that the run starts, or several that are running.

Requests go to whichever server is free. A server that fails is asked again after a pause. One that
does not recover is dropped with a warning, and the others get its requests. One that came back with
other weights is loaded again. Each request has exactly one result.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from irl_align.config.generation import ServerOptions
from irl_align.errors import UserError
from irl_align.models.generation.vllm_client import Server, Unreachable
from irl_align.models.generation.vllm_common import EngineSettings, PolicyFolder, RawSample, Request
from irl_align.models.generation.vllm_process import ServerProcess, healthy
from irl_align.models.generation.vllm_worker import shape_of

logger = logging.getLogger(__name__)
IN_FLIGHT = 256  # samples that a server works on at a time
LONGEST_PAUSE = 30.0  # seconds between two attempts


class ServerEngine:
    """An engine (``vllm_common.Engine``) of one or several servers.

    Args:
        settings: how a server is started, and the context that every server must have.
        options: which servers, and how patiently.
        log: file for the output of a server that is started here.

    Raises:
        UserError: a URL is not one of HTTP, or the named variable of the API key is not set.
    """

    def __init__(self, settings: EngineSettings, options: ServerOptions, log: Path) -> None:
        self.settings = settings
        self.options = options
        self.log = log
        self.starts = 0
        self.process: ServerProcess | None = None
        api_key = os.environ.get(options.api_key_env, "")
        if options.urls and not api_key and options.api_key_env != "VLLM_API_KEY":
            raise UserError(
                f"generation.server.api_key_env: {options.api_key_env} is not in the environment; "
                "expected the servers' API key there"
            )
        self._given = [Server(url, api_key, options.timeout) for url in options.urls]
        self.servers = list(self._given)
        self._shape: Any = None
        self._rank = 0  # of the largest adapter that our own server takes
        self._resting = False
        self._policy: tuple[PolicyFolder, str] | None = None

    def load(self, policy: PolicyFolder, key: str) -> None:
        """Sample from these weights from now on; servers that cannot load them are dropped."""
        self._policy = policy, key
        if not self._given:
            self._load_own(policy)
        for server in self._given:
            if server not in self.servers and healthy(server.url):
                server.failures = 0
                self.servers.append(server)
        if not self.servers:
            urls = ", ".join(self.options.urls)
            raise UserError(f"generation.server.urls: none answers: {urls}")
        for server in list(self.servers):
            try:
                server.load(policy, key, self.settings.context_length)
            except Unreachable as error:
                self.recover(server, server.recoveries, error)

    def _load_own(self, policy: PolicyFolder) -> None:
        """Have a server of our own that runs and takes this policy's shape."""
        shape = shape_of(policy.model)
        fits = shape == self._shape and policy.rank <= self._rank
        if self.process is not None and not (fits and self.process.alive):
            self.close()
        if self.process is None:
            self.process = self._start()
            self._shape, self._rank = shape, max(self.settings.lora_rank, policy.rank)
            address = self.process.url, self.process.api_key
            self.servers = [Server(*address, self.options.timeout)]
        self._wake()

    def _start(self) -> ServerProcess:
        assert self._policy is not None
        self.starts += 1
        return ServerProcess(self._policy[0], self.settings, self.options, self.log)

    def recover(self, server: Server, recoveries: int, cause: Exception) -> None:
        """Wait for a server that failed, and load its weights again; drop it if it stays away.

        Many threads see a failure: the first one handles it, and those that saw the same
        ``recoveries`` wait.

        Raises:
            UserError: it was the last server.
        """
        with server.lock:
            try:
                if server.recoveries == recoveries and server in self.servers:
                    server.recoveries += 1
                    server.failures += 1
                    last = cause if server.failures > self.options.retries else None
                    if (last := last or self._retry(server, cause)) is not None:
                        self._drop(server, last)
            finally:
                server.ready.set()

    def _retry(self, server: Server, cause: Exception) -> Exception | None:
        """Try until the server answers from the current weights; the last error if it never does.

        A server of our own that has died is started again.
        """
        assert self._policy is not None
        for attempt in range(self.options.retries):
            logger.warning("%s: %s; trying again", server.url, cause)
            time.sleep(min(0.5 * 2**attempt, LONGEST_PAUSE))
            if self.process is not None and not self.process.alive:
                self.process.kill()
                self.process = self._start()
                server.move(self.process.url, self.process.api_key)
            try:
                if healthy(server.url):
                    if not server.has(self.key):
                        server.load(*self._policy, self.settings.context_length)
                    return None
            except Unreachable as error:
                cause = error
        return cause

    def _drop(self, server: Server, cause: Exception) -> None:
        """Continue without a server; it is asked again when there are new weights."""
        self.servers.remove(server)
        left = len(self.servers)
        logger.warning("%s: dropped: %s; servers left: %d", server.url, cause, left)
        if not left:
            last = f"{server.url}: {cause}"
            raise UserError(f"generation.server: no server is left; the last was {last}")

    def run(self, requests: Iterator[Request]) -> Iterator[tuple[Request, list[RawSample]]]:
        """Answer requests, each once, in the order in which they are done."""
        self._wake()
        if not self.servers:
            raise UserError("generation.server: no server is left")
        yield from _Dispatch(self, list(requests)).results()

    @property
    def key(self) -> str:
        """Key of the weights that samples must come from."""
        assert self._policy is not None
        return self._policy[1]

    def rest(self) -> None:
        """Have our own server give its GPU's memory back until it is needed."""
        if self.process is not None and self.settings.device == "cuda" and not self._resting:
            self.servers[0].call("/sleep?level=1", {})
            self._resting = True

    def _wake(self) -> None:
        if self._resting:
            self.servers[0].call("/wake_up", {})
            self._resting = False

    def close(self) -> None:
        """End our own server; the next ``load`` starts a new one. Other servers keep running."""
        if self.process is not None:
            self.process.kill()
            self.process = None
            self.servers = []
            self._resting = False


class _Dispatch:
    """Sends one stream of requests to the servers, by threads with one request each."""

    def __init__(self, engine: ServerEngine, requests: list[Request]) -> None:
        self.engine = engine
        self.left = deque(requests)
        self.tries: Counter[tuple[int, int]] = Counter()
        self.working = 0
        self.state = threading.Condition()
        self.stopped = False
        self.done: queue.Queue[Any] = queue.Queue()
        samples = max((int(request.params["n"]) for request in requests), default=1)
        # All servers but one may fail a request until they are dropped.
        retries = engine.options.retries
        self.most_tries = retries + (retries + 1) * (len(engine.servers) - 1)
        share = -(-len(requests) // len(engine.servers))
        self.threads = min(share, max(1, IN_FLIGHT // samples))
        # Bounds the results that wait for the consumer.
        self.room = threading.Semaphore(2 * max(1, self.threads) * len(engine.servers))

    def results(self) -> Iterator[tuple[Request, list[RawSample]]]:
        """Every request with its samples, as they are done."""
        servers = list(self.engine.servers) * self.threads
        for server in servers:
            threading.Thread(target=self._work, args=(server,), daemon=True).start()
        running = len(servers)
        try:
            while running:
                item = self.done.get()
                if item is None:
                    running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    self.room.release()
                    yield item
        finally:
            with self.state:
                self.stopped = True
                self.state.notify_all()
            self.room.release(len(servers) or 1)

    def _work(self, server: Server) -> None:
        try:
            while server.ready.wait() and server in self.engine.servers:
                if (request := self._take()) is None:
                    return
                recoveries = server.recoveries
                try:
                    samples = server.generate(request, self.engine.key)
                except Unreachable as error:
                    server.ready.clear()
                    self._give_back(request, error)
                    self.engine.recover(server, recoveries, error)
                else:
                    self._finish(server, request, samples)
        except BaseException as error:  # raised in the consumer's thread
            server.ready.set()
            self.done.put(error)
        finally:
            self.done.put(None)

    def _take(self) -> Request | None:
        """The next request; None when none is left or can be returned by another thread."""
        with self.state:
            while not self.stopped and (self.left or self.working):
                if self.left:
                    self.working += 1
                    return self.left.popleft()
                self.state.wait()
            return None

    def _give_back(self, request: Request, error: Exception) -> None:
        with self.state:
            self.working -= 1
            self.tries[request.index, request.first] += 1
            tries = self.tries[request.index, request.first]
            if tries > self.most_tries:
                raise UserError(
                    f"generation.server: prompt {request.index}: no samples after {tries} tries: "
                    f"{error}"
                )
            self.left.append(request)
            self.state.notify_all()

    def _finish(self, server: Server, request: Request, samples: list[RawSample]) -> None:
        server.failures = 0
        self.room.acquire()
        with self.state:
            self.working -= 1
            self.state.notify_all()
        self.done.put((request, samples))
