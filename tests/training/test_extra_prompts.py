"""Prompts without demonstrations at the policy level: edited ones, and those of a file."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.tiny_runs import (
    irl_align,
    stage_folder,
    stage_records,
    the_line,
    tiny_recipe,
    write_recipe,
)

from irl_align import train
from irl_align.config.policy_update import BestOfNOptions, IdentityOptions, PPOOptions
from irl_align.config.recipe import load_recipe
from irl_align.data.cards import load_card
from irl_align.data.loading import load_demonstrations, load_prompts
from irl_align.data.rows import Demonstration, prompt_key
from irl_align.errors import UserError
from irl_align.tasks import e2e, restaurant
from irl_align.training.extra_prompts import extra_prompts, unread_prompts

pytestmark = pytest.mark.timeout(240)
PROMPTS = tuple(
    row["prompt"]
    for row in load_demonstrations(
        load_card("restaurant"), "train", task_args={"size": 2, "noise": 0.0}
    )
)


@pytest.fixture(scope="module")
def folder(tiny_folder: Path) -> Path:
    """Runs share the session's store."""
    return tiny_folder


def test_edited_prompts_are_the_cards_edits_in_a_row() -> None:
    card = load_card("restaurant")
    options = BestOfNOptions(kind="best_of_n", edited_prompts=2)
    actual = extra_prompts(options, card, [*PROMPTS, PROMPTS[0]], seed=3)
    expected = []
    for prompt in PROMPTS:
        rng = random.Random(f"3/edited-prompt/{prompt_key(prompt)}")
        expected.append(restaurant.edit(restaurant.edit(prompt, rng), rng))
    assert actual == expected
    assert extra_prompts(BestOfNOptions(kind="best_of_n"), card, PROMPTS, 3) == []
    assert extra_prompts(IdentityOptions(kind="identity"), card, PROMPTS, 3) == []


def only_the_name(prompt: str, rng: random.Random) -> str:
    """An edit that a recipe may name in place of the card's."""
    return prompt.split(", ")[0]


def test_an_edit_of_ones_own_makes_pairs_and_prompts(folder: Path) -> None:
    own = f"data.edit={__name__}:only_the_name"
    contrast = (
        "pairs={sources: [demonstration/contrast], contrast: edit}",
        "policy_update={kind: best_of_n, n: 2, prompts: 24, edited_prompts: 1}",
    )
    cards, mine = (
        train(tiny_recipe(folder, f"name={name}", *contrast, *options))
        for name, options in (("card-edit", ()), ("own-edit", (own,)))
    )
    keys = [stage_records(run.folder) for run in (cards, mine)]
    assert keys[0]["sft"]["key"] == keys[1]["sft"]["key"]
    assert keys[0]["pairs/0"]["key"] != keys[1]["pairs/0"]["key"]
    rows = pq.read_table(stage_folder(mine.folder, "pairs/0") / "train.parquet").to_pylist()
    assert rows
    for pair in rows:  # the name stays alone: a share of the prompt's start, and its line end
        rejected = pair["rejected_prompt_ids"]
        same = [a == b for a, b in zip(rejected, pair["prompt_ids"], strict=False)]
        assert len(rejected) < len(pair["prompt_ids"]) and all(same[:-2])
    # One policy samples: its prompts differ by the edited ones alone.
    sampled = [actual["samples/candidates/policy-0/t1"]["inputs"] for actual in keys]
    assert sampled[0]["policy"] == sampled[1]["policy"]
    assert sampled[0]["prompts"] != sampled[1]["prompts"]


def test_extra_prompts_refuse_an_edit_that_does_not_exist(folder: Path) -> None:
    options = ("name=no-edit", "pairs={contrast: edit, sources: [demonstration/contrast]}")
    with pytest.raises(UserError, match=r"data\.edit: cannot import support\.rows:nothing: "):
        train(tiny_recipe(folder, *options, "data.edit=support.rows:nothing"))
    edit = "data.edit=irl_align.tasks.restaurant:PHRASES"
    with pytest.raises(UserError, match=r"data\.edit: found .*PHRASES, expected a function"):
        train(tiny_recipe(folder, *options, edit))


