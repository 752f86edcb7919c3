"""Loading of rows: formats, errors with file and line, turns, preferences, tasks."""

import gzip
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.own_card import DEMOS, PREFERENCES, lines, without_places, write_card

from irl_align.data.cards import Card, load_card
from irl_align.data.loading import load_demonstrations, load_preferences
from irl_align.errors import UserError

ROWS = [{"question": "2+2?", "answer": "4"}, {"question": "3+3?", "answer": "6"}]
LOADED = [{"prompt": "2+2?", "completion": "4"}, {"prompt": "3+3?", "completion": "6"}]


def loaded(card: Card, path: Path | None = None) -> list[dict[str, Any]]:
    return without_places(load_demonstrations(card, "train", path and str(path)))


# ---------------------------------------------------------------- local files


def test_load_demonstrations_reads_the_same_rows_from_every_format(tmp_path: Path) -> None:
    card = write_card(tmp_path)
    texts = {
        "jsonl": lines(ROWS).encode(),
        "json": json.dumps(ROWS, indent=1).encode(),
        "csv": b"question,answer\r\n2+2?,4\r\n3+3?,6\r\n",
    }
    contents = texts | {f"{suffix}.gz": gzip.compress(text) for suffix, text in texts.items()}
    contents["jsonl (BOM)"] = b"\xef\xbb\xbf" + texts["jsonl"]
    for suffix, content in contents.items():
        file = tmp_path / f"demos.{suffix.split()[0]}"
        file.write_bytes(content)
        assert loaded(card) == LOADED, suffix
        file.unlink()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "demos.parquet")
    assert loaded(card) == LOADED


