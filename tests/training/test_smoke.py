"""Every shipped recipe's code path in seconds; what of a recipe a smoke run may change."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.own_card import without_places
from support.smoked import SHIPPED, built_roles, planned_roles
from support.tiny_runs import irl_align, the_line
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from irl_align.config.recipe import load_recipe
from irl_align.config.resources import recipes_dir
from irl_align.config.schema import Recipe
from irl_align.data.cards import load_card
from irl_align.data.encoding import encode_prompts
from irl_align.data.loading import load_demonstrations, load_preferences
from irl_align.errors import UserError
from irl_align.models.loading import load_tokenizer
from irl_align.training.smoke import run_smoke, smoke_folder, smoke_recipe
from irl_align.training.smoke_data import NOTICE, write_preferences

pytestmark = pytest.mark.timeout(240)
ARCHITECTURE = {
    "tldr": "gpt_neox",
    "ultrachat": "mistral",
    "hh/abc-ppo-pythia-2.8b.yaml": "gpt_neox",
    "hh/red-ppo-pythia-2.8b.yaml": "gpt_neox",
    "hh/sft-pythia-2.8b.yaml": "gpt_neox",
    "hh/afd-gemma-2b.yaml": "gemma",
    "imdb": "gpt2",
}
# Sizes, the places of data and model, and signs, which judge numbers. All else is the recipe's.
MAY_CHANGE = {
    *("output_dir", "data.card", "data.share", "data.held_out", "model.path", "model.revision"),
    *("data.max_prompt_tokens", "data.max_completion_tokens", "generation.backend"),
    *("generation.max_new_tokens", "generation.samples_per_prompt", "evaluation.prompts"),
    *("evaluation.held_out_prompts", "reward.max_pairs", "policy_update.n", "policy_update.keep"),
    *("policy_update.prompts", "policy_update.epochs", "policy_update.minibatches"),
    *("policy_update.batch_size", "policy_update.episodes", "policy_update.held_out_prompts"),
    *("policy_update.evaluate_every", "policy_update.checkpoint_every"),
}
MAY_CHANGE_IN_ARGS = {
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def shipped(name: str, *overrides: str) -> Recipe:
    return load_recipe(recipes_dir() / name, ["device=cpu", *overrides])


def small_copy(recipe: Recipe) -> Recipe:
    return smoke_recipe(recipe, Path("small"))


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Dotted key -> value of everything in a tree of options."""
    if not isinstance(value, dict) or not value:
        return {key: value}
    parts = (leaves(inner, f"{key}.{name}".lstrip(".")) for name, inner in value.items())
    return {name: leaf for part in parts for name, leaf in part.items()}


def changed(full: Recipe, small: Recipe) -> set[str]:
    before, after = leaves(full.model_dump()), leaves(small.model_dump())
    keys = {key for key in {*before, *after} if before.get(key) != after.get(key)}
    args = {key for key in keys if ".args." in key}
    assert {key.rsplit(".", 1)[1] for key in args} <= MAY_CHANGE_IN_ARGS
    whole = {key for key in keys if key.endswith(".args")}  # empty before
    return keys - args - whole


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_runs_end_to_end(name: str) -> None:
    # The later iterations of these recipes run no code that spin-paper and irl-ppo do not run.
    fewer = {"spin-code": 2, "spin-lora": 2, "red-ppo-pythia-1b": 1, "abc-ppo-pythia-1b": 1}
    iterations = fewer.get(Path(name).stem)
    full = shipped(name, *([f"loop.iterations={iterations}"] if iterations else []))
    result = run_smoke(full)
    view = result.view()
    assert view.summary["ended"] == f"{full.loop.iterations} iterations done"
    assert built_roles(result.folder) == planned_roles(full)
    assert result.folder == smoke_folder(full) / f"{full.name}-seed0"
    config = AutoConfig.from_pretrained(result.policy)
    assert config.model_type == ARCHITECTURE.get(name, ARCHITECTURE.get(name.split("/")[0]))
    small = load_recipe(result.folder / "recipe.yaml")
    keys = {key for key in changed(full, small) if not key.startswith("loop.signs.")}
    assert keys <= MAY_CHANGE
    records = {record["key"]: record for record in view.metrics}
    for k in range(full.loop.iterations):
        assert records[f"pairs/{k}"]["train"]["pairs"] > 0
        if full.policy_update.kind == "ppo":
            assert records[f"ppo/{k}"]["updates"] == 2


