"""Sample from vLLM servers: one that the recipe starts, or several that are there.

Requests go to whichever server is free. A server that fails is asked again after a pause; one that
stays away is dropped with a warning, and its requests go to the others. One that came back with
other weights is loaded anew. Each request has exactly one result.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from irl_align.errors import UserError
from irl_align.models.generation.vllm_client import Server, Unreachable
from irl_align.models.generation.vllm_common import EngineSettings, PolicyFolder, RawSample, Request
from irl_align.models.generation.vllm_process import ServerProcess, healthy
from irl_align.models.generation.vllm_worker import shape_of

logger = logging.getLogger(__name__)
IN_FLIGHT = 256  # samples that a server works on at a time
LONGEST_PAUSE = 30.0  # seconds, between two tries


@dataclass(frozen=True)
class ServerSettings:
    """Which servers, and how patiently.

    Attributes:
        urls: servers that are there; empty to start one here.
        api_key: what the servers ask for; empty for none.
        port: of the server that is started; None for a free one.
        timeout: seconds for one request, or for loading weights.
        start_timeout: seconds for a server to start.
        retries: how often a request, or a server that fails, is tried again.
        log: file for the output of the server that is started.
    """

    urls: tuple[str, ...]
    api_key: str = field(repr=False)
    timeout: float
    start_timeout: float
    retries: int
    log: Path
    port: int | None = None


class ServerEngine:
    """An :class:`~irl_align.models.generation.vllm_common.Engine` of one or several servers."""

    def __init__(self, settings: EngineSettings, server: ServerSettings) -> None:
        self.settings = settings
        self.server = server
        self.starts = 0
        self.process: ServerProcess | None = None
        self.servers = [Server(url, server.api_key, server.timeout) for url in server.urls]
        self._given = list(self.servers)
        self._shape: Any = None
        self._rank = 0  # of the largest adapter that our own server takes
        self._resting = False
        self._policy: tuple[PolicyFolder, str] | None = None

    def load(self, policy: PolicyFolder, key: str) -> None:
        """Answer from these weights from now on; servers that cannot are dropped."""
        self._policy = policy, key
        if not self.server.urls:
            shape = shape_of(policy.model)
            fits = shape == self._shape and policy.rank <= self._rank
            if self.process is not None and not (fits and self.process.alive):
                self.restart()
            if self.process is None:
                self.process = self._start()
                self._shape, self._rank = shape, max(self.settings.lora_rank, policy.rank)
                address = self.process.url, self.process.api_key
                self.servers = [Server(*address, self.server.timeout)]
            self._wake()
        for server in self._given:
            if server not in self.servers and healthy(server.url):
                server.failures = 0
                self.servers.append(server)
        if not self.servers:
            raise UserError(f"generation.server.urls: none answers: {', '.join(self.server.urls)}")
        for server in list(self.servers):
            try:
                server.load(policy, key, self.settings.context_length)
            except Unreachable as error:
                self.recover(server, server.recoveries, error)

    def _start(self) -> ServerProcess:
        assert self._policy is not None
        options = self.server
        self.starts += 1
        return ServerProcess(
            self._policy[0],
            self.settings,
            options.api_key,
            options.port,
            options.start_timeout,
            options.log,
        )

    def recover(self, server: Server, recoveries: int, cause: Exception) -> None:
        """Wait for a server that failed and see to its weights; drop it when it stays away.

        Many threads see a failure: the first of them mends it, those that saw the same
        ``recoveries`` wait for it.

        Raises:
            UserError: it was the last server.
        """
        with server.lock:
            try:
                if server.recoveries == recoveries and server in self.servers:
                    server.recoveries += 1
                    server.failures += 1
                    last = cause if server.failures > self.server.retries else None
                    if (last := last or self._mend(server, cause)) is not None:
                        self._drop(server, last)
            finally:
                server.well.set()

    def _mend(self, server: Server, cause: Exception) -> Exception | None:
        """What is still wrong after all tries, if anything."""
        assert self._policy is not None
        for attempt in range(self.server.retries):
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
        """Go on without a server; it is asked again when there are new weights."""
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
        yield from _Run(self, list(requests)).results()

    @property
    def key(self) -> str:
        """Of the weights that samples are to come from."""
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

    def restart(self) -> None:
        """End our own server; the next ``load`` starts a new one. Others' are left alone."""
        if self.process is not None:
            self.process.kill()
            self.process = None
            self.servers = []
            self._resting = False

    def close(self) -> None:
        """End our own server."""
        self.restart()


class _Run:
    """One stream of requests over the servers, by threads with one request each."""

    def __init__(self, engine: ServerEngine, requests: list[Request]) -> None:
        self.engine = engine
        self.left = deque(requests)
        self.tries: Counter[tuple[int, int]] = Counter()
        self.working = 0
        self.state = threading.Condition()
        self.stopped = False
        self.done: queue.Queue[Any] = queue.Queue()
        samples = max((int(request.params["n"]) for request in requests), default=1)
        # Each server but one may fail it until it is dropped.
        retries = engine.server.retries
        self.most_tries = retries + (retries + 1) * (len(engine.servers) - 1)
        share = -(-len(requests) // len(engine.servers))
        self.threads = min(share, max(1, IN_FLIGHT // samples))
        # So many results may wait to be taken.
        self.room = threading.Semaphore(2 * max(1, self.threads) * len(engine.servers))

    def results(self) -> Iterator[tuple[Request, list[RawSample]]]:
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
            while server.well.wait() and server in self.engine.servers:
                if (request := self._take()) is None:
                    return
                recoveries = server.recoveries
                try:
                    samples = server.generate(request, self.engine.key)
                except Unreachable as error:
                    server.well.clear()
                    self._give_back(request, error)
                    self.engine.recover(server, recoveries, error)
                else:
                    self._finish(server, request, samples)
        except BaseException as error:  # told to the consumer, whose thread this is not
            server.well.set()
            self.done.put(error)
        finally:
            self.done.put(None)

    def _take(self) -> Request | None:
        """The next request; None when there is none and none can come back."""
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
