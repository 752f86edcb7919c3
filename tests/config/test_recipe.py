"""Recipes: defaults, overrides, one exact line for every mistake, and writing them back."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.recipe_files import BASE, SMALL, load, mistakes, update, write

from irl_align.config.recipe import (
    list_recipes,
    load_recipe,
    make_recipe,
    options_table,
    to_dict,
    to_yaml,
)
from irl_align.config.resources import recipe_files, recipes_dir
from irl_align.config.schema import Recipe
from irl_align.errors import UserError

SHIPPED = recipe_files()


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(recipes_dir())))
def test_shipped_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.description
    write(to_yaml(recipe))
    assert load_recipe("r.yaml") == recipe


def test_smallest_recipe_has_the_schema_defaults() -> None:
    recipe = load(SMALL)
    assert (recipe.name, recipe.data.card, recipe.model.path) == ("small", "toy", "some/model")
    assert recipe.policy_update.kind == "best_of_n"
    assert update(recipe)["n"] == 8
    assert recipe.reward.kind == "explicit"


# ---- overrides


def test_overrides_reach_every_option() -> None:
    recipe = load(
        BASE,
        "seed=1",
        "seed=2",
        "data.path=../x",
        "reward.args.learning_rate=1e-6",
        "reward.schedule.weight_decay=[0, 0.5]",
        "model.path=null",
        "model.from_scratch.hidden_size=96",
        "loop.signs={kl: 9}",
        "description='a = b'",
    )
    assert recipe.seed == 2
    assert recipe.data.path == "../x"
    assert recipe.reward.args == {"learning_rate": 1e-6, "max_steps": 4}
    assert recipe.reward.schedule == {"weight_decay": [0, 0.5]}
    assert recipe.model.from_scratch is not None
    assert recipe.model.from_scratch.hidden_size == 96
    assert recipe.loop.signs.kl == 9.0
    assert recipe.description == "a = b"


def test_an_empty_mapping_clears_the_old_one() -> None:
    assert load(BASE, "reward.args={}").reward.args == {}
    assert load(BASE, "reward.args={}", "reward.args.max_steps=9").reward.args == {"max_steps": 9}
    kind = load(BASE, "reward.kind=none", "policy_update={kind: sft}", "reward={}").reward
    assert (kind.kind, kind.args) == ("none", {})
    fresh = load(BASE, "reward={}", "policy_update={}")
    assert (fresh.reward.loss, fresh.reward.args) == ("bradley_terry", {})
    assert update(fresh)["n"] == 8
    write(BASE, "below.yaml")
    assert load("extends: below.yaml\nreward: {args: {}}\n").reward.args == {}
    assert load("extends: below.yaml\nreward: {}\n").reward.loss == "bradley_terry"


def test_override_of_a_kind_applies_first() -> None:
    recipe = load(
        BASE, "reward.args.beta=0.5", "policy_update.kind=identity", "reward.kind=implicit"
    )
    assert recipe.reward.args == {"beta": 0.5}
    assert recipe.policy_update.kind == "identity"


def test_an_unused_edit_is_a_mistake() -> None:
    own = SMALL.replace("card: toy", "card: toy\n  edit: some:edit")
    message = "data.edit is for pairs.contrast edit and policy_update.edited_prompts, but neither"
    assert mistakes(own) == [f"r.yaml:4: {message} is set"]
    contrast = ("pairs.contrast=edit", "pairs.sources=[demonstration/contrast]")
    assert load(own, *contrast).data.edit == "some:edit"
    assert load(own, "policy_update.edited_prompts=1", "policy_update.use=sft").data.edit


def test_match_entropy_needs_whole_distributions() -> None:
    message = "evaluation.match_entropy compares entropies of whole distributions"
    for cut in ("top_p: 0.9", "top_k: 5"):
        [line] = mistakes(f"{SMALL}generation: {{{cut}}}\nevaluation: {{match_entropy: true}}\n")
        assert message in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "command line: seed: expected key=value, e.g. loop.iterations=3"),
        ("=1", "command line: =1: expected key=value, e.g. loop.iterations=3"),
        ("data..card=x", "command line: data..card=x: expected key=value, e.g. loop.iterations=3"),
        ("seed=", "command line: seed=: seed: found no value; write seed=null if you mean none"),
        ("seed=#", "command line: seed=#: seed: found no value; write seed=null if you mean none"),
        ("seed=x", "command line: seed=x: seed: found 'x', {seed}"),
        ("seed=-1", "command line: seed=-1: seed: found -1, {seed}"),
        ("seed.x=1", "command line: seed.x=1: seed: found a mapping, {seed}"),
        ("sed=1", "command line: sed=1: sed: unknown option; did you mean seed?"),
        ("data.crd=1", "command line: data.crd=1: data.crd: unknown option; {card}"),
        ("seed=[1", "command line: seed=[1: not a recipe's YAML: {bracket}"),
        (
            "sft.args.lr=1\n2",
            r"command line: sft.args.lr=1\n2: sft.args.lr: no field of trl.SFTConfig",
        ),
    ],
)
def test_a_bad_override_is_one_line(override: str, message: str) -> None:
    assert mistakes(SMALL, override) == [
        message.format(
            seed="expected integer at least 0 and at most 4294967295",
            card="did you mean data.card?",
            bracket="expected ',' or ']', but got '<stream end>'",
        )
    ]


# ---- the schema


@pytest.mark.parametrize(
    ("added", "message"),
    [
        # misspelt at each level
        ("lop: {}", "6: lop: unknown option; did you mean loop?"),
        (
            "loop:\n  iteration: 3",
            "7: loop.iteration: unknown option; did you mean loop.iterations?",
        ),
        (
            "loop:\n  signs:\n    klx: 3",
            "8: loop.signs.klx: unknown option; did you mean loop.signs.kl?",
        ),
        (
            "policy_update:\n  kind: best_of_n\n  kep: 3",
            "8: policy_update.kep: unknown option; did you mean policy_update.keep?",
        ),
        (
            "reward:\n  lerning_rate: 3",
            "7: reward.lerning_rate: unknown option; did you mean reward.args.learning_rate?",
        ),
        (
            "loop:\n  max_new_tokens: 3",
            "7: loop.max_new_tokens: unknown option; did you mean generation.max_new_tokens?",
        ),
        (
            "loop:\n  zzz: 3",
            "7: loop.zzz: unknown option; expected one of iterations, signs, pick",
        ),
        ('"a\\nb": 3', "6: a\\nb: unknown option; expected one of {top}"),
        # mistyped
        ("seed: 1.5", "6: seed: found 1.5, {seed}"),
        ("seed: true", "6: seed: found true, {seed}"),
        ("seed:", "6: seed: found null, {seed}"),
        ("description: 3", "6: description: found 3, expected string"),
        ("description: no\nseed: yes", "7: seed: found 'yes', {seed}"),
        ("loop: 3", "6: loop: found 3, expected mapping"),
        ("loop:", "6: loop: found null, expected mapping"),
        ("policy_update: sft", "6: policy_update: found 'sft', expected mapping"),
        ("pairs: {sources: sft/init}", "6: pairs.sources: found 'sft/init', {sources}"),
        ("evaluation:\n  gold: 1", "7: evaluation.gold: found 1, expected true or false"),
        ("reward:\n  args: []", "7: reward.args: found a list, expected mapping"),
        ("reward:\n  schedule:\n    beta: 1", "8: reward.schedule.beta: found 1, {anything}"),
        (
            "evaluation:\n  temperatures:\n  - 1.0\n  - hot",
            "9: evaluation.temperatures.1: found 'hot', expected number at least 0",
        ),
        (
            "pairs:\n  demonstrations_per_prompt: x",
            "7: pairs.demonstrations_per_prompt: found 'x', expected integer above 0 or null",
        ),
        # out of range
        (
            "loop:\n  signs: {missing_eos: 1.5}",
            "7: loop.signs.missing_eos: found 1.5, expected number at least 0 and at most 1",
        ),
        ("loop:\n  iterations: -1", "7: loop.iterations: found -1, expected integer at least 0"),
        ("policy_update:\n  n: 1", "7: policy_update.n: found 1, expected integer at least 2"),
        ("report_to: [wandbb]", "6: report_to.0: found 'wandbb', {trackers}"),
        ("device: gpu", "6: device: found 'gpu', expected one of auto, cpu, cuda"),
        (
            "loop:\n  pick: neerest",
            "7: loop.pick: found 'neerest', expected one of last, nearest; did you mean nearest?",
        ),
        ("pairs:\n  window: last-0", "7: pairs.window: found 'last-0', {window}"),
        ("pairs:\n  sources: []", "7: pairs.sources: found a list, {sources}"),
        # contradictory
        (
            "pairs:\n  sources: [demonstration/contrast]\n  contrast_crossed: true",
            "8: pairs: contrast_crossed is an option of contrast edit, not of neighbour",
        ),
        (
            "evaluation:\n  match_entropy: true\n  gold: false",
            "7: evaluation: match_entropy compares gold, but gold is false",
        ),
        (
            "pairs:\n  sources: [demonstration/contrast]\n  contrast_edits: 2",
            "8: pairs: contrast_edits is an option of contrast edit, not of neighbour",
        ),
        (
            "pairs:\n  contrast_per_demonstration: 2",
            "7: pairs: contrast_per_demonstration is an option of the source "
            "demonstration/contrast, which sources lacks",
        ),
        (
            "pairs:\n  sources: [policy/sft]",
            "7: pairs: sources: iteration 0 needs one that is not of the policy's samples",
        ),
        ("pairs:\n  shares: [1, 2]", "7: pairs: shares has 2 numbers, sources 1: give one each"),
        (
            "pairs:\n  sources: [demonstration/policy, demonstration/policy]",
            "7: pairs: sources: demonstration/policy is given twice",
        ),
        (
            "loop:\n  signs: {entropy_low: 2}",
            "7: loop.signs: entropy_low is 2, above entropy_high 1.25",
        ),
        (
            "sft:\n  enabled: false\n  full: true",
            "8: sft: full is an option of SFT, but enabled is false",
        ),
        ("iterations: 3", "6: iterations: unknown option; did you mean loop.iterations?"),
        (
            "clip_reward: 3",
            "6: clip_reward: unknown option; did you mean policy_update.clip_reward?",
        ),
        (
            "policy_update:\n  n: 4\n  keep: 5",
            "8: policy_update: keep 5 is more than n 4",
        ),
        (
            "reward:\n  kind: explicit\n  loss: linear",
            "8: reward: loss linear is unbounded: give bound, the largest |r|",
        ),
        (
            "reward:\n  kind: none\n  args:\n    max_steps: 1",
            "8: reward: args is an option of kind explicit or implicit, not of none",
        ),
        (
            "reward:\n  kind: implicit\n  numerator: initial\n  max_pairs: 8",
            "9: reward: max_pairs is an option of numerator fitted, not of initial",
        ),
        (
            "reward:\n  kind: implicit\n  echo: true",
            "8: reward: echo is an option of kind explicit, not of implicit",
        ),
        (
            "reward:\n  kind: implicit\n  numerator: start\n  reference: start",
            "9: reward: reference start is the numerator too: the reward is 0",
        ),
        (
            "reward:\n  kind: implicit\n  reference: none",
            "8: reward: reference none is for a numerator that is not fitted",
        ),
        (
            "reward:\n  kind: implicit\n  beta: 2.0",
            "8: reward: beta is args.beta where the numerator is fitted",
        ),
        (
            "reward:\n  kind: implicit\n  mean: true\n  endogenous: true",
            "8: reward: mean would divide V of the prompt by a text's length: drop endogenous",
        ),
        (
            "sft:\n  enabled: false\n  checkpoint: 0.5",
            "8: sft: checkpoint is an option of SFT, but enabled is false",
        ),
        (
            "reward:\n  args: {max_steps: 1}\n  schedule: {max_steps: [1]}",
            "7: reward: max_steps is both in args and in schedule: give one",
        ),
        (
            "reward:\n  schedule:\n    max_steps: []",
            "8: reward: schedule.max_steps is empty: give one value per iteration",
        ),
        (
            "evaluation:\n  temperatures: [0.5]",
            "7: evaluation.temperatures: the first temperature is 1.0: KL and entropy are "
            "measured there",
        ),
        (
            "policy_update:\n  kind: identity",
            "7: policy_update.kind identity takes the model that the fit of an implicit reward has "
            "trained: expected reward.kind implicit with numerator fitted",
        ),
        # kinds
        (
            "policy_update:\n  kind: best_off_n\n  whatever: 3",
            "7: policy_update.kind: found 'best_off_n', expected one of {kinds}; "
            "did you mean best_of_n?",
        ),
        (
            "policy_update:\n  kind: 3",
            "7: policy_update.kind: found 3, expected one of {kinds}",
        ),
        (
            "policy_update:\n  kind: identity\n  n: 3",
            "8: policy_update.n: unknown option; did you mean policy_update(best_of_n).n or "
            "policy_update(ppo).n?",
        ),
        (
            "policy_update:\n  kind: my module:f",
            "7: policy_update.kind: found 'my module:f', expected string that matches "
            "^[\\w.]+:[\\w.]+$",
        ),
    ],
)
def test_a_mistake_against_the_schema_is_one_line(added: str, message: str) -> None:
    expected = message.format(
        seed="expected integer at least 0 and at most 4294967295",
        sources="expected non-empty list of one of demonstration/policy, "
        "demonstration/contrast, demonstration/init, sft/init, policy/sft, policy/older",
        window="expected string that matches ^(latest|all|last-[1-9][0-9]*)$",
        trackers="expected one of tensorboard, wandb, trackio; did you mean wandb?",
        anything="expected list of anything",
        kinds="best_of_n, ppo, identity, sft, iqlearn, module:callable",
        top=", ".join(Recipe.model_fields),
    )
    assert mistakes(SMALL + added + "\n") == [f"r.yaml:{expected}"]


PPO = "policy_update={kind: ppo, credit: red, advantage: reinforce}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([PPO, "reward.reference=checkpoint"], "sft.checkpoint is null: give a share"),
        ([PPO, "reward={numerator: initial}"], "are the same model in iteration 0"),
        ([PPO, "reward={numerator: older, reference: start}"], "are the same model in iteration 0"),
        (
            [PPO, "reward={numerator: initial, reference: start}", "sft.enabled=false"],
            "are the same model in iteration 0",
        ),
        ([PPO, "policy_update.credit=abc"], "credit abc needs an explicit reward"),
        ([PPO, "policy_update.eos_prefixes=true"], "eos_prefixes needs an explicit reward"),
        (
            [PPO, "policy_update={advantage: gae, critic_init: reward}"],
            "critic_init reward needs an explicit reward: use zero",
        ),
        (["policy_update={kind: identity}", "reward.mean=true"], "reward.mean has no effect with"),
        (["policy_update={kind: identity}", "reward={numerator: start}"], "numerator fitted"),
    ],
)
def test_an_implicit_reward_that_cannot_work_is_one_line(
    overrides: list[str], message: str
) -> None:
    (line,) = mistakes(SMALL, "reward.kind=implicit", *overrides)
    assert message in line


def test_an_implicit_reward_goes_with_every_policy_update() -> None:
    for policy in ("{kind: identity}", "{kind: best_of_n}", "{kind: ppo, credit: red}"):
        for fitted in ("previous", "initial", "mixture", "older", "start"):
            reward = f"reward={{kind: implicit, reference: {fitted}}}"
            assert load(SMALL, reward, f"policy_update={policy}").reward.is_learned
    for pair in ("numerator: initial, reference: checkpoint", "numerator: start, reference: none"):
        recipe = load(SMALL, PPO, f"reward={{kind: implicit, {pair}}}", "sft.checkpoint=0.5")
        assert not recipe.reward.is_learned


def test_missing_options_are_reported_at_their_group() -> None:
    assert mistakes("# comment\nseed: 1\ndata:\n  share: 0.5\n") == [
        "r.yaml:2: name: missing, expected string that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$",
        "r.yaml:3: data.card: missing, expected string",
        "r.yaml:2: model: missing, expected mapping",
    ]


def test_a_missing_option_is_reported_at_the_file_even_if_its_group_is_overridden() -> None:
    assert mistakes(
        "name: x\nmodel: {path: y}\ndata:\n  path: z\n", "data.share=0.5", "seed=1"
    ) == ["r.yaml:3: data.card: missing, expected string"]


def test_every_mistake_is_reported() -> None:
    text = SMALL + "seed: -1\npolicy_update: {n: 1}\nsft:\n  args:\n    packing: true\n"
    assert [line.split(": ")[1] for line in mistakes(text)] == [
        "policy_update.n",
        "seed",
        "sft.args.packing",
    ]


def test_many_mistakes_are_cut_after_twenty() -> None:
    lines = mistakes(SMALL + "".join(f"k{i}: 1\n" for i in range(500)))
    assert len(lines) == 21
    assert lines[19].startswith("r.yaml:25: k19: unknown option; expected one of name, ")
    assert lines[20] == "r.yaml:1: and more, after the first 20 mistakes"


def test_custom_policy_update() -> None:
    recipe = load(SMALL + "policy_update: {kind: 'my.module:Update', options: {x: 1}}\n")
    assert update(recipe) == {"kind": "my.module:Update", "options": {"x": 1}}


# ---- writing


def test_to_dict_has_every_option_as_json() -> None:
    recipe = load(BASE)
    resolved = to_dict(recipe)
    assert json.loads(json.dumps(resolved)) == resolved
    assert set(resolved) == set(Recipe.model_fields)
    assert resolved["policy_update"]["score"] == "reward"
    assert resolved["loop"]["signs"]["kl"] == 3.0


@pytest.mark.parametrize(
    "word", ["1e-4", "no", "true", "null", "0o7", "12:30", "a: b", "", "~", "é"]
)
def test_to_yaml_keeps_words_that_look_like_other_types(word: str) -> None:
    recipe = load(BASE, f"data.task.x={json.dumps(word)}", f"description={json.dumps(word)}")
    assert recipe.description == word
    text = to_yaml(recipe)
    assert load(text) == recipe
    assert yaml.safe_load(text) == to_dict(recipe)  # and so for readers of YAML 1.1


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_to_yaml_keeps_any_text(text: str) -> None:
    recipe = Recipe.model_validate(
        {"name": "x", "data": {"card": "c"}, "model": {"path": "m"}, "description": text}
    )
    assert load(to_yaml(recipe)) == recipe


def test_options_table_documents_every_option() -> None:
    table = options_table()
    keys = [key for key, *_ in table]
    assert len(set(keys)) == len(keys)
    assert [key for key, _, _, doc in table if not doc] == []
    rows = {key: (kind, default) for key, kind, default, _ in table}
    assert rows["seed"] == ("integer at least 0 and at most 4294967295", "0")
    assert rows["data.card"] == ("string", "required")
    assert rows["reward.loss"] == ("one of bradley_terry, linear", "bradley_terry")
    assert rows["model.from_scratch"] == ("mapping or null", "null")
    assert rows["model.from_scratch.num_key_value_heads"] == ("integer above 0 or null", "null")
    assert rows["policy_update.kind"][1] == "best_of_n"
    assert rows["policy_update(best_of_n).n"] == ("integer at least 2", "8")
    assert rows["policy_update(sft).args"] == ("mapping", "{}")
    # Every leaf of a resolved recipe is an option of the table and has the default given there.
    for key, value in leaves(to_dict(load(SMALL))):
        key = key.replace("policy_update.", "policy_update(best_of_n).")
        if key.endswith(").kind"):
            key = "policy_update.kind"
        default = rows[key][1]
        if key not in ("name", "data.card", "model.path"):
            assert default in (value, json.dumps(value)), key


def leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            pairs += leaves(value, f"{prefix}{key}.")
        else:
            pairs.append((prefix + key, value))
    return pairs


def test_list_recipes_gives_path_name_and_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("irl_align.config.resources.recipes_dir", lambda: tmp_path)
    write("name: one\ndescription: First.\n", "toy/a.yaml")
    write("extends: a.yaml\nname: two\n", "toy/b.yaml")
    assert list_recipes() == [
        (tmp_path / "toy/a.yaml", "one", "First."),
        (tmp_path / "toy/b.yaml", "two", "First."),
    ]


def test_make_recipe_takes_plain_values() -> None:
    values = {
        "name": "plain",
        "data": {"card": "restaurant"},
        "model": {"path": "some-model"},
        "evaluation": {"temperatures": [1.0, 0.5]},
    }
    assert make_recipe(values, "here").evaluation.temperatures == [1.0, 0.5]
    values["evaluation"] = {"temperatures": [1.0, "warm"]}
    with pytest.raises(UserError, match=r"here: evaluation\.temperatures\.1"):
        make_recipe(values, "here")


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The shell does not expand the ~ of data.path=~/e2e."""
    monkeypatch.setenv("HOME", str(tmp_path))
    rloo = recipes_dir() / "e2e/irl-rloo.yaml"
    recipe = load_recipe(
        rloo,
        ["data.path=~/e2e", "output_dir=~/runs", "policy_update.prompts_from=~/more.jsonl"],
    )
    assert recipe.data.path == str(tmp_path / "e2e")
    assert recipe.output_dir == str(tmp_path / "runs")
    assert recipe.policy_update.prompts_from == str(tmp_path / "more.jsonl")  # type: ignore[union-attr]
    assert load_recipe(rloo, ["data.path=a~/e2e"]).data.path == "a~/e2e"
