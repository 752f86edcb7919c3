"""Pushing with the real huggingface_hub client to a small Hub on the loopback address."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub_client import connected, main, push, repo
from support.hub_server import TOKEN
from support.hub_state import Hub, metadata
from support.shared_runs import shared_run
from support.tiny_runs import the_line

from irl_align import RewardModel

pytestmark = pytest.mark.timeout(240)
PROMPT, ANSWER = "name[the red lion], food[thai]", "The red lion serves thai food."


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that this process's client talks to."""
    with connected(tmp_path, monkeypatch) as hub:
        yield hub


# --- what arrives ---------------------------------------------------------------------------------


def test_pushed_reward_and_pairs_load_in_another_process(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a new process, transformers and datasets load a pushed reward and pushed pairs."""
    ended = push(capsys, "--repo", "me/reward", "--what", "reward")
    assert ended.status == 0, ended.err
    commit = repo(hub, "me/reward").branches["main"]
    assert ended.out == f"{hub.url}/me/reward: commit {commit}\n"
    assert push(capsys, "--repo", "lab/pairs", "--what", "pairs").status == 0
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, PROMPT, ANSWER],
        env={**os.environ, "OMP_NUM_THREADS": "1", "IRL_TEST_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert loaded.returncode == 0, loaded.stderr
    actual = json.loads(loaded.stdout)
    assert shared_run("contrast").reward is not None
    expected = float(
        RewardModel.from_pretrained(shared_run("contrast").reward).score([PROMPT], [ANSWER])
    )
    assert actual["transformers"] == pytest.approx(expected, abs=1e-5)
    assert actual["irl_align"] == pytest.approx(expected, abs=1e-5)
    made = next(r for r in shared_run("contrast").view().metrics if r["key"] == "pairs/0")
    assert actual["pairs"] == {
        "train": made["train"]["pairs"],
        "validation": made["held_out"]["pairs"],
    }
    assert actual["tagged"] == 1


LOAD = """
import json, os, sys
import datasets
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from irl_align import RewardModel

prompt, answer = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained("me/reward")
model = AutoModelForSequenceClassification.from_pretrained("me/reward").eval()
chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
pairs = datasets.load_dataset("lab/pairs", "pairs", cache_dir=os.environ["IRL_TEST_CACHE"])
tagged = AutoModelForSequenceClassification.from_pretrained("me/reward", revision="iteration-0")
print(json.dumps({
    "transformers": model(**inputs).logits.item() - model.config.irl_reward["mean"],
    "irl_align": RewardModel.from_pretrained("me/reward").score([prompt], [answer]).item(),
    "pairs": {split: len(rows) for split, rows in pairs.items()},
    "tagged": tagged.config.num_labels,
}))
"""


def test_push_makes_one_commit_with_a_valid_card_and_a_tag(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    push(capsys, "--private")
    assert [commit.message for commit in repo(hub).commits] == [
        "initial commit",
        "policy by irl-align",
    ]
    assert repo(hub).private and repo(hub).tags == {"iteration-1": repo(hub).branches["main"]}
    names = {".gitattributes", "README.md", "chat_template.jinja", "config.json", "recipe.yaml"}
    names |= {"generation_config.json"}
    assert set(main(hub)) == names | {
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert metadata(main(hub)["README.md"])["license"] == "apache-2.0"
    stored = b"".join(main(hub).values())
    assert TOKEN.encode() not in stored
    assert not (shared_run("contrast").folder / ".push").exists()


def test_push_again_makes_no_commit_and_no_upload(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    (shared_run("contrast").folder / ".push").mkdir()  # what a killed push leaves
    (shared_run("contrast").folder / ".push" / "half.safetensors").write_bytes(b"half")
    push(capsys)
    uploads = hub.count("PUT", "/lfs/")
    assert not any("half" in name for name in main(hub))
    again = push(capsys, "--repo", "model")  # the token's own user is the owner
    assert (again.status, again.out) == (0, f"{hub.url}/me/model: nothing new\n")
    assert len(repo(hub).commits) == 2 and hub.count("PUT", "/lfs/") == uploads == 1
    assert list(repo(hub).tags) == ["iteration-1"]


def test_push_of_two_iterations_makes_a_commit_and_a_tag_each(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    for iteration in (0, 1):
        arguments = ("--what", "policy", "--repo", "lab/policy", "--iteration", iteration)
        assert push(capsys, *arguments).status == 0
    actual = repo(hub, "lab/policy")
    assert actual.tags["iteration-1"] == actual.branches["main"] != actual.tags["iteration-0"]
    weights = [
        actual.at(f"iteration-{k}").files["model.safetensors"]  # type: ignore[union-attr]
        for k in (0, 1)
    ]
    assert weights[0] != weights[1]
    assert weights[1] == (shared_run("contrast").policy / "model.safetensors").read_bytes()


def test_push_moves_the_tag_of_its_iteration(
    hub: Hub, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    push(capsys)
    first = repo(hub).tags["iteration-1"]
    moved = push(capsys, "--license", "mit")
    assert moved.status == 0 and "tag iteration-1 moves" in caplog.text
    assert repo(hub).tags == {"iteration-1": repo(hub).branches["main"]} != {"iteration-1": first}
    assert metadata(main(hub)["README.md"])["license"] == "mit"


def test_push_to_a_branch(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(capsys, "--revision", "try").status == 0
    assert "model.safetensors" in repo(hub).at("try").files  # type: ignore[union-attr]
    assert set(main(hub)) == {".gitattributes"}
    assert push(capsys, "--revision", "try").out.endswith("nothing new\n")
    line = the_line(push(capsys, "--revision", "try", "--what", "reward"))
    assert "of LlamaForCausalLM, and this is LlamaForSequenceClassification" in line


def test_push_deletes_shards_of_an_earlier_push(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    push(capsys)
    config = main(hub)["config.json"]
    old = {"config.json": config, "model-00001-of-00002.safetensors": b"x", "notes.txt": b"mine"}
    hub.add("model", "me/old", old)
    assert push(capsys, "--repo", "me/old").status == 0
    names = set(main(hub, "me/old"))
    assert "model-00001-of-00002.safetensors" not in names
    assert {"model.safetensors", "notes.txt"} <= names


def test_dry_run_contacts_no_server(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    ended = push(capsys, "--dry-run", "--revision", "try")
    assert ended.status == 0 and hub.requests == []
    assert "would push to the model me/model, branch try, tag iteration-1, licence" in ended.out
    size = (shared_run("contrast").policy / "model.safetensors").stat().st_size
    assert f"{size // 1000:,}" in ended.out and "model.safetensors" in ended.out


# --- cuts and faults ------------------------------------------------------------------------------


def test_push_resumes_after_a_cut_in_the_upload(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("PUT", "/lfs/", status=0, times=10**6)
    line = the_line(push(capsys))
    assert "the connection to the Hub failed" in line and "the same command resumes" in line
    assert set(main(hub)) == {".gitattributes"} and repo(hub).tags == {}  # nothing half pushed
    hub.faults.clear()
    assert push(capsys).status == 0
    assert len(repo(hub).commits) == 2 and "model.safetensors" in main(hub)


def test_push_after_a_cut_before_the_commit_uploads_nothing_twice(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("POST", "/commit/", status=0, times=10**6)
    assert "the connection to the Hub failed" in the_line(push(capsys))
    assert hub.count("PUT", "/lfs/") == 1 and set(main(hub)) == {".gitattributes"}
    hub.faults.clear()
    assert push(capsys).status == 0
    assert hub.count("PUT", "/lfs/") == 1 and "model.safetensors" in main(hub)


def test_push_makes_one_commit_if_the_response_is_lost(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("POST", "/commit/", status=0, after=True)
    assert push(capsys).status == 0
    assert len(repo(hub).commits) == 2
    assert repo(hub).tags == {"iteration-1": repo(hub).branches["main"]}


def test_push_repeats_every_step_after_a_temporary_error(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every step is tried again."""
    steps = [
        ("GET", "/api/whoami-v2"),
        ("GET", "/api/models/me/model$"),
        ("POST", "/api/repos/create"),
        ("POST", "/preupload/"),
        ("POST", "/objects/batch"),
        ("PUT", "/lfs/"),
        ("POST", "/verify"),
        ("POST", "/commit/"),
        ("GET", "/refs"),
        ("POST", "/tag/"),
    ]
    for number, (method, path) in enumerate(steps):
        hub.fail(method, path, (500, 503, 429)[number % 3], times=2)
    ended = push(capsys)
    assert ended.status == 0, ended.err
    assert not any(fault.times for fault in hub.faults)
    assert len(repo(hub).commits) == 2 and list(repo(hub).tags) == ["iteration-1"]


@pytest.mark.parametrize(
    ("status", "message"),
    [(503, "the Hub failed 4 times (status 503)"), (429, "limit is reached; try again in 77 s")],
)
def test_push_reports_a_permanent_server_error(
    status: int, message: str, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("POST", "/commit/", status, times=10**6, headers={"Retry-After": "77"})
    assert message in the_line(push(capsys))
    assert set(main(hub)) == {".gitattributes"}