def test_load_demonstrations_reads_a_changed_file_again(tmp_path: Path) -> None:
    card, file = write_card(tmp_path), tmp_path / "demos.jsonl"
    file.write_text(lines(ROWS))
    assert loaded(card) == LOADED
    stamp = file.stat()
    file.write_text(lines(ROWS).replace("4", "5"))  # same size
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # and same time
    assert load_demonstrations(card, "train")[0]["completion"] == "5"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("demos.jsonl", b"", r"demos\.jsonl: found no row, expected at least one"),
        ("demos.json", b"[]", r"demos\.json: found no row"),
        ("demos.csv", b"question,answer\n", r"demos\.csv: found no row"),
        ("demos.jsonl", b'{"question": "a", "answer": "b"}\n{"quest', r"line 2: .*broken JSON"),
        ("demos.json", b'[{"question": "a"', r"demos\.json: found broken JSON"),
        ("demos.jsonl", b'{"question": "a", "answer": "\xff"}\n', r"line 1: byte 30: found 0xff"),
        ("demos.csv", b"question,answer\n\xe9,b\n", r"line 2: found byte 0xe9, expected UTF-8"),
        (
            "demos.csv",
            b"question,answer\na,b,c\n",
            r"line 2: found 3 fields, expected the 2 of the",
        ),
        ("demos.csv", b'question,answer\n"a,b\n', r"line 2: broken CSV"),
        ("demos.jsonl", b"[1]\n", r"item 1: found int, expected a JSON object"),
        ("demos.jsonl", b"1\n", r"line 1: found int, expected a JSON object"),
        ("demos.jsonl", b'{"question": "a", "text": "b"}\n', r"found columns question, text, exp"),
        (
            "demos.jsonl",
            b'{"question": "a", "answer": 4}\n',
            r"'answer': found a value of type int",
        ),
        (
            "demos.jsonl",
            b'{"question": "a", "answer": null}\n',
            r"'answer': found null, expected t",
        ),
        (
            "demos.jsonl",
            b'\n{"question": "a", "answer": " "}\n',
            r"line 2: .*'answer': found empty",
        ),
        ("demos.jsonl", b'{"question": "", "answer": "b"}\n', r"line 1: .*'question': found empty"),
        ("demos.jsonl", b'{"question": ["a"], "answer": "b"}\n', r"conversation, which needs temp"),
        ("demos.jsonl", b'{"question": "a", "answer": "\\ud800"}\n', r"half of a surrogate pair"),
        ("demos.parquet", b"PAR1....", r"demos\.parquet: not a complete parquet file"),
        ("demos.jsonl.gz", b"not gzip", r"truncated or damaged gzip"),
        (
            "demos.jsonl.gz",
            gzip.compress(lines(ROWS).encode(), mtime=0)[:-9],
            r"truncated or damaged gzip",
        ),
        ("demos.txt", b"a", r"found suffix '\.txt', expected \.json, \.jsonl"),
    ],
)
def test_load_demonstrations_names_file_and_line_of_a_fault(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    card = write_card(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        load_demonstrations(card, "train")
    assert str(raised.value).startswith(str(tmp_path / name)) and "\n" not in str(raised.value)


def test_load_demonstrations_refuses_a_path_that_does_not_fit_the_card(tmp_path: Path) -> None:
    card = write_card(tmp_path)
    with pytest.raises(UserError, match=r"holds own\.md; expected demos\.\* for split train"):
        load_demonstrations(card, "train")
    with pytest.raises(UserError, match=r"data\.path: found nothing at .*expected a file or a fol"):
        load_demonstrations(card, "train", str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"found no split 'test', expected one of train"):
        load_demonstrations(card, "test")
    with pytest.raises(UserError, match=r"found a card of demonstrations, expected preferences"):
        load_preferences(card, "train")
    with pytest.raises(UserError, match=r"data\.task: card own is not a procedural task"):
        load_demonstrations(card, "train", task_args={"size": 3})


def test_load_demonstrations_takes_one_file_for_one_split(tmp_path: Path) -> None:
    """A file given for the training split must not be evaluated on in silence."""
    options = DEMOS.replace(
        "{train: {files: demos.*}}", "{train: {files: a.*}, test: {files: b.*}}"
    )
    card, file = write_card(tmp_path, options), tmp_path / "a.jsonl"
    file.write_text(lines(ROWS))
    assert loaded(card, file) == LOADED
    with pytest.raises(UserError, match=r"is one file and not that of split test \(b\.\*\)"):
        load_demonstrations(card, "test", str(file))


def test_load_demonstrations_needs_a_path_for_a_url_source(tmp_path: Path) -> None:
    card = write_card(tmp_path, DEMOS + "  source: {url: 'https://example.org/d'}\n")
    (tmp_path / "demos.jsonl").write_text(lines(ROWS))
    with pytest.raises(UserError, match=r"get the files from https://example\.org/d and give"):
        load_demonstrations(card, "train")
    assert loaded(card, tmp_path) == LOADED


def test_load_demonstrations_reports_a_missing_network_in_one_line() -> None:
    with pytest.raises(UserError, match=r"cannot load openai/gsm8k train from the Hub") as raised:
        load_demonstrations(load_card("gsm8k"), "train")
    assert "give its local copy as data.path" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_hub_columns_are_used_only_for_rows_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    options = DEMOS.replace("files: demos.*", "hub: fit, files: demos.*") + (
        "  source: {hub: a/b, config: c, revision: r, columns: {prompt: q, completion: a}}\n"
    )
    card, asked = write_card(tmp_path, options), []

    def load(*args: object, **kwargs: object) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"q": "2+2?", "a": "4"}, {"q": "3+3?", "a": "6"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert loaded(card) == LOADED
    assert asked == [(("a/b", "c"), {"data_dir": None, "revision": "r", "split": "fit"})]
    (tmp_path / "demos.jsonl").write_text(lines(ROWS))
    assert loaded(card, tmp_path) == LOADED


def test_load_demonstrations_compares_checksum_and_row_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    actual = hashlib.sha256(lines(ROWS).encode()).hexdigest()
    (tmp_path / "demos.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode()))
    good = write_card(tmp_path, DEMOS + f"  sha256: {{train: {actual}}}\n  rows: {{train: 2}}\n")
    load_demonstrations(good, "train")
    assert not caplog.records
    other = write_card(tmp_path, DEMOS + f"  sha256: {{train: {'f' * 64}}}\n  rows: {{train: 9}}\n")
    with caplog.at_level(logging.WARNING):
        assert loaded(other) == LOADED
    assert actual in caplog.text and "found 2 rows, the card says 9" in caplog.text


def test_where_keeps_matching_rows(tmp_path: Path) -> None:
    card = write_card(tmp_path, DEMOS + "  where: {ok: true}\n")
    (tmp_path / "demos.jsonl").write_text(
        lines([{**ROWS[0], "ok": True}, {**ROWS[1], "ok": False}])
    )
    assert loaded(card) == LOADED[:1]


def test_carved_splits_partition_the_prompts(tmp_path: Path) -> None:
    options = DEMOS.replace(
        "{train: {files: demos.*}}",
        "{train: {files: demos.*}, validation: {from: train, share: 0.2}, "
        "test: {from: train, share: 0.3}}",
    )
    rows = [{"question": f"q{i // 2}", "answer": f"a{i}"} for i in range(2000)]
    (tmp_path / "demos.jsonl").write_text(lines(rows))
    card = write_card(tmp_path, options)
    parts = {name: load_demonstrations(card, name) for name in card.splits}
    prompts = {name: {row["prompt"] for row in part} for name, part in parts.items()}
    assert sum(map(len, prompts.values())) == len(set.union(*prompts.values())) == 1000
    assert sum(map(len, parts.values())) == 2000
    # Binomial with 1,000 draws: four standard deviations are at most 0.063.
    assert abs(len(prompts["validation"]) / 1000 - 0.2) < 0.063
    assert abs(len(prompts["test"]) / 1000 - 0.3) < 0.063


def test_carved_splits_keep_the_spellings_of_a_prompt_together(tmp_path: Path) -> None:
    spellings = ("Prompt {}", "prompt {}", "  Prompt {}", "PROMPT  {}")
    rows = [{"question": s.format(n), "answer": "a"} for s in spellings for n in range(60)]
    (tmp_path / "demos.jsonl").write_text(lines(rows))
    carved = "{train: {files: demos.*}, validation: {from: train, share: 0.3}}"
    card = write_card(tmp_path, DEMOS.replace("{train: {files: demos.*}}", carved))
    train, validation = (
        {" ".join(str(row["prompt"]).lower().split()) for row in load_demonstrations(card, split)}
        for split in ("train", "validation")
    )
    assert train and validation and not train & validation


# ---------------------------------------------------------------- conversations and preferences

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Goodbye"},
]


@pytest.mark.parametrize(
    ("turn", "length", "answer"), [("last", 4, "Goodbye"), ("first", 2, "Hello")]
)
def test_messages_are_cut_at_the_chosen_turn(
    tmp_path: Path, turn: str, length: int, answer: str
) -> None:
    options = DEMOS.replace("prompt: question, completion: answer", "messages: talk")
    card = write_card(tmp_path, options + f"  template: chat\n  turn: {turn}\n")
    (tmp_path / "demos.jsonl").write_text(lines([{"talk": TALK}]))
    (row,) = loaded(card)
    row.pop("earlier", None)
    assert row == {"prompt": TALK[:length], "completion": answer}


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        (TALK[:4], "no last turn of the assistant"),
        (TALK[2:3], "an answer without a prompt"),
        ([], "expected a list of messages"),
        ("Hi", "expected a list of messages"),
        ([{"role": "robot", "content": "x"}], "role 'robot' in a message, expected system, dev"),
        ([{"role": "user", "content": None}], "found null, expected text"),
    ],
)
def test_load_demonstrations_refuses_faulty_messages(
    tmp_path: Path, talk: object, message: str
) -> None:
    options = DEMOS.replace("prompt: question, completion: answer", "messages: talk")
    card = write_card(tmp_path, options + "  template: chat\n")
    (tmp_path / "demos.jsonl").write_text(lines([{"talk": talk}]))
    with pytest.raises(UserError, match=f"line 1: column 'talk': found .*{message}|{message}"):
        load_demonstrations(card, "train")


