"""This process as a client of the loopback Hub, and the push that the tests make."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from support.hub_server import TOKEN, environment, serve
from support.hub_state import Hub, Repo
from support.shared_runs import shared_run
from support.tiny_runs import Ended, irl_align


@contextmanager
def connected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that this process's client talks to; waits between tries are not slept."""
    with serve() as hub:
        for name, value in environment(hub, tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_URL_HOSTS", frozenset({"127.0.0.1"}))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("irl_align.hub.push.WAIT", 0.001)
        pause = SimpleNamespace(sleep=lambda seconds: None)
        monkeypatch.setattr("huggingface_hub.utils._http.time", pause)
        close_session()
        yield hub
    close_session()


def push(capsys: pytest.CaptureFixture[str], *arguments: object, run: Path | None = None) -> Ended:
    """Push the Best-of-N run's policy to me/model, or as the arguments say."""
    given = list(arguments)
    for option, value in (("--repo", "me/model"), ("--what", "policy")):
        if option not in given:
            given += [option, value]
    ended = irl_align(capsys, "push", run or shared_run("contrast").folder, *given)
    assert TOKEN not in ended.out + ended.err
    return ended


def repo(hub: Hub, name: str = "me/model", kind: str = "model") -> Repo:
    return hub.repos[kind, name]


def main(hub: Hub, name: str = "me/model", kind: str = "model") -> dict[str, bytes]:
    actual = repo(hub, name, kind).at("main")
    assert actual is not None
    return actual.files
