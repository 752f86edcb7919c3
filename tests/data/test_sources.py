"""Files of rows: names and formats that are read, line numbers, faults that cost only their row."""

import csv
import gzip
import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.own_card import DEMOS, lines, without_places, write_card

from irl_align.data.loading import load_demonstrations, load_prompts
from irl_align.data.sources import file_rows
from irl_align.errors import UserError

ROWS = [{"question": "2+2?", "answer": "4"}, {"question": "3+3?", "answer": "6"}]
LOADED = [{"prompt": "2+2?", "completion": "4"}, {"prompt": "3+3?", "completion": "6"}]
BOM = b"\xef\xbb\xbf"
LINES, ARRAY = lines(ROWS).encode(), json.dumps(ROWS, indent=1).encode()
TABLE = b"question\tanswer\r\n2+2?\t4\r\n3+3?\t6\r\n"


@pytest.mark.parametrize("bom", [b"", BOM], ids=["", "BOM"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("demos.JSONL", LINES),
        ("demos.ndjson", LINES),
        ("demos.jsonl", ARRAY),
        ("demos.json", b"\n " + ARRAY),
        ("demos.json", LINES),
        ("demos.tsv", TABLE),
        ("demos.CSV", TABLE.replace(b"\t", b",")),
    ],
)
def test_local_rows_reads_formats_whatever_their_suffix_looks_like(
    tmp_path: Path, name: str, content: bytes, bom: bytes
) -> None:
    (tmp_path / name).write_bytes(bom + content)
    assert without_places(load_demonstrations(write_card(tmp_path), "train")) == LOADED
    (tmp_path / name).unlink()
    (tmp_path / f"{name}.GZ").write_bytes(gzip.compress(bom + content))
    assert without_places(load_demonstrations(write_card(tmp_path), "train")) == LOADED


@pytest.mark.parametrize("pattern", ["demos [1].jsonl", "demos*.jsonl", "[[]1] sub/demos.jsonl"])
def test_local_rows_reads_names_with_brackets(tmp_path: Path, pattern: str) -> None:
    folder = tmp_path / "[2024] project"
    (folder / "[1] sub").mkdir(parents=True)
    for name in ("demos [1].jsonl", "[1] sub/demos.jsonl"):
        (folder / name).write_bytes(LINES)
    card = write_card(folder, DEMOS.replace("demos.*", f"'{pattern}'"))
    assert without_places(load_demonstrations(card, "train")) == LOADED
    if "[1]." in pattern:
        path = str(folder / pattern)
        assert without_places(load_demonstrations(card, "train", path)) == LOADED


def test_file_rows_reads_a_csv_field_of_a_million_characters(tmp_path: Path) -> None:
    long = "word " * 200_000
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], ["q", long]])
    assert [raw.values for raw in file_rows(tmp_path / "a.csv")] == [
        {"question": "q", "answer": long}
    ]


def test_file_rows_numbers_csv_rows_by_the_line_where_they_start(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('q,a\n\n"one\ntwo",b\n"\n\n",c\nlast,d\n')
    assert [raw.number for raw in file_rows(tmp_path / "a.csv")] == [3, 5, 8]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"q,a,q\n1,2,3\n", r"a\.csv, line 1: found the column 'q' twice"),
        ("a.tsv", b"q\ta\ta\n1\t2\t3\n", r"a\.tsv, line 1: found the column 'a' twice"),
        ("a.jsonl", b'{"q": 1}\n{"q": 1, "a": 2, "q": 3}\n', r"line 2: found the key 'q' twice"),
        ("a.json", b'[{"q": {"a": 2, "a": 3}}]', r"a\.json: found the key 'a' twice"),
        ("a.csv", b'q,a\n"1,2\n3,4\n', r"line 2: broken CSV: unexpected end of data"),
    ],
)
def test_file_rows_refuses_what_would_hide_values(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(file_rows(tmp_path / name))


def test_file_rows_refuses_a_column_of_parquet_that_is_there_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["q", "q"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="found the column 'q' twice"):
        list(file_rows(tmp_path / "a.parquet"))


def test_file_rows_leaves_out_nulls_that_fill_structs_of_a_table(tmp_path: Path) -> None:
    rows = [{"calls": [{"a": 1}, {"b": None}], "top": None}, {"calls": [{"b": 2}], "top": "x"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = (raw.values for raw in file_rows(tmp_path / "a.parquet"))
    assert first == {"calls": [{"a": 1}, {}], "top": None} and second == rows[1]


GOOD = '{"question": "a", "answer": "b"}'
BROKEN = {
    "demos.jsonl": [
        b"{'question': 1}",
        b"7",
        b'"text"',
        b'{"question": "a", "answer": "\xff"}',
        b'{"question": "a", "question": "a", "answer": "b"}',
        b'{"question": "a"}',
        b'{"question": "a", "answer": 4}',
        b'{"question": ["a"], "answer": "b"}',
        b'{"question": "a", "answer": "\\ud800"}',
    ],
    "demos.csv": [b"a", b"a,b,c", b'"a"x,b', b"\xff,b", b"a,"],
}


@pytest.mark.parametrize("name", BROKEN)
def test_faulty_rows_of_every_kind_can_be_dropped(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = GOOD.encode() if name.endswith("jsonl") else b"a,b"
    start = [] if name.endswith("jsonl") else [b"question,answer"]
    content = b"\n".join([*start, good, *BROKEN[name], good])
    (tmp_path / name).write_bytes(content)
    card = write_card(tmp_path, DEMOS + "  faulty: drop\n")
    with caplog.at_level(logging.WARNING):
        rows = load_demonstrations(card, "train")
    assert without_places(rows) == [{"prompt": "a", "completion": "b"}] * 2
    last = len(start) + len(BROKEN[name]) + 2
    assert rows[1].get("place") == f"{tmp_path / name}, line {last}"
    assert f"{len(BROKEN[name])} faulty rows dropped; the first: {tmp_path}" in caplog.text
    for number, line in enumerate(BROKEN[name]):
        empty = [b""] * number  # lines that are no rows
        (tmp_path / name).write_bytes(b"\n".join([*start, good, *empty, line]))
        with pytest.raises(UserError, match=f"line {number + len(start) + 2}: "):
            load_demonstrations(write_card(tmp_path), "train")


def test_load_demonstrations_says_what_is_wrong_if_all_rows_are_faulty(tmp_path: Path) -> None:
    (tmp_path / "demos.jsonl").write_text('{"question": "a"}\n' * 3)
    card = write_card(tmp_path, DEMOS + "  faulty: drop\n")
    with pytest.raises(UserError, match=r"all 3 rows are faulty; the first: .*line 1: found colu"):
        load_demonstrations(card, "train")


def test_load_prompts_drops_faulty_rows_too(tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"question": "a"}\n{\n{"question": ""}\n')
    card = write_card(tmp_path, DEMOS + "  faulty: drop\n")
    assert load_prompts(card, str(tmp_path / "more.jsonl")) == ["a"]
    with pytest.raises(UserError, match="line 2: found broken JSON"):
        load_prompts(write_card(tmp_path), str(tmp_path / "more.jsonl"))
