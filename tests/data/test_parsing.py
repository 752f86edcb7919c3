"""Rows of chat data sets: every usual spelling of a conversation, and which turns are learned."""

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.own_card import DEMOS, PREFERENCES, lines, without_places, write_card

from irl_align.data.loading import load_demonstrations, load_preferences
from irl_align.data.parsing import learned_turns
from irl_align.data.rows import opening, prompt_text
from irl_align.errors import UserError

CHAT = DEMOS.replace("prompt: question, completion: answer", "messages: talk") + (
    "  template: chat\n"
)
PAIR = PREFERENCES + "  columns: {prompt: p, chosen: c, rejected: r}\n  template: chat\n"
Turn = dict[str, Any]


def user(content: Any, **more: Any) -> Turn:
    return {"role": "user", "content": content, **more}


def answer(content: Any, **more: Any) -> Turn:
    return {"role": "assistant", "content": content, **more}


CALL = {"type": "function", "id": "x", "function": {"name": "add", "arguments": {"a": 1}}}
AS_TEXT = {**CALL, "function": {"name": "add", "arguments": '{"a": 1}'}}
RESULT = {"role": "tool", "content": ""}
ADDED = answer("1", reasoning_content="add")
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def load(folder: Path, rows: list[Turn], options: str = CHAT) -> list[Turn]:
    (folder / "demos.jsonl").write_text(lines(rows))
    return without_places(load_demonstrations(write_card(folder, options), "train"))


@pytest.mark.parametrize(
    ("talk", "prompt", "completion"),
    [
        ([user("Hi"), answer("Hello")], [user("Hi")], "Hello"),
        (
            [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            [user("Hi")],
            "Hello",
        ),
        (
            [user([{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]), answer("Hello")],
            [user("Hi")],
            "Hello",
        ),
        (
            [{"role": "system", "content": ""}, user("Hi"), answer("Hello", name=None)],
            [{"role": "system", "content": ""}, user("Hi")],
            "Hello",
        ),
        (
            [user("1+0?"), answer("", tool_calls=[AS_TEXT]), RESULT, ADDED],
            [user("1+0?"), answer("", tool_calls=[CALL]), RESULT],
            [ADDED],
        ),
        (
            [user("1+0?"), answer(None, tool_calls=json.dumps([CALL]))],
            [user("1+0?")],
            [answer("", tool_calls=[CALL])],
        ),
    ],
    ids=["role and content", "ShareGPT", "parts", "empty system", "tools", "calls in JSON"],
)
def test_parse_demonstrations_reads_conversations_as_data_sets_write_them(
    tmp_path: Path, talk: list[Turn], prompt: list[Turn], completion: Any
) -> None:
    (row,) = load(tmp_path, [{"talk": talk}])
    row.pop("earlier", None)
    assert row == {"prompt": prompt, "completion": completion}


def test_parse_demonstrations_reads_the_same_conversation_from_a_table(tmp_path: Path) -> None:
    """A table fills the keys that a turn or call lacks with nulls."""
    other = {**CALL, "function": {"name": "neg", "arguments": {"b": 2}}}
    talk = [user("1+0?"), answer("", tool_calls=[CALL, other]), {"role": "tool", "content": "1"}]
    rows = [{"talk": [*talk, answer("1")], "tools": TOOLS}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "demos.parquet")
    (row,) = without_places(load_demonstrations(write_card(tmp_path, CHAT), "train"))
    assert row["prompt"][0] == user("1+0?", tools=TOOLS)
    assert row["prompt"][1:] == talk[1:] and row["earlier"] == [1]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (user([{"type": "image_url", "image_url": "x"}]), "a part of type 'image_url'"),
        (user(["x"]), "a part of type a value of type str"),
        (user({"text": "x"}), "a value of type dict, expected text"),
        (user(""), "empty text"),
        (answer(""), "empty text"),
        (answer("", tool_calls=[{"name": "f", "arguments": "x"}]), "a tool call"),
        (answer("x", tool_calls="no JSON"), "tool_calls of a value of type str"),
        (answer("x", reasoning_content=3), "a value of type int, expected text"),
        (answer("x", weight=0.5), "weight 0.5 and train null in a message, expected weight 0 or 1"),
        (answer("x", train="no"), "weight null and train 'no' in a message"),
        ({"role": "function", "content": "x"}, "role 'function' in a message"),
        ("x", "a value of type str among the messages"),
    ],
)
def test_parse_demonstrations_refuses_turns_with_row_and_reason(
    tmp_path: Path, turn: Any, message: str
) -> None:
    good = {"talk": [user("Hi"), answer("Hello")]}
    with pytest.raises(UserError, match=f"line 2: column 'talk': found {message}"):
        load(tmp_path, [good, {"talk": [user("Hi"), turn, answer("x")]}])
    assert len(load(tmp_path, [good, {"talk": [turn]}], CHAT + "  faulty: drop\n")) == 1


LONG = [answer("Welcome"), user("a"), answer("b"), user("c"), answer("d"), user("e"), answer("f")]


