"""Every command of the tutorial runs on its files and prints what the text promises."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.hub_client import connected
from support.hub_server import TOKEN
from support.tiny_runs import RECIPE, irl_align

from irl_align.config.resources import recipes_dir
from irl_align.config.yaml import dump_yaml
from irl_align.tasks.restaurant import demonstrations

pytestmark = pytest.mark.timeout(600)
TEXT = (recipes_dir() / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line for kind, _, text in BLOCKS if kind == "bash" for line in text.splitlines() if line
]
SUBCOMMANDS = {
    *("data", "plan", "train", "show", "report", "generate", "score", "evaluate", "export", "push"),
}


def small(recipe: dict[str, Any]) -> dict[str, Any]:
    """The tutorial's recipe with the model, the sizes and the rates of the tests' tiny runs."""
    tiny = yaml.safe_load(RECIPE)
    for part in ("sft", "reward", "policy_update"):
        assert set(recipe[part]["args"]) <= {*tiny["sft"]["args"]}
        recipe[part]["args"] |= {"num_train_epochs": 1, "learning_rate": 1e-3}
    recipe["sft"]["args"] = tiny["sft"]["args"]
    recipe["policy_update"] |= {"n": 2, "prompts": 16}
    recipe["generation"] |= {"max_new_tokens": 48, "samples_per_prompt": 1}
    recipe["evaluation"] |= {"prompts": 6, "held_out_prompts": 8}
    del recipe["data"]["max_completion_tokens"]  # more than the tiny model's positions
    return recipe | {"model": tiny["model"], "device": "cpu"}


def write_files() -> None:
    """Write the files that the tutorial shows, and data for its user."""
    rows = demonstrations(split="train", seed=0, size=160, noise=0.0)
    lines = [{"question": row["prompt"], "answer": row["completion"]} for row in rows]
    Path("support.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for kind, name, text in BLOCKS:
        if name:
            Path(name).write_text(text)
        else:
            assert kind == "bash"
    recipe = yaml.safe_load(Path("support.yaml").read_text())
    Path("support.yaml").write_text(dump_yaml(small(recipe)))


def test_tutorial_uses_every_command_of_a_first_project() -> None:
    assert {command.split()[1] for command in COMMANDS} == SUBCOMMANDS
    assert all(command.startswith("irl-align ") for command in COMMANDS)


def test_commands_of_the_tutorial_run_and_print_what_the_text_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files()
    outputs: dict[str, str] = {}
    with connected(tmp_path, monkeypatch) as hub:
        for command in COMMANDS:
            ended = irl_align(capsys, *shlex.split(command)[1:])
            assert ended.status == 0, (command, ended.err)
            assert TOKEN not in ended.out + ended.err
            outputs[command] = ended.out
        check_outputs(outputs, hub.url)
        assert [name for _, name in hub.repos] == ["me/support-reward"]
        files = hub.repos["model", "me/support-reward"].at("main").files  # type: ignore[union-attr]
        assert {"README.md", "config.json", "model.safetensors"} <= set(files)


def check_outputs(outputs: dict[str, str], url: str) -> None:
    def out(part: str) -> str:
        (text,) = (text for command, text in outputs.items() if part in command)
        return text

    assert "train" in out("data support.md") and "licence cc-by-4.0" in out("data support.md")
    plan = out("plan support.yaml")
    assert "reward/0" in plan and "policy-1" in plan and "rtx-4090" in plan
    assert "no store at" in plan
    assert "smoke" in out("--smoke").lower()
    assert "policy: runs/store/sft-" in out("loop.iterations=0")
    assert "reward: runs/store/reward-" in outputs["irl-align train support.yaml"]
    assert "support-spin" in out("show runs/support-seed0 runs/support-spin-seed0")
    assert Path(out("report runs").split("report: ")[1].strip()).stat().st_size > 10_000
    rows = [json.loads(line) for line in out("generate runs").splitlines()]
    assert len(rows) == 2 and "How do I reset" in json.dumps(rows[0])
    by_run = [json.loads(line) for line in out("score runs").splitlines()]
    exported = [json.loads(line) for line in out("score support-reward").splitlines()]
    assert len(by_run) == 2
    for ours, theirs in zip(by_run, exported, strict=True):
        gap = ours["chosen_score"] - ours["rejected_score"]
        assert theirs["chosen_score"] - theirs["rejected_score"] == pytest.approx(gap, abs=1e-4)
    assert "preferences" in out("evaluate runs")
    assert "reward: support-reward" in out("export runs")
    assert "nothing was sent" in out("--dry-run")
    pushed = outputs["irl-align push runs/support-seed0 --repo me/support-reward --private"]
    assert pushed.startswith(f"{url}/me/support-reward: commit ")
