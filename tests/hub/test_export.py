"""Exported rewards, policies and pairs, loaded by other tools: transformers, TRL, datasets."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from support.shared_runs import shared_run
from support.tiny_runs import irl_align, the_line
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

from irl_align.data.cards import load_card
from irl_align.data.encoding import encode_completions, encode_prompts
from irl_align.data.loading import load_preferences
from irl_align.hub.check import chat_texts
from irl_align.hub.export import export
from irl_align.reward.model import RewardModel

pytestmark = pytest.mark.timeout(240)
RESTAURANTS = ["name[the red lion], food[thai], area[suburbs]", "name[Blue Heron], price[cheap]"]
ANSWERS = ["The red lion serves thai food in the suburbs.", "the blue heron is cheap."]


# --- a run's reward -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported reward."""
    folder = tmp_path_factory.mktemp("export") / "reward"
    export(shared_run("contrast").folder, "reward", folder)
    return folder


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """The run's own scores of RESTAURANTS with ANSWERS."""
    assert shared_run("contrast").reward is not None
    return RewardModel.from_pretrained(shared_run("contrast").reward).score(RESTAURANTS, ANSWERS)


def offset(folder: Path) -> float:
    """What the logits have besides the score (a Llama has no bias to hold it)."""
    return float(json.loads((folder / "config.json").read_text())["irl_reward"]["mean"])


def chats() -> list[list[dict[str, str]]]:
    return [
        [{"role": "user", "content": p}, {"role": "assistant", "content": a}]
        for p, a in zip(RESTAURANTS, ANSWERS, strict=True)
    ]


def test_exported_reward_has_the_files_that_other_tools_need(reward: Path) -> None:
    names = {file.name for file in reward.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert {"README.md", "recipe.yaml"} <= names
    assert not any(name.startswith(".") or name.endswith(".bin") for name in names)
    config = json.loads((reward / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "reward"}


def test_exported_reward_gives_the_runs_scores(reward: Path, expected: torch.Tensor) -> None:
    scores = RewardModel.from_pretrained(reward).score(RESTAURANTS, ANSWERS)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_exported_chat_template_gives_the_ids_of_training(reward: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reward)
    ours = RewardModel.from_pretrained(reward)
    prompts = encode_prompts(RESTAURANTS, tokenizer, ours.settings)
    ends = encode_completions(RESTAURANTS, ANSWERS, prompts, tokenizer, ours.settings)
    assert chat_texts(tokenizer, RESTAURANTS, ANSWERS) == [
        p + c for p, c in zip(prompts, ends, strict=True)
    ]
    assert prompts[0][0] == tokenizer.bos_token_id and ends[0][-1] == tokenizer.eos_token_id


@torch.no_grad()
def test_exported_reward_gives_the_scores_with_transformers_alone(
    reward: Path, expected: torch.Tensor
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reward)
    model = AutoModelForSequenceClassification.from_pretrained(reward).eval()
    inputs = tokenizer.apply_chat_template(
        chats(), return_tensors="pt", padding=True, return_dict=True
    )
    logits = model(**inputs).logits[:, 0] - offset(reward)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_exported_reward_gives_the_scores_in_the_layout_of_rewardbench(
    reward: Path, expected: torch.Tensor
) -> None:
    """Its default path: the chat as text, tokenized with special tokens, a second BOS cut off."""
    tokenizer = AutoTokenizer.from_pretrained(reward)
    model = AutoModelForSequenceClassification.from_pretrained(reward).eval()
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats()]
    inputs = tokenizer(texts, truncation=True, max_length=128, padding=True, return_tensors="pt")
    assert inputs["input_ids"][0, :2].tolist() == [tokenizer.bos_token_id] * 2
    inputs = {name: value[:, 1:] for name, value in inputs.items()}
    logits = model(**inputs).logits[:, 0] - offset(reward)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_exported_reward_is_a_reward_function_of_trl(
    reward: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    prompts = [{"prompt": chat[:1]} for chat in chats()]
    args = GRPOConfig(
        output_dir=str(tmp_path),
        num_generations=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,  # in half precision its scores agree to two digits
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(shared_run("contrast").policy),
        processing_class=AutoTokenizer.from_pretrained(reward),
        reward_funcs=str(reward),
        args=args,
        train_dataset=datasets.Dataset.from_list(prompts),
    )
    answers = [chat[1:] for chat in chats()]
    actual = trainer._calculate_rewards(prompts, [row["prompt"] for row in prompts], answers, None)
    torch.testing.assert_close(actual[:, 0] - offset(reward), expected, atol=1e-5, rtol=0)


def test_exported_reward_can_be_trained_further_by_trl(reward: Path, tmp_path: Path) -> None:
    """At learning rate 0 its first loss is that of the exported scores."""
    (good, bad), prompt = ANSWERS, RESTAURANTS[0]
    row = {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": good}],
        "rejected": [{"role": "assistant", "content": bad}],
    }
    args = RewardConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        learning_rate=0.0,
        logging_steps=1,
        per_device_train_batch_size=1,
        use_cpu=True,
        report_to="none",
        disable_dropout=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
    )
    trainer = RewardTrainer(
        model=str(reward), args=args, train_dataset=datasets.Dataset.from_list([row])
    )
    trainer.train()
    scores = RewardModel.from_pretrained(reward).score([prompt] * 2, [good, bad])
    loss = -torch.nn.functional.logsigmoid(scores[0] - scores[1])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss), abs=1e-4)


