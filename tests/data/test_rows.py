"""Prompts as texts and conversations, and where the answer of a row is."""

from typing import Any

import pytest

from irl_align.data.rows import (
    exchange,
    exchanges,
    last_text,
    lowered,
    prompt_text,
    stored_prompt,
    with_last_text,
)
from irl_align.errors import UserError

ASK = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yes?"}
AGAIN = {"role": "user", "content": "Bye"}
END = {"role": "assistant", "content": "Goodbye"}


def test_prompt_text_of_one_turn_is_its_text() -> None:
    assert prompt_text("user: Hi") == "user: Hi"
    assert prompt_text([ASK]) == "Hi"
    assert prompt_text([{"role": "system", "content": "Be brief."}]) == "system: Be brief."
    assert prompt_text([ASK, ANSWER, AGAIN]) == "user: Hi\nassistant: Yes?\nuser: Bye"


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("Hi", "Yes?", ("Hi", "Yes?")),
        ([ASK], "Yes?", ([ASK], "Yes?")),
        ("Hi", [ANSWER], ("Hi", "Yes?")),
        ([ASK], [ANSWER], ([ASK], "Yes?")),
        ([ASK, ANSWER, AGAIN], [END], ([ASK, ANSWER, AGAIN], "Goodbye")),
        ([ASK], [ANSWER, AGAIN, END], ([ASK, ANSWER, AGAIN], "Goodbye")),  # turns of the prompt
        ("Hi", [ASK, ANSWER], ("Hi", "Yes?")),  # the prompt is repeated
        (None, [ASK, ANSWER, AGAIN, END], ([ASK, ANSWER, AGAIN], "Goodbye")),
        ([ASK, ANSWER, AGAIN, END], None, ([ASK, ANSWER, AGAIN], "Goodbye")),
    ],
)
def test_exchange_divides_a_row_before_its_answer(
    prompt: Any, completion: Any, expected: tuple[Any, str]
) -> None:
    assert exchange(prompt, completion) == expected


def test_exchange_keeps_what_an_answer_holds_besides_its_text() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    assert exchange("Hi", [call]) == ("Hi", [call])
    assert exchange(None, [ASK, call]) == ([ASK], [call])


@pytest.mark.parametrize(
    ("prompt", "completion", "roles"),
    [
        ("Hi", None, "user"),
        ("Hi", [], "user"),
        ([ASK], [AGAIN], "user, user"),
        (None, [ANSWER], "assistant"),
        (None, "Yes?", "none"),
        ([ASK], [{"role": "assistant", "content": None}], "user, assistant"),
    ],
)
def test_exchange_refuses_a_row_without_an_answer(prompt: Any, completion: Any, roles: str) -> None:
    with pytest.raises(UserError, match=f"^found a conversation of the roles {roles}, expected"):
        exchange(prompt, completion)


def test_exchanges_names_the_row() -> None:
    assert exchanges([[ASK, ANSWER]], None) == ([[ASK]], ["Yes?"])
    with pytest.raises(UserError, match=r"^row 1: found a conversation of the roles user, user"):
        exchanges(["Hi", "Hi"], ["Yes?", [AGAIN]])


def test_last_text_is_what_an_edit_changes() -> None:
    conversation = [ASK, ANSWER, AGAIN]
    assert (last_text("Hi"), last_text(conversation)) == ("Hi", "Bye")
    assert with_last_text("Hi", "Ho") == "Ho"
    edited = with_last_text(conversation, "Ciao")
    assert edited == [ASK, ANSWER, {"role": "user", "content": "Ciao"}]
    assert conversation[-1] == AGAIN


def test_lowered_changes_every_turn() -> None:
    assert lowered("Hi") == "hi"
    assert lowered([ASK, ANSWER]) == [{**ASK, "content": "hi"}, {**ANSWER, "content": "yes?"}]


def test_stored_prompt_is_the_prompt_of_the_data() -> None:
    assert stored_prompt({"prompt": "[1]", "messages": ""}) == "[1]"
    assert stored_prompt({"prompt": "x"}) == "x"
    text = '[{"role": "user", "content": "Hi"}]'
    assert stored_prompt({"prompt": "Hi", "messages": text}) == [ASK]