def test_e2e_edits_stay_prompts_of_e2e() -> None:
    prompt = "name[The Punter], eatType[pub], food[Indian], near[Café Sicilia]"
    options = PPOOptions(kind="ppo", edited_prompts=3)
    (actual,) = extra_prompts(options, load_card("e2e_nlg"), [prompt], seed=0)
    assert e2e.slots_of(str(actual)) != e2e.slots_of(prompt)


def test_a_file_of_prompts(tmp_path: Path) -> None:
    card = load_card("restaurant")
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "note": 1}) + "\n" for p in PROMPTS))
    assert load_prompts(card, str(path)) == list(PROMPTS)
    path.write_text('{"prompt": "name[the zoo]"}\n{"prompt": ""}\n')
    with pytest.raises(UserError, match=r"prompts\.jsonl, line 2: column 'prompt': found empty"):
        load_prompts(card, str(path))
    path.write_text('{"text": "name[the zoo]"}\n')
    with pytest.raises(UserError, match=r"line 1: found columns text, expected a column 'prompt'"):
        load_prompts(card, str(path))


def test_conversations_end_before_the_answer(tmp_path: Path) -> None:
    card = load_card("ultrachat_200k")
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    assert load_prompts(card, str(path)) == [turns[:1]]
    path.write_text(json.dumps({"messages": turns[1:]}) + "\n")
    with pytest.raises(UserError, match=r"line 1: .* only turns of the assistant"):
        load_prompts(card, str(path))


def test_the_policy_is_the_same_whichever_split_is_evaluated(folder: Path, tmp_path: Path) -> None:
    """Of a new prompt and one of either split only the new one is trained on."""
    card, task = load_card("restaurant"), {"size": 200, "noise": 0.0}
    seed = tiny_recipe(folder).seed
    prompts = ["name[the zoo], food[thai], price[cheap]"]
    for split in ("validation", "test"):
        prompts.append(str(load_demonstrations(card, split, None, task, seed)[0]["prompt"]))
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    runs = [
        train(
            tiny_recipe(
                folder,
                f"name=on-{split}",
                f"evaluation.split={split}",
                f"policy_update.prompts_from={path}",
                "policy_update.prompts=null",
            )
        )
        for split in ("validation", "test")
    ]
    records = [stage_records(run.folder) for run in runs]
    sampled = records[0]["samples/candidates/policy-0/t1"]["metrics"]["prompts"]
    rows = pq.read_table(stage_folder(runs[0].folder, "data") / "reward.parquet")
    assert sampled == len(set(rows.column("prompt").to_pylist())) + 1
    assert records[0]["policy-1"]["key"] == records[1]["policy-1"]["key"]
    assert records[0]["evaluation/1/t1"]["key"] != records[1]["evaluation/1/t1"]["key"]


def test_extra_prompts_log_and_skip_a_missing_split(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def load(split: str) -> list[Demonstration]:
        if split == "validation":
            raise UserError("data.path: here holds nothing")
        return [{"prompt": f"a prompt of {split}", "completion": "x"}]

    card = load_card("e2e_nlg")
    assert unread_prompts(card, {"train"}, load) == ["a prompt of test"]
    assert "prompts of split validation cannot be left out: data.path: here" in caplog.text


def test_best_of_n_samples_them_and_never_what_is_evaluated(folder: Path, tmp_path: Path) -> None:
    """A file with a new prompt and one of the evaluation: the second is left out."""
    base = train(tiny_recipe(folder, "loop.iterations=0"))
    parts = stage_folder(base.folder, "data")
    evaluated = pq.read_table(parts / "evaluation.parquet").to_pylist()[0]["prompt"]
    demonstrated = set(pq.read_table(parts / "reward.parquet").column("prompt").to_pylist())
    new = "name[the zoo], food[thai], price[cheap]"
    assert new not in demonstrated
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in (new, evaluated)))
    plain, more = (
        train(tiny_recipe(folder, f"name={name}", "policy_update.prompts=null", *options))
        for name, options in (("plain", ()), ("more", (f"policy_update.prompts_from={path}",)))
    )
    counts = [
        stage_records(run.folder)["samples/candidates/policy-0/t1"]["metrics"]["prompts"]
        for run in (plain, more)
    ]
    assert counts[0] == len(demonstrated) and counts[1] == counts[0] + 1
    records = [stage_records(run.folder) for run in (plain, more)]
    assert records[0]["reward/0"]["key"] == records[1]["reward/0"]["key"]
    assert records[0]["policy-1"]["key"] != records[1]["policy-1"]["key"]


