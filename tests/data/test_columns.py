"""Columns of datasets as lists."""

import json

from datasets import Dataset

from irl_align.data.columns import by_prompt_key, column, prompts_by_ids, prompts_of


def test_column_keeps_the_order_of_rows() -> None:
    rows = Dataset.from_dict({"key": ["a", "b", "c"], "ids": [[1, 2], [], [3]]})
    assert column(rows, "key") == ["a", "b", "c"]
    assert column(rows, "ids") == [[1, 2], [], [3]]
    chosen = rows.select([2, 0]).filter(lambda key: key != "a", input_columns="key")
    assert column(chosen, "ids") == [[3]] and type(column(chosen, "ids")[0]) is list
    assert column(rows.select([]), "key") == []


def test_by_prompt_key_maps_keys_to_values() -> None:
    rows = Dataset.from_dict({"prompt_key": ["x", "y", "x"], "prompt": ["ask", "tell", "ask"]})
    assert by_prompt_key(rows, "prompt") == {"x": "ask", "y": "tell"}


def test_prompts_of_returns_texts_and_conversations_as_in_the_data() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "[1]"}]
    columns = {"prompt": ["[1]", "text"], "messages": ["", json.dumps(turns)]}
    rows = Dataset.from_dict({**columns, "prompt_ids": [[1], [2, 3]]})
    assert prompts_of(rows) == ["[1]", turns]
    assert prompts_by_ids(rows) == {(1,): "[1]", (2, 3): turns}