def test_load_preferences_reads_pairs(tmp_path: Path) -> None:
    columns = "{prompt: p, chosen: c, rejected: r, margin: m, subset: set+axis}"
    card = write_card(tmp_path, PREFERENCES + f"  columns: {columns}\n")
    row = {"p": "x", "c": "good", "r": "bad", "m": "1.5", "set": "A", "axis": "quality"}
    (tmp_path / "pairs.jsonl").write_text(lines([row]))
    assert without_places(load_preferences(card, "test")) == [
        {"prompt": "x", "chosen": "good", "rejected": "bad", "subset": "A/quality", "margin": 1.5}
    ]
    (tmp_path / "pairs.jsonl").write_text(lines([{**row, "m": "much"}]))
    with pytest.raises(UserError, match=r"column 'm': found 'much', expected a finite number"):
        load_preferences(card, "test")


def test_load_preferences_takes_the_file_as_subset_of_labelled_texts(tmp_path: Path) -> None:
    columns = "{prompt: i, first: a, second: b, label: best}"
    card = write_card(tmp_path, PREFERENCES + f"  columns: {columns}\n")
    for name, best in (("hard", 2), ("easy", 1)):
        row = {"i": "x", "a": "A", "b": "B", "best": best}
        (tmp_path / f"pairs.{name}.json").write_text(json.dumps([row]))
    (tmp_path / "pairs.easy.json").rename(tmp_path / "easy.json")
    (tmp_path / "pairs.hard.json").rename(tmp_path / "hard.json")
    card = write_card(
        tmp_path, PREFERENCES.replace("pairs.*", "'*.json'") + f"  columns: {columns}\n"
    )
    rows = load_preferences(card, "test")
    assert [(row["subset"], row["chosen"], row["rejected"]) for row in rows] == [
        ("easy", "A", "B"),
        ("hard", "B", "A"),
    ]
    (tmp_path / "hard.json").write_text('[{"i": "x", "a": "A", "b": "B", "best": 0}]')
    with pytest.raises(
        UserError, match=r"hard\.json, item 1: column 'best': found 0, expected 1 or"
    ):
        load_preferences(card, "test")


