"""Columns of datasets as lists."""

from datasets import Dataset

from irl_align.data.columns import by_prompt_key, column


def test_a_column_is_its_values_in_the_rows_order() -> None:
    rows = Dataset.from_dict({"key": ["a", "b", "c"], "ids": [[1, 2], [], [3]]})
    assert column(rows, "key") == ["a", "b", "c"]
    assert column(rows, "ids") == [[1, 2], [], [3]]
    chosen = rows.select([2, 0]).filter(lambda key: key != "a", input_columns="key")
    assert column(chosen, "ids") == [[3]] and type(column(chosen, "ids")[0]) is list
    assert column(rows.select([]), "key") == []


def test_a_column_by_prompt() -> None:
    rows = Dataset.from_dict({"prompt_key": ["x", "y", "x"], "prompt": ["ask", "tell", "ask"]})
    assert by_prompt_key(rows, "prompt") == {"x": "ask", "y": "tell"}
