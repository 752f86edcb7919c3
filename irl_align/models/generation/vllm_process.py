"""Start ``vllm serve`` for a run, or in the foreground for other machines."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from irl_align.config.generation import ServerOptions
from irl_align.errors import UserError
from irl_align.models.generation.vllm_common import (
    EngineSettings,
    PolicyFolder,
    engine_args,
    require_vllm,
)
from irl_align.models.generation.vllm_main import END_WITH_STDIN, GRACE, GUARD, KEY_VARIABLE

logger = logging.getLogger(__name__)
SERVED_NAME = "policy"
HEALTH_TIMEOUT = 5.0  # seconds


def serve_command(
    policy: PolicyFolder, settings: EngineSettings, host: str, port: int
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a server; the API key is only in the environment."""
    args = engine_args(settings, policy)
    command = [
        sys.executable,
        "-m",
        "irl_align.models.generation.vllm_main",
        str(args.pop("model")),
    ]
    command += ["--host", host, "--port", str(port), "--served-model-name", SERVED_NAME]
    command += ["--tokens-only", "--middleware", GUARD, "--disable-uvicorn-access-log"]
    command += flags(args)
    environment = {
        **os.environ,
        "VLLM_SERVER_DEV_MODE": "1",  # the paths that load weights
        "VLLM_NO_USAGE_STATS": "1",
    }
    if args.get("enable_lora"):
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if settings.device == "cpu":
        # Compiling two functions of the sampler would take longer than it can save.
        environment["TORCHDYNAMO_DISABLE"] = "1"
        # The worker in the engine's process: one process less to start.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return command, environment


def flags(args: Mapping[str, Any]) -> list[str]:
    """Options by the names of vLLM's EngineArgs, as flags of its command."""
    out = []
    for name, value in args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            out.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            text = json.dumps(value) if isinstance(value, dict | list) else str(value)
            out += [f"--{flag}", text]
    return out


class ServerProcess:
    """A server on this machine that ends when this process ends, even when it is killed.

    Args:
        policy: what the server starts with.
        settings: how vLLM is started.
        options: its port, the seconds until it must answer, and the variable of its API key; the
            key is random where that is not set.
        log: file for its output.

    Raises:
        UserError: vLLM is missing, the port is taken, or the server ends or is not ready in time.
    """

    def __init__(
        self,
        policy: PolicyFolder,
        settings: EngineSettings,
        options: ServerOptions,
        log: Path,
    ) -> None:
        require_vllm(settings.device)
        self.api_key = os.environ.get(options.api_key_env) or secrets.token_hex(16)
        self.log = log
        port = _free_port(options.port)
        self.url = f"http://127.0.0.1:{port}"
        command, environment = serve_command(policy, settings, "127.0.0.1", port)
        environment[KEY_VARIABLE] = self.api_key
        log.parent.mkdir(parents=True, exist_ok=True)
        logger.info("starting a vLLM server on port %d; it logs to %s", port, log)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, END_WITH_STDIN],
                stdin=subprocess.PIPE,  # nothing is written to it: it closes when this process ends
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # its own process group, with vLLM's engine in it
            )
        try:
            self._wait(options.start_timeout)
        except BaseException:
            self.kill()
            raise

    def _wait(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not healthy(self.url):
            if self.process.poll() is not None:
                raise UserError(
                    f"generation.backend: vllm-server: vLLM's server ended while it started: "
                    f"{_last_error(self.log)}; its output is in {self.log}"
                )
            if time.monotonic() > deadline:
                raise UserError(
                    f"generation.server.start_timeout: vLLM's server was not ready after "
                    f"{timeout:g} s; its output is in {self.log}"
                )
            time.sleep(0.25)

    @property
    def alive(self) -> bool:
        """Whether the process runs and answers."""
        return self.process.poll() is None and healthy(self.url)

    def kill(self) -> None:
        """End the server and vLLM's engine: by SIGTERM first, so that it frees shared memory."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


def healthy(url: str) -> bool:
    """Whether a server answers that it is healthy."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=HEALTH_TIMEOUT) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _free_port(wanted: int | None) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise UserError(
                f"generation.server.port: {wanted} is taken; expected a free one, or null for any"
            ) from error
        return int(probe.getsockname()[1])


def _last_error(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    named = [line for line in lines if "Error: " in line or "error: " in line]
    return " ".join((named or lines or ["no output"])[-1].split())[-300:]


def serve(path: Path, settings: EngineSettings, host: str, port: int) -> None:
    """Replace this process by a server for other machines' runs; does not return.

    Raises UserError where others could reach a server without an API key.
    """
    require_vllm(settings.device)
    if not os.environ.get(KEY_VARIABLE) and host not in ("127.0.0.1", "localhost"):
        raise UserError(
            f"{KEY_VARIABLE}: not set; expected a key in the environment: without one, everyone "
            f"who reaches {host}:{port} can load weights there"
        )
    command, environment = serve_command(PolicyFolder.read(path), settings, host, port)
    os.execve(command[0], command, environment)