def test_score_command_takes_an_exported_reward(
    reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": RESTAURANTS[0], "completion": ANSWERS[0]}) + "\n")
    scored = irl_align(capsys, "score", reward, "--input", rows)
    assert scored.status == 0, scored.err
    expected = RewardModel.from_pretrained(reward).score([RESTAURANTS[0]], [ANSWERS[0]])
    assert json.loads(scored.out)["score"] == pytest.approx(float(expected), abs=1e-5)


# --- policies and pairs ---------------------------------------------------------------------------


def test_exported_policy_keeps_its_weights_and_gets_a_template(tmp_path: Path) -> None:
    run = shared_run("contrast")
    done = export(run.folder, "policy", tmp_path / "policy")
    assert done.iteration == 1
    file = "model.safetensors"
    assert (tmp_path / "policy" / file).read_bytes() == (run.policy / file).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    prompt = [{"role": "user", "content": RESTAURANTS[1]}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    bos = tokenizer.bos_token
    assert tokenizer.decode(ids) == f"{bos}{RESTAURANTS[1]}\n"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "policy").config.irl_prompt


def test_export_of_every_iteration(tmp_path: Path) -> None:
    run = shared_run("contrast")
    export(run.folder, "policy", tmp_path / "zero", iteration=0)
    sft = run.folder / run.view().stages["sft"]["path"] / "model" / "model.safetensors"
    assert (tmp_path / "zero" / "model.safetensors").read_bytes() == sft.read_bytes()
    assert export(run.folder, "reward", tmp_path / "r", iteration=0).iteration == 0
    done = export(shared_run("spin").folder, "policy", tmp_path / "spin", iteration=1)
    weights = (done.folder / "model.safetensors").read_bytes()
    assert weights == (shared_run("spin").policy / "model.safetensors").read_bytes()
    done = export(shared_run("select").folder, "policy", tmp_path / "select")
    weights = (done.folder / "model.safetensors").read_bytes()
    assert weights == (shared_run("select").policy / "model.safetensors").read_bytes()


def test_exported_pairs_are_a_dataset_and_a_data_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(shared_run("contrast").folder, "pairs", tmp_path / "pairs")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    text = (tmp_path / "pairs" / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    known: dict[str, Any] = {"REPO": str(tmp_path / "pairs")}
    exec(snippet, known)
    actual, samples = known["pairs"], known["samples"]
    record = shared_run("contrast").view().metrics
    made = next(r for r in record if r["key"] == "pairs/0")
    assert len(actual["train"]) == made["train"]["pairs"]
    assert len(actual["validation"]) == made["held_out"]["pairs"]
    assert set(actual["train"]["source"]) == {"demonstration/policy", "demonstration/contrast"}
    for row in actual["train"].select(range(20)):
        contrast = row["source"] == "demonstration/contrast"
        assert (row["chosen"] == row["rejected"]) == contrast
        assert (row["prompt"] != row["rejected_prompt"]) == contrast
        assert "name[" in row["prompt"] and "<" not in row["chosen"]

    card = load_card(tmp_path / "pairs" / "README.md")
    rows = load_preferences(card, "validation")
    assert {row["subset"] for row in rows} == {"demonstration/policy"}
    assert set(samples["samples"]) == {f"policy-{k}-t{t}" for k in (0, 1) for t in (0, 1)}
    assert {"prompt", "completion", "slot_errors"} <= set(samples.column_names)


# --- bad input ------------------------------------------------------------------------------------


def unfinished(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    shutil.copytree(shared_run("contrast").folder, run)
    (run / "summary.json").unlink()
    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what", "model"], r"--what: found 'model', expected one of reward, policy, pairs"),
        (["--iteration", "7"], r"--iteration: .* has no reward 7; expected one of 0"),
        (["--what", "policy", "--iteration", "9"], r"has no policy 9; expected one of 0, 1"),
        (["--what", "pairs", "--iteration", "0"], r"pairs are exported together"),
    ],
)
def test_export_refuses_a_wrong_option(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "out"
    ended = irl_align(capsys, "export", shared_run("contrast").folder, "--to", to, *arguments)
    assert re.search(message, the_line(ended)) and not to.exists()


def test_export_refuses_unfinished_runs_and_missing_artefacts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "out"
    line = the_line(irl_align(capsys, "export", unfinished(tmp_path), "--to", to))
    assert "this run is not finished; run its recipe again" in line
    line = the_line(irl_align(capsys, "export", shared_run("spin").folder, "--to", to))
    assert "this run has no explicit reward" in line
    line = the_line(irl_align(capsys, "export", tmp_path / "none", "--to", to))
    assert "found no such folder, expected the folder of a run" in line
    line = the_line(irl_align(capsys, "export", shared_run("contrast").folder, "--to", tmp_path))
    assert "--to" in line and "exists" in line
    assert not to.exists()


def test_export_on_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("irl_align.hub.export.shutil.copyfile", full)
    arguments = ("--what", "policy", "--to", tmp_path / "out")
    line = the_line(irl_align(capsys, "export", shared_run("contrast").folder, *arguments))
    assert line.startswith("export: no space left for") and list(tmp_path.iterdir()) == []
