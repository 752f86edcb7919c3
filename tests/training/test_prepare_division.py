"""The data of a run: what a model reads as the same prompt is in one part, or counted as seen."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from support.chat_templates import chat_tokenizer
from support.tiny_runs import metrics, stage_folder, tiny_recipe

from irl_align.cli.show import show_runs
from irl_align.cli.terminal import console
from irl_align.config.recipe import load_recipe
from irl_align.errors import UserError
from irl_align.training.prepare import load_data
from irl_align.training.run_folder import Run
from irl_align.training.train import train

CARD = """---
irl_align:
  kind: demonstrations
  template: TEMPLATE
  lowercase: LOWER
  splits: {train: {files: train.jsonl}, test: {files: test.jsonl}}
  columns: {prompt: prompt, completion: completion}
---
"""
CASES, SPACES = ("Say {}", "say {}", "SAY {}"), ("Say {}", " Say {}", "Say {}\n")


def write_data(folder: Path, template: str, spellings: tuple[str, ...], test: list[str]) -> Path:
    """A card whose train split has 40 prompts in three spellings each."""
    train = [spelling.format(f"number {n}") for n in range(40) for spelling in spellings]
    for name, prompts in (("train", train), ("test", test)):
        rows = [{"prompt": p, "completion": p.lower().split()[-1]} for p in prompts]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    text = CARD.replace("TEMPLATE", template).replace("LOWER", str(spellings == CASES).lower())
    (folder / "own.md").write_text(text, encoding="utf-8")
    return folder / "own.md"


def test_train_divides_by_what_the_model_reads_and_reports_seen_prompts_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    card = write_data(
        tmp_path, "'{prompt}'", CASES, ["sAY number 1", "say number 2", "Say nothing"]
    )
    recipe = tiny_recipe(
        tmp_path,
        f"data.card={card}",
        "data.task={}",
        "evaluation={split: test, temperatures: [1.0]}",
        "loop.iterations=0",
        "sft.args.num_train_epochs=1",
    )
    result = train(recipe)
    folder = stage_folder(result.folder, "data")
    ids = {
        part: {
            tuple(row)
            for row in Dataset.from_parquet(str(folder / f"{part}.parquet"))["prompt_ids"]
        }
        for part in ("sft", "held_out")
    }
    assert len(ids["sft"]) + len(ids["held_out"]) == 40 and not ids["sft"] & ids["held_out"]
    recorded = metrics(result.folder)
    assert recorded["data"]["sft_prompts"] == len(ids["sft"])
    seen = recorded["data"]["evaluation_seen"]  # those of the two that are not held out
    assert recorded["data"]["evaluation_prompts"] == 3 and 0 < seen <= 2
    assert f"{seen} of the 3 prompts of split test are in the training data as well" in caplog.text
    evaluation = recorded["evaluation/0/t1"]
    assert (evaluation["seen"]["prompts"], evaluation["unseen"]["prompts"]) == (seen, 3 - seen)
    rows = Run.load(result.folder).answers(0)[1.0]
    assert sum(row["seen"] for row in rows) == seen
    assert [row["seen"] for row in rows if row["prompt"] == "Say nothing"] == [False]
    show_runs([result.view()], console())
    out = capsys.readouterr().out
    assert "results, unseen and seen prompts" in out


def test_load_data_divides_by_the_ids_of_the_models_tokenizer(tmp_path: Path) -> None:
    """The template strips the prompts: spellings that differ in space only are the same ids."""
    tokenizer = chat_tokenizer("gemma")
    model = tmp_path / "model"
    tokenizer.save_pretrained(model)
    card = write_data(tmp_path, "chat", SPACES, ["x"])
    values = {
        "name": "own",
        "data": {"card": str(card), "held_out": 0.3},
        "model": {"path": str(model)},
        "evaluation": {"split": "test"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    rows = load_data(recipe).rows
    sft, held_out = ({row["prompt"].strip() for row in rows[part]} for part in ("sft", "held_out"))
    assert sft and held_out and not sft & held_out
    gone = load_recipe(tmp_path / "recipe.yaml", [f"model.path={tmp_path / 'gone'}"])
    with pytest.raises(UserError, match="gone"):
        load_data(gone)
    assert load_data(gone, needs_tokenizer=False).rows["sft"]