def test_ultrachat_is_messages_in_the_chat_template() -> None:
    small = small_copy(shipped("ultrachat/spin-paper.yaml"))
    rows = Path("small/inputs/ultrachat_200k-train.jsonl").read_text(encoding="utf-8").splitlines()
    turns = json.loads(rows[0])["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    card = load_card(small.data.card)
    demonstrations = load_demonstrations(card, "train")
    first = next(d for d in demonstrations if d["prompt"] == turns[:1])
    assert first["completion"] == turns[1]["content"]  # turn: first
    tokenizer = load_tokenizer(small.model.path or "")
    text = tokenizer.decode(encode_prompts([first["prompt"]], tokenizer, card)[0])
    asked = turns[0]["content"]
    assert text.replace("<|bos|>", "") == f"<|user|>\n{asked}<|eos|>\n<|assistant|>\n"


def test_imdb_is_text_whose_words_are_prompt_and_completion() -> None:
    small = small_copy(shipped("imdb/sft-gpt2.yaml"))
    lines = Path("small/inputs/imdb-train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["label"] for row in rows} == {1}
    card = load_card(small.data.card)
    parts = {split: load_demonstrations(card, split) for split in ("train", "validation", "test")}
    assert len(parts["train"]) + len(parts["validation"]) == 48 and len(parts["test"]) == 16
    texts = {row["text"] for row in rows}
    for row in parts["train"]:
        assert len(str(row["prompt"]).split()) == 8
        assert f"{row['prompt']}{row['completion']}" in texts


CARD = """\
---
license: mit
irl_align:
  kind: demonstrations
  source: {hub: nobody/nothing, columns: {prompt: question, completion: "answers.1.text"}}
  splits: {train: {hub: train, files: "train*"}, validation: {from: train, share: 0.001}}
  columns: {prompt: q, completion: a}
  where: {lang: en}
  template: "Q: {prompt}\\nA:"
  rows: {train: 100000}
---
"""


def test_columns_of_the_hub_with_a_path_in_them(caplog: pytest.LogCaptureFixture) -> None:
    Path("own.md").write_text(CARD, encoding="utf-8")
    small = small_copy(shipped("tldr/sft-pythia-1b.yaml", "data.card=own.md"))
    line = Path("small/inputs/own-train.jsonl").read_text(encoding="utf-8").splitlines()[0]
    row = json.loads(line)
    assert set(row) == {"lang", "question", "answers"} and row["lang"] == "en"
    assert row["answers"] == [{}, {"text": row["answers"][1]["text"]}]
    card = load_card(small.data.card)
    with caplog.at_level(logging.WARNING):
        loaded = [*load_demonstrations(card, "train"), *load_demonstrations(card, "validation")]
    assert {"prompt": row["question"], "completion": row["answers"][1]["text"]} in without_places(
        loaded
    )
    assert not caplog.records and card.template == "Q: {prompt}\nA:" and card.license == "mit"


@pytest.mark.parametrize("name", ["hh_rlhf", "tldr_comparisons", "ultrafeedback"])
def test_preferences_in_the_columns_of_their_card(name: str, tmp_path: Path) -> None:
    card = load_card(name)
    copy = load_card(write_preferences(card, "train", tmp_path))
    rows = load_preferences(copy, "train")
    assert len(rows) > 20 and all(row["chosen"] != row["rejected"] for row in rows)


def test_a_model_from_scratch_stays_one_with_its_task_and_gold() -> None:
    full = shipped("restaurant/irl-ppo.yaml")
    small = small_copy(full)
    assert small.model.from_scratch is not None and full.model.from_scratch is not None
    assert small.model.from_scratch.hidden_size == 64
    assert load_card(small.data.card).gold == load_card("restaurant").gold is not None
    own = load_demonstrations(load_card("restaurant"), "train", None, full.data.task, full.seed)
    rows = load_demonstrations(load_card(small.data.card), "train")
    assert without_places(rows) == own[:48]


def test_a_model_in_a_folder_gives_architecture_and_chat_template(
    tiny_model: Callable[[str], PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    tiny_tokenizer.chat_template += "{{ eos_token }}{% endfor %}"
    tiny_tokenizer.chat_template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    tiny_model("qwen3").save_pretrained("mine")
    tiny_tokenizer.save_pretrained("mine")
    small = small_copy(
        shipped("ultrachat/base.yaml", "model={path: mine, revision: null}", "seed=3")
    )
    assert AutoConfig.from_pretrained(small.model.path).model_type == "qwen3"
    tokenizer = AutoTokenizer.from_pretrained(small.model.path)
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert tokenizer.eos_token == "<eos>" and small.seed == 3


def test_smoke_run_starts_from_nothing_and_prints_a_notice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = str(recipes_dir() / "tldr" / "sft-pythia-1b.yaml")
    stale = Path("runs/smoke/tldr-sft-pythia-1b-seed0")
    stale.mkdir(parents=True)
    (stale / "SMOKE").touch()
    (stale / "old").touch()
    ended = irl_align(capsys, "train", recipe, "--smoke", "device=cpu")
    lines = ended.out.splitlines()
    assert ended.status == 0 and lines[0] == lines[-1] == NOTICE and "mean nothing" in NOTICE
    assert not (stale / "old").exists()
    assert lines[-2].startswith(f"policy: {stale}")


# ---- bad input


def refused(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    recipe = recipes_dir() / "tldr" / "irl-ppo-pythia-1b.yaml"
    ended = irl_align(capsys, "train", str(recipe), "--smoke", "device=cpu", *overrides)
    assert ended.status == 2
    return the_line(ended)


def test_unknown_architecture_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "model.path=someone/hyena-7b")
    assert message.startswith(
        "model.path: someone/hyena-7b: found no such folder, the Hub cannot be reached"
    )
    assert "expected one of mistral, zephyr, pythia" in message


def test_no_causal_language_model_is_one_line(
    capsys: pytest.CaptureFixture[str], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    T5Config().save_pretrained("t5")
    tiny_tokenizer.save_pretrained("t5")
    message = refused(capsys, "model.path=t5")
    assert message.startswith(
        "model.path: t5: no tiny model of architecture t5 for --smoke, expected"
    )


def test_a_folder_without_a_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert refused(capsys, "model.path=empty").startswith("model.path: empty: no config")


def test_a_folder_that_is_not_a_smoke_runs_is_left_alone() -> None:
    recipe = shipped("tldr/sft-pythia-1b.yaml")
    kept = smoke_folder(recipe) / "work.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="is not the folder of a smoke run"):
        run_smoke(recipe)
    assert kept.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("is_eos", [True, False], ids=["pad is EOS", "no pad"])
def test_smoke_recipe_takes_a_chat_tokenizer_without_a_pad_of_its_own(is_eos: bool) -> None:
    theirs = Path("theirs")
    given = small_copy(shipped("ultrachat/spin-paper.yaml")).model.path or ""
    tokenizer = load_tokenizer(given)
    tokenizer.pad_token = tokenizer.eos_token if is_eos else None
    AutoConfig.from_pretrained(given).save_pretrained(theirs)
    tokenizer.save_pretrained(theirs)
    small = smoke_recipe(shipped("ultrachat/spin-paper.yaml", f"model.path={theirs}"), Path("tiny"))
    tiny = load_tokenizer(small.model.path or "")
    assert tiny.pad_token_id is not None and tiny.pad_token_id != tiny.eos_token_id
    assert AutoConfig.from_pretrained(small.model.path).vocab_size == len(tiny)