HUMAN = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Help me\n\nAssistant:"
TRANSCRIPTS = (
    "  columns: {chosen_transcript: chosen, rejected_transcript: rejected}\n  template: chat\n"
)


def test_load_preferences_reads_transcripts(tmp_path: Path) -> None:
    card = write_card(tmp_path, PREFERENCES + TRANSCRIPTS)
    row = {"chosen": f"{HUMAN} Gladly.\n\nHow?", "rejected": f"{HUMAN} No"}
    (tmp_path / "pairs.jsonl").write_text(lines([row]))
    (pair,) = load_preferences(card, "test")
    assert pair["prompt"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Help me"},
    ]
    assert (pair["chosen"], pair["rejected"]) == ("Gladly.\n\nHow?", "No")


FAULTY = [
    ({"chosen": f"{HUMAN} a", "rejected": f"{HUMAN} a"}, "the same text"),
    ({"chosen": f"{HUMAN} a", "rejected": f"{HUMAN.replace('Hi', 'Ho')} b"}, "differs before"),
    ({"chosen": f"{HUMAN} ", "rejected": f"{HUMAN} b"}, "no alternation of non-empty"),
    ({"chosen": "\n\nHuman: x", "rejected": f"{HUMAN} b"}, "no alternation of non-empty"),
    ({"chosen": "Hello", "rejected": f"{HUMAN} b"}, "no alternation of non-empty"),
]


@pytest.mark.parametrize(("row", "message"), FAULTY, ids=lambda value: str(value)[:20])
def test_load_preferences_refuses_faulty_transcripts(
    tmp_path: Path, row: dict[str, object], message: str
) -> None:
    card = write_card(tmp_path, PREFERENCES + TRANSCRIPTS)
    (tmp_path / "pairs.jsonl").write_text(lines([row]))
    with pytest.raises(UserError, match=f"line 1.*{message}"):
        load_preferences(card, "test")


def test_faulty_drop_drops_and_counts_faulty_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    card = write_card(tmp_path, PREFERENCES + TRANSCRIPTS + "  faulty: drop\n")
    good = {"chosen": f"{HUMAN} a", "rejected": f"{HUMAN} b"}
    (tmp_path / "pairs.jsonl").write_text(lines([*(row for row, _ in FAULTY), good]))
    with caplog.at_level(logging.WARNING):
        assert len(load_preferences(card, "test")) == 1
    assert "5 faulty rows dropped" in caplog.text
    (tmp_path / "pairs.jsonl").write_text(lines([{"chosen": f"{HUMAN} a"}]))
    with pytest.raises(UserError, match="expected a column 'rejected'"):
        load_preferences(card, "test")


# ---------------------------------------------------------------- tasks


def test_load_demonstrations_reads_the_built_in_task() -> None:
    card = load_card("restaurant")
    rows = load_demonstrations(card, "train", task_args={"size": 20}, seed=1)
    assert len(rows) == 20 and all(row["prompt"] and row["completion"] for row in rows)
    assert rows == load_demonstrations(card, "train", task_args={"size": 20}, seed=1)
    assert rows != load_demonstrations(card, "train", task_args={"size": 20}, seed=2)
    test = load_demonstrations(card, "test", task_args={"size": 20}, seed=1)
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in test}


def test_load_demonstrations_checks_task_arguments() -> None:
    card = load_card("restaurant")
    with pytest.raises(UserError, match=r"data\.task: found nothing, expected .* at least size"):
        load_demonstrations(card, "train")
    with pytest.raises(UserError, match=r"data\.task: found size, nois, expected only size, noise"):
        load_demonstrations(card, "train", task_args={"size": 3, "nois": 0.1})
    with pytest.raises(UserError, match=r"data\.path: .*procedural task"):
        load_demonstrations(card, "train", path="x")


def half_a_task(split: str, seed: int) -> list[dict[str, str]]:
    """A task of one's own that only has one split."""
    return {"train": [{"prompt": "a", "completion": "b"}]}[split]


def test_load_demonstrations_reports_a_failing_task_in_one_line(tmp_path: Path) -> None:
    source = f"\n  kind: demonstrations\n  source: {{task: '{__name__}:half_a_task'}}\n"
    card = write_card(tmp_path, source)
    assert load_demonstrations(card, "train") == [{"prompt": "a", "completion": "b"}]
    with pytest.raises(UserError, match=r"task gave no rows of split test: KeyError: 'test'"):
        load_demonstrations(card, "test")
