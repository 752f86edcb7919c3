"""Recipe files: YAML, missing and bad files, extends, and random content."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.recipe_files import BASE, SMALL, load, mistakes, update, write

from irl_align.config.recipe import load_recipe
from irl_align.config.schema import Recipe
from irl_align.errors import UserError


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---- YAML


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1.e-4", 1e-4),
        ("5E-7", 5e-7),
        (".5", 0.5),
        ("-2.5e+1", -25.0),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("+7", 7),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("'1'", "1"),
        ('"true"', "true"),
        ("<<", "<<"),
        ("=", "="),
        ("[1, a]", [1, "a"]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(written: str, value: Any) -> None:
    recipe = load(SMALL.replace("card: toy", f"card: toy\n  task:\n    x: {written}"))
    parsed = recipe.data.task["x"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_integer_is_a_number_where_a_number_is_expected() -> None:
    share = load(SMALL + "loop:\n  signs:\n    kl: 2\n").loop.signs.kl
    assert share == 2.0
    assert isinstance(share, float)


def test_byte_order_mark_is_skipped() -> None:
    assert load(b"\xef\xbb\xbf" + SMALL.encode()).name == "small"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "r.yaml:1: the file is empty, expected a mapping of options"),
        (b"# only a comment\n", "r.yaml:1: the file is empty, expected a mapping of options"),
        (b"- 1\n", "r.yaml:1: found a list, expected a mapping of options"),
        (b"\n\nhello", "r.yaml:3: found 'hello', expected a mapping of options"),
        (b"a: 1\nb: \xff\n", "r.yaml:2: found byte 0xff, expected UTF-8 text"),
        (b"a: 1\nb: \x07\n", "r.yaml:2: found unprintable character 0x7"),
        (b"a: 1\na: 2\n", "r.yaml:2: a: given twice, first at r.yaml:1"),
        (b"a: 1\n2: 2\n", "r.yaml:2: found key 2, expected a word"),
        (b"true: 2\n", "r.yaml:1: found key true, expected a word"),
        (b"? [x]\n: 2\n", "r.yaml:1: found key a list, expected a word"),
        (b"a: .inf\n", "r.yaml:1: found '.inf', expected a finite number"),
        (b"a: .NaN\n", "r.yaml:1: found '.NaN', expected a finite number"),
        (b"a: 1e999\n", "r.yaml:1: found '1e999', expected a finite number"),
        (
            b"a: 9223372036854775808\n",
            "r.yaml:1: found '9223372036854775808', expected an integer below 2^63",
        ),
        (
            rb'a: "\ud800"',
            r"r.yaml:1: found '\ud800', expected text without NUL and surrogates",
        ),
        (
            b"a: &x 1\nb: *x\n",
            "r.yaml:1: not a recipe's YAML: anchors and aliases are not supported; "
            "use extends to share options",
        ),
        (
            b"a:\n- *x\n",
            "r.yaml:2: not a recipe's YAML: anchors and aliases are not supported; "
            "use extends to share options",
        ),
        (
            b"a: !!python/object/apply:os.system [ls]\n",
            "r.yaml:1: not a recipe's YAML: tags are not supported: "
            "tag:yaml.org,2002:python/object/apply:os.system",
        ),
        (b"a: 1\nb: c: d\n", "r.yaml:2: not a recipe's YAML: mapping values are not allowed here"),
        (
            b"a: [1,\nb: 2\n",
            "r.yaml:3: not a recipe's YAML: expected ',' or ']', but got '<stream end>'",
        ),
        (b"a: 1\n---\nb: 2\n", "r.yaml:2: not a recipe's YAML: but found another document"),
        (b"a: " + b"[" * 40, "r.yaml:1: not a recipe's YAML: nested deeper than 32 levels"),
        (b"#" * ((1 << 20) + 1), "r.yaml: larger than 1048576 bytes, too large for a recipe"),
    ],
)
def test_bad_yaml_is_one_line(text: bytes, message: str) -> None:
    assert mistakes(text) == [message]


def test_many_brackets_fail_at_once() -> None:
    start = time.process_time()
    mistakes(b"[" * 1_000_000)
    assert time.process_time() - start < 5.0


# ---- files


def test_missing_file_names_the_nearest() -> None:
    write(SMALL, "e2e/spin.yaml")
    with pytest.raises(UserError) as caught:
        load_recipe("e2e/spn.yaml")
    assert str(caught.value) == "e2e/spn.yaml: no such file; did you mean e2e/spin.yaml?"
    with pytest.raises(UserError) as caught:
        load_recipe("nowhere/spn.yaml")
    assert str(caught.value) == "nowhere/spn.yaml: no such file"


def test_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"^folder: is a folder, expected a YAML file$"):
        load_recipe("folder")


def test_file_below_a_file_is_refused() -> None:
    write(SMALL)
    with pytest.raises(UserError, match=r"^r\.yaml/x: cannot be read: Not a directory$"):
        load_recipe("r.yaml/x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_is_refused() -> None:
    write(SMALL).chmod(0)
    with pytest.raises(UserError, match=r"^r\.yaml: cannot be read: Permission denied$"):
        load_recipe("r.yaml")


# ---- extends


def test_extends_merges_mappings_and_replaces_the_rest() -> None:
    write(BASE, "common/base.yaml")
    write("extends: ../common/base.yaml\nname: middle\ndata: {share: 0.25}\n", "e2e/middle.yaml")
    write(
        "extends: middle.yaml\n"
        "reward: {kind: explicit, args: {max_steps: 9}}\n"
        "evaluation: {temperatures: [1.0]}\n"
        "policy_update: {n: 16}\n",
        "e2e/top.yaml",
    )
    recipe = load_recipe("e2e/top.yaml")
    assert recipe.name == "middle"
    assert recipe.seed == 3
    assert (recipe.data.card, recipe.data.share) == ("toy", 0.25)
    assert (recipe.reward.loss, recipe.reward.bound) == ("linear", 2.0)
    assert recipe.reward.args == {"learning_rate": 1e-5, "max_steps": 9}
    assert (update(recipe)["n"], update(recipe)["use"]) == (16, "dpo")
    assert recipe.evaluation.temperatures == [1.0]


def test_another_kind_replaces_the_whole_group() -> None:
    write(BASE, "base.yaml")
    recipe = load("extends: base.yaml\nreward: {kind: implicit}\npolicy_update: {kind: identity}\n")
    assert recipe.reward.loss == "bradley_terry"
    assert recipe.reward.bound is None
    assert recipe.reward.args == {}
    assert recipe.policy_update.kind == "identity"


def test_a_kind_equal_to_the_default_keeps_the_group() -> None:
    write(SMALL + "policy_update: {n: 4}\nreward: {init: cold}\n", "base.yaml")
    same = "extends: base.yaml\npolicy_update: {kind: best_of_n}\nreward: {kind: explicit}\n"
    assert update(load(same))["n"] == 4
    assert load(same).reward.init == "cold"
    other = "extends: base.yaml\nloop: {iterations: 0}\nreward: {kind: implicit}\n"
    assert load(other).reward.init == "warm"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nextends: base.yml\n", "r.yaml:2: extends: base.yml: no such file{guess}"),
        ("extends: 3\n", "r.yaml:1: extends: found 3, expected the name of a file"),
        ("extends: ''\n", "r.yaml:1: extends: found '', expected the name of a file"),
        ("extends: [a]\n", "r.yaml:1: extends: found a list, expected the name of a file"),
        ("extends: r.yaml\n", "r.yaml:1: extends: r.yaml extends itself"),
        ("extends: loop.yaml\n", "loop.yaml:2: extends: r.yaml extends itself"),
        ("extends: .\n", "r.yaml:1: extends: .: is a folder, expected a YAML file"),
    ],
)
def test_a_bad_extends_is_one_line(text: str, message: str) -> None:
    write(BASE, "base.yaml")
    write("name: loop\nextends: r.yaml\n", "loop.yaml")
    assert mistakes(text) == [message.format(guess="; did you mean base.yaml?")]


def test_a_mistake_is_reported_at_the_file_that_has_it() -> None:
    write(BASE + "sft:\n  enabeld: true\n", "base.yaml")
    assert mistakes("extends: base.yaml\ndata:\n  shaer: 1\n") == [
        "r.yaml:3: data.shaer: unknown option; did you mean data.share?",
        "base.yaml:21: sft.enabeld: unknown option; did you mean sft.enabled?",
    ]


# ---- random content


WORDS = st.sampled_from(
    [*Recipe.model_fields, "extends", "kind", "args", "schedule", "beta", "n", "r.yaml", "seed"]
)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


def only_user_errors(text: bytes, *overrides: str) -> None:
    try:
        load(text, *overrides)
    except UserError as error:
        lines = str(error).split("\n")
        assert all(line and line.isprintable() for line in lines)
        assert all(line.startswith(("r.yaml", "command line: ")) for line in lines)


@given(
    st.binary(max_size=60)
    | st.text("-:[]{}&*!|>'\"%@`?,# \n\tab1\\Ux", max_size=40).map(str.encode)
)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_text_raises_only_user_errors(junk: bytes) -> None:
    only_user_errors(junk)
    only_user_errors(SMALL.encode() + junk)


@given(TREES)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_trees_raise_only_user_errors(tree: Any) -> None:
    only_user_errors(yaml.safe_dump(tree).encode())
    whole = {**yaml.safe_load(SMALL), **(tree if isinstance(tree, dict) else {})}
    only_user_errors(yaml.safe_dump(whole).encode())


@given(st.text(max_size=12) | st.tuples(WORDS, st.text(max_size=8)).map("=".join))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_overrides_raise_only_user_errors(override: str) -> None:
    only_user_errors(SMALL.encode(), override)
