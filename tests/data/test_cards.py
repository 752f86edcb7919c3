"""Data cards: the shipped ones load, and mistakes are named by file and key."""

import json
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard
from support.own_card import DEMOS, write_card

from irl_align.config.resources import data_cards_dir
from irl_align.data.cards import import_object, load_card
from irl_align.errors import UserError

SHIPPED = sorted(data_cards_dir().glob("*.md"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_load_card_reads_every_shipped_card(path: Path) -> None:
    card = load_card(path.stem)
    hub = DatasetCard.load(path).data
    assert card.license == hub.license and card.license
    assert hub.language and hub.pretty_name and hub.size_categories and hub.task_categories
    for import_path in (card.gold, card.edit):
        assert import_path is None or callable(import_object(import_path, "card"))


def test_shipped_cards_include_those_of_the_recipes() -> None:
    names = {path.stem for path in SHIPPED}
    assert {"e2e_nlg", "restaurant", "sfx", "gsm8k", "hh_rlhf", "llmbar"} <= names


def test_load_card_names_the_nearest_card() -> None:
    with pytest.raises(UserError, match=r"found 'e2e_nlgg'.*did you mean e2e_nlg\?"):
        load_card("e2e_nlgg")
    with pytest.raises(UserError, match=r"nowhere\.md, expected an existing data card"):
        load_card("nowhere.md")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("\n  colour: red" + DEMOS, r"own\.md: irl_align\.colour: no such key"),
        ("\n  name: x" + DEMOS, r"irl_align\.name: no such key"),
        (" 3\n", r"irl_align: found 3, expected the loader's options"),
        ("\n  splits: {train: {files: a}}\n", r"irl_align\.kind: missing"),
        (DEMOS.replace("demonstrations", "demos"), r"irl_align\.kind: .*found 'demos'"),
        (DEMOS.replace("question", "3"), r"irl_align\.columns\.prompt: .*string, found 3"),
        (DEMOS.replace("prompt:", "propmt:"), r"columns: found completion, propmt, expected for"),
        (DEMOS + "  template: no field\n", r"irl_align\.template: give text with \{prompt\} exac"),
        (DEMOS + '  template: "{prompt} {answer}"\n', r"exactly once"),
        (DEMOS + '  template: "{prompt} {"\n', r"write a literal brace twice"),
        (DEMOS + "  sha256: {train: abc}\n", r"irl_align\.sha256\.train: .*found 'abc'"),
        (DEMOS + "  rows: {trian: 3}\n", r"rows: trian is not a split of this card"),
        (DEMOS + "  gold: module.attribute\n", r"irl_align\.gold: .*found 'module\.attribute'"),
        (DEMOS + "  turn: first\n", r"turn: goes with conversations, which need"),
        (DEMOS + "  source: {url: 'x', hub: 'a/b'}\n", r"exactly one of hub, task and url"),
        (DEMOS + "  source: {hub: a/b}\n", r"splits\.train: the source is on the Hub, so give hub"),
        (DEMOS + '  source: {task: "a:b"}\n', r"a task gives demonstrations: leave splits"),
        (
            DEMOS.replace("files: demos.*", "hub: train"),
            r"train\.hub: the source is not on the Hub",
        ),
        (
            DEMOS.replace("files: demos.*", "from: train, share: 0.5"),
            r"train has no files of its own",
        ),
        (DEMOS.replace("files: demos.*", "share: 0.5"), r"from and share go together"),
        (DEMOS.replace("prompt: question, completion: answer", "messages: m"), r"template chat"),
        ("\n  kind: demonstrations\n", r"splits: give at least one"),
    ],
)
def test_load_card_names_file_and_key_of_a_mistake(
    tmp_path: Path, options: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        write_card(tmp_path, options)
    assert str(tmp_path / "own.md") in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# No front matter\n", r"line 1: expected YAML front matter"),
        ("---\nirl_align: {\n---\n", r"front matter: .*line 2, column 13"),
        ("---\n- a list\n---\n", r"found a list, expected keys and values"),
        ("---\nlicense: mit\n---\n", r"irl_align: found null"),
    ],
)
def test_load_card_refuses_broken_front_matter(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.md").write_text(text)
    with pytest.raises(UserError, match=message):
        load_card(tmp_path / "own.md")


def test_import_object_returns_or_names_the_object() -> None:
    assert import_object("json:dumps", "gold") is json.dumps
    assert import_object("pathlib:Path.cwd", "gold") == Path.cwd
    for path in ("nowhere.at.all:x", "json:nothing", "json", ":x"):
        with pytest.raises(UserError, match=r"^gold: .*"):
            import_object(path, "gold")
