"""Runs of models that others made: every text of a run ends in the chat template's end of turn."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from support.chat_templates import FAMILIES, chat_tokenizer
from support.own_card import write_card
from support.tiny_runs import stage_folder
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from irl_align.config.recipe import make_recipe
from irl_align.training.train import train

CARD = """
  kind: demonstrations
  splits:
    train: {files: demos.jsonl}
    validation: {from: train, share: 0.2}
  columns: {prompt: question, completion: answer}
  template: chat
"""
FIRST, SECOND = ("red", "green", "blue", "happy", "cat"), ("cat", "dog", "bird", "tree")


def write_model(folder: Path, family: str) -> None:
    """An untrained model whose generation config has all stop ids of a family."""
    tokenizer = chat_tokenizer(family)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=192,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = FAMILIES[family].stop_ids(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("family", ["gemma", "phi"])
def test_texts_of_a_run_end_in_the_end_of_turn_alike(family: str, tmp_path: Path) -> None:
    """The tokenizer's EOS, and two more stop ids, are not the end that the template writes."""
    write_model(tmp_path / "model", family)
    write_card(tmp_path, CARD)
    rows = [
        {"question": f"{word} {other}", "answer": f"the {other} {word}"}
        for word in FIRST
        for other in SECOND
    ]
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(
        {
            "name": "chat",
            "output_dir": str(tmp_path / "runs"),
            "device": "cpu",
            "data": {"card": str(tmp_path / "own.md"), "held_out": 0.25},
            "model": {"path": str(tmp_path / "model")},
            "sft": {"enabled": False},
            "generation": {"max_new_tokens": 120, "samples_per_prompt": 2},
            "reward": {
                "kind": "implicit",
                "args": {"beta": 0.1, "num_train_epochs": 1, "logging_steps": 1},
            },
            "policy_update": {"kind": "identity"},
            "loop": {"iterations": 1, "signs": {"unfit_accuracy": 0.0}},
            "evaluation": {"prompts": 2, "held_out_prompts": 2, "gold": False},
        },
        "test",
        [],
    )
    folder = train(recipe).folder
    policy = stage_folder(folder, "start") / "model"
    tokenizer = AutoTokenizer.from_pretrained(policy)
    end = tokenizer.convert_tokens_to_ids(FAMILIES[family].end)
    assert tokenizer.eos_token_id == end
    stops = json.loads((policy / "generation_config.json").read_text())["eos_token_id"]
    assert stops[0] == end and set(FAMILIES[family].stop_ids(tokenizer)) == set(stops)

    pairs = pq.read_table(stage_folder(folder, "pairs/0") / "train.parquet").to_pylist()
    for row in pairs:
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == end
        assert row["chosen_ids"].count(end) == row["rejected_ids"].count(end) == 1
    # An untrained model ends by each of the stop ids; then no log-prob of the pair's ids is known.
    assert {row["rejected_logp"] is None for row in pairs} == {True, False}