def test_ppo_rolls_them_out_and_judges_the_others(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts that are no demonstration's are edits of theirs."""
    ppo = "kind: ppo, batch_size: 16, samples_kept: 16"
    run, plain = (
        train(tiny_recipe(folder, f"name={name}", f"policy_update={{{ppo}, {more}}}"))
        for name, more in (
            ("ppo", "episodes: 336, edited_prompts: 2"),
            ("ppo-plain", "episodes: 160"),
        )
    )
    parts = stage_folder(run.folder, "data")
    own = set(pq.read_table(parts / "reward.parquet").column("prompt").to_pylist())
    seed = load_recipe(run.folder / "recipe.yaml").seed
    options = PPOOptions(kind="ppo", edited_prompts=2)
    edited = set(extra_prompts(options, load_card("restaurant"), sorted(own), seed))
    assert _rolled_out(plain.folder) <= own
    assert _rolled_out(run.folder) <= own | edited
    assert _rolled_out(run.folder) & (edited - own)
    for some in (run, plain):
        ended = irl_align(capsys, "plan", some.folder / "recipe.yaml")
        assert "nothing to do" in ended.out
    records = [stage_records(some.folder)["policy-1"] for some in (run, plain)]
    assert "edited_prompts" not in records[0]["settings"]["options"]  # the checksum has them
    for record in records:
        assert all(
            0.0 <= update["gold_fully_right"] <= 1.0 for update in record["metrics"]["history"]
        )


def _rolled_out(run: Path) -> set[str]:
    """Prompts that PPO sampled for, without the card's line end."""
    lines = (stage_folder(run, "policy-1") / "samples.jsonl").read_text(encoding="utf-8")
    return {json.loads(line)["prompt"].strip() for line in lines.strip("\n").split("\n")}


BAD = {
    "select": (
        ["policy_update={kind: best_of_n, use: select, edited_prompts: 1}"],
        "edited_prompts, prompts_from are for use sft or dpo",
    ),
    "spin": (["policy_update={kind: identity, edited_prompts: 1}"], "edited_prompts"),
    "no such file": (["policy_update.prompts_from=nowhere.jsonl"], "nowhere.jsonl"),
    "negative": (["policy_update.edited_prompts=-1"], "at least 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_one_line_before_any_work(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, expected = BAD[case]
    ended = irl_align(capsys, "train", write_recipe(tmp_path), f"output_dir={tmp_path}", *options)
    assert expected in the_line(ended)
    assert not list(tmp_path.glob("store/sft-*"))


def test_prompts_that_are_all_known_are_refused(folder: Path, tmp_path: Path) -> None:
    base = train(tiny_recipe(folder, "loop.iterations=0"))
    prompt = pq.read_table(stage_folder(base.folder, "data") / "held_out.parquet").to_pylist()[0]
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": prompt["prompt"]}) + "\n")
    with pytest.raises(UserError, match="found no prompt that is new"):
        train(tiny_recipe(folder, "name=known", f"policy_update.prompts_from={path}"))


def test_a_card_without_an_edit_is_refused() -> None:
    options = PPOOptions(kind="ppo", edited_prompts=1)
    with pytest.raises(UserError, match="found 1, but card ultrachat_200k names no edit"):
        extra_prompts(options, load_card("ultrachat_200k"), ["hello"], 0)