@pytest.mark.parametrize(
    ("turn", "demonstrations", "learned"),
    [("first", "b", "b"), ("last", "f", "bdf"), ("each", "bdf", "bdf")],
)
def test_learned_turns_are_those_of_the_assistant_up_to_the_demonstration(
    tmp_path: Path, turn: str, demonstrations: str, learned: str
) -> None:
    rows: Any = load(tmp_path, [{"talk": LONG}], CHAT + f"  turn: {turn}\n")
    assert "".join(row["completion"] for row in rows) == demonstrations
    turns = learned_turns(rows)
    assert "".join(str(row["completion"]) for row in turns) == learned
    assert [row["prompt"] for row in turns] == [LONG[:2], LONG[:4], LONG[:6]][: len(learned)]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": None}])
def test_learned_turns_leave_out_turns_that_are_not_to_be_learned(
    tmp_path: Path, mark: Turn
) -> None:
    talk = [*LONG[1:4], answer("d", **mark), LONG[5], LONG[6], user("g"), answer("h", **mark)]
    (row,) = rows = load(tmp_path, [{"talk": talk}])
    assert row["completion"] == "f" and row["prompt"][3] == answer("d")
    assert [turn["completion"] for turn in learned_turns(rows)] == ["b", "f"]
    with pytest.raises(UserError, match="no turn of the assistant that is to be learned"):
        load(tmp_path, [{"talk": [user("a"), answer("b", **mark)]}])


def test_parse_demonstrations_reads_a_completion_that_is_a_list_of_messages(tmp_path: Path) -> None:
    """As in TRL, the turns of the prompt are only read, and those of the completion learned."""
    options = DEMOS + "  template: chat\n"
    rows = [
        {"question": [*LONG[1:3], user("c")], "answer": [answer("d")]},
        {"question": "c", "answer": [answer("", tool_calls=[CALL]), RESULT, answer("d")]},
    ]
    first, second = load(tmp_path, rows, options)
    assert first == {"prompt": [*LONG[1:3], user("c")], "completion": "d"}
    assert second["completion"] == "d" and second["earlier"] == [1]
    with pytest.raises(UserError, match="'answer': found a conversation, which needs template: ch"):
        load(tmp_path, [{"question": "c", "answer": [answer("d")]}], DEMOS)


def test_parse_demonstrations_joins_the_input_of_alpaca(tmp_path: Path) -> None:
    options = DEMOS.replace("completion: answer", "input: input, completion: answer")
    rows = [{"question": "Add.", "input": "1, 2", "answer": "3"}]
    rows += [{"question": "Sing.", "input": empty, "answer": "la"} for empty in ("", None)]
    assert [row["prompt"] for row in load(tmp_path, rows, options)] == [
        "Add.\n\n1, 2",
        "Sing.",
        "Sing.",
    ]


def test_parse_preferences_reads_answers_that_are_messages(tmp_path: Path) -> None:
    """TRL's explicit prompt, and UltraFeedback's, which repeats the prompt in both answers."""
    rows = [
        {"p": "a", "c": [answer("good")], "r": [answer("bad")], "tools": json.dumps(TOOLS)},
        {"p": "a", "c": [user("a"), answer("good")], "r": [user("a"), answer("bad")]},
        {"p": [user("a")], "c": "good", "r": [answer("bad", reasoning="why")]},
    ]
    (tmp_path / "pairs.jsonl").write_text(lines(rows))
    first, second, third = load_preferences(write_card(tmp_path, PAIR), "test")
    assert first["prompt"] == [user("a", tools=TOOLS)] and second["prompt"] == "a"
    assert all((row["chosen"], row["rejected"]) == ("good", "bad") for row in (first, second))
    assert third["rejected"] == [answer("bad", reasoning="why")]
    (tmp_path / "pairs.jsonl").write_text(lines([{"p": "a", "c": LONG, "r": "bad"}]))
    with pytest.raises(
        UserError, match=r"'c': found turns of assistant, user, .* after the prompt"
    ):
        load_preferences(write_card(tmp_path, PAIR), "test")


def test_load_demonstrations_logs_what_it_does_not_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    talk = [user("a", id=1), answer("b", reasoning_content="c")]
    rows = [{"talk": talk, "tools": TOOLS, "weight": 0, "empty": []}] * 2 + [{"talk": talk[:2]}]
    with caplog.at_level(logging.INFO):
        load(tmp_path, rows)
    assert "not used: talk.id (3 rows), weight (2 rows)" in caplog.text
    assert "has to render reasoning_content (3 rows), tools (2 rows)" in caplog.text


def test_opening_is_the_prompt_up_to_the_first_answer() -> None:
    assert opening([*LONG[1:6]]) == LONG[1:2] and opening("a") == "a"
    assert opening([user("a")]) == [user("a")]


def test_prompt_text_shows_reasoning_and_calls() -> None:
    turns: Any = [user("a"), answer("b", reasoning_content="why", tool_calls=[CALL])]
    assert prompt_text(turns) == f"user: a\nassistant: why\nb\n{json.dumps([CALL])}"
