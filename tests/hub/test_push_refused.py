"""Pushes that are refused, each in one line, with nothing half pushed."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.hub_client import connected, main, push, repo
from support.hub_server import READ_TOKEN
from support.hub_state import Hub, metadata
from support.shared_runs import shared_run
from support.tiny_runs import irl_align, the_line

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that this process's client talks to."""
    with connected(tmp_path, monkeypatch) as hub:
        yield hub


def test_push_without_a_token(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "found no Hub token; set HF_TOKEN" in the_line(push(capsys))
    assert hub.requests == []


def test_push_with_a_wrong_token(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    ended = push(capsys)
    assert "the Hub does not accept the token" in the_line(ended)
    assert "hf_wrong" not in ended.err and hub.repos == {}


def test_push_without_the_right_to_write(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = the_line(push(capsys, "--repo", "stranger/model"))
    assert "the token may not write to stranger/model" in line
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert "may not write to reader/model" in the_line(push(capsys, "--repo", "reader/model"))
    assert hub.repos == {}
    hub.add("model", "me/model", {})
    assert "may not write to me/model" in the_line(push(capsys))
    assert hub.count("PUT", "/lfs/") == 0


@pytest.mark.parametrize(
    "name", ["a/b/c", "me/has space", "-me/x", "datasets/me/x", "https://huggingface.co/me/x", ""]
)
def test_push_refuses_an_invalid_name(
    name: str, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    line = the_line(push(capsys, "--repo", name))
    assert f"--repo: found {name!r}, expected user/name" in line and hub.requests == []


def test_push_needs_force_over_another_architecture(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    there = {"config.json": json.dumps(config).encode(), "model.safetensors": b"theirs"}
    hub.add("model", "me/model", there)
    line = the_line(push(capsys))
    assert "me/model holds config.json, model.safetensors of BertForMaskedLM" in line
    assert "this is LlamaForCausalLM" in line and "--force" in line
    assert main(hub)["model.safetensors"] == b"theirs"
    assert push(capsys, "--force").status == 0
    assert main(hub)["model.safetensors"] != b"theirs"


def test_push_refuses_a_policy_over_a_reward(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    push(capsys, "--what", "reward")
    before = dict(main(hub))
    line = the_line(push(capsys))
    assert "of LlamaForSequenceClassification, and this is LlamaForCausalLM" in line
    assert main(hub) == before
    # Another run's reward does: it is of the same kind.
    assert push(capsys, "--what", "reward", run=shared_run("select").folder).status == 0


def test_push_needs_force_over_another_data_set(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("dataset", "me/data", {"train.csv": b"a,b\n", "README.md": b"---\ntags: [x]\n---\n"})
    arguments = ("--what", "pairs", "--repo", "me/data")
    assert "the dataset me/data holds train.csv and was not made by" in the_line(
        push(capsys, *arguments)
    )
    assert push(capsys, *arguments, "--force").status == 0
    assert push(capsys, *arguments).out.endswith("nothing new\n")  # now it is ours


def test_push_private_refuses_a_public_repository(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("model", "me/model", {})
    line = the_line(push(capsys, "--private"))
    assert "me/model exists and is public" in line
    assert set(main(hub)) == {".gitattributes"}


def test_push_refuses_an_unfinished_and_a_missing_run(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(shared_run("contrast").folder, run)
    (run / "summary.json").unlink()
    assert "this run is not finished" in the_line(push(capsys, run=run))
    assert "found no such folder" in the_line(push(capsys, run=tmp_path / "none"))
    assert hub.repos == {}


def edited_run(folder: Path, old: str, new: str) -> Path:
    """A copy of a run, with its store, whose recipe has other text."""
    run = folder / "runs" / "run"
    shutil.copytree(shared_run("contrast").folder, run)
    (run.parent / "store").symlink_to(shared_run("contrast").folder.parent / "store")
    recipe = run / "recipe.yaml"
    assert old in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(old, new))
    return run


def test_push_refuses_data_without_a_licence(
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without a licence in the data card, export warns and push needs --license."""
    card = tmp_path / "own.md"
    card.write_text(
        "---\nirl_align:\n  kind: demonstrations\n  splits: {train: {files: a}}\n"
        "  columns: {prompt: a, completion: b}\n---\n"
    )
    run = edited_run(tmp_path, "card: restaurant", f"card: {card}")
    for options in ([], ["--dry-run"], ["--private"], ["--private", "--dry-run"]):
        line = the_line(push(capsys, *options, run=run))
        assert "licence: unknown: the demonstrations: unknown" in line and "--license" in line
    assert hub.repos == {}
    exported = irl_align(capsys, "export", run, "--to", tmp_path / "out")
    assert exported.status == 0 and "a push needs one" in caplog.text
    assert push(capsys, "--license", "cc0-1.0", run=run).status == 0
    assert metadata(main(hub)["README.md"])["license"] == "cc0-1.0"


def test_push_without_a_licence_of_the_base_model_is_private(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    base.mkdir()  # without a README.md
    run = edited_run(tmp_path, "path: null\n  revision:", f"path: {base}\n  revision:")
    for options in ([], ["--dry-run"]):
        assert "the base model: unknown" in the_line(push(capsys, *options, run=run))
    assert hub.repos == {}
    assert "nothing was sent" in push(capsys, "--private", "--dry-run", run=run).out
    assert hub.repos == {}
    assert push(capsys, "--private", run=run).status == 0 and repo(hub).private
    assert metadata(main(hub)["README.md"])["license"] == "unknown"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("HF_HUB_OFFLINE", True, "HF_HUB_OFFLINE is set"),
        ("ENDPOINT", "http://127.0.0.1:9", "the connection to the Hub failed"),
    ],
)
def test_push_without_a_server(
    name: str,
    value: object,
    message: str,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, name, value)
    assert message in the_line(push(capsys))
