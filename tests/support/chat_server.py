"""An OpenAI-compatible endpoint on the loopback address, whose replies a test chooses."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | int | tuple[int, str]
"""A reply's text; or a status; or a status and the whole body."""


class ChatServer(ThreadingHTTPServer):
    """Answers POSTs by `answer(body)`; remembers what came."""

    daemon_threads = True
    answer: Callable[[dict[str, Any]], Answer]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[tuple[str, dict[str, Any], str | None]] = []
        """(path, body, its Authorization)."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print errors, but for a judge that went away: it stops at the first bad reply."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body, self.headers["Authorization"]))
        answer = self.server.answer(body)
        if isinstance(answer, str):
            answer = (200, json.dumps({"choices": [{"message": {"content": answer}}]}))
        status, text = answer if isinstance(answer, tuple) else (answer, "{}")
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", text)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def chat_server(answer: Callable[[dict[str, Any]], Answer]) -> Iterator[ChatServer]:
    """A server that runs inside the block."""
    server = ChatServer()
    server.answer = answer
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
