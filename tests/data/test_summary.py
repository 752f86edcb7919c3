"""`irl-align data`, and cards of the Hub loaded by the real client from a loopback server."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.hub_server import environment, serve
from support.hub_state import Hub
from support.tiny_runs import irl_align, the_line

from irl_align.data.cards import load_card
from irl_align.data.loading import load_demonstrations, load_preferences
from irl_align.errors import UserError

pytestmark = pytest.mark.timeout(240)
CARD = """---
license: mit
irl_align:
  kind: demonstrations
  splits: {train: {files: demos.jsonl}, test: {files: test.jsonl}}
  columns: {prompt: q, completion: a}
  template: "{prompt}\\n"
  rows: {train: 3, test: 1}
---
"""
ROWS = [{"q": "2+2?", "a": "four it is"}, {"q": "3+3?", "a": "six"}, {"q": "3+3?", "a": "six"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A card with its data."""
    write(tmp_path / "demos.jsonl", ROWS)
    write(tmp_path / "test.jsonl", [{"q": "3+3?", "a": "6"}])
    (tmp_path / "own.md").write_text(CARD)
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- the command ----------------------------------------------------------------------------------


def test_data_prints_counts_samples_and_overlaps(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = irl_align(capsys, "data", folder / "own.md", "--samples", 2, "--check")
    assert ended.status == 0, ended.err
    lines = [line.split() for line in ended.out.splitlines()]
    # Rows, as the card says, prompts, repeated; mean and most words of prompts and completions.
    assert ["train", "3", "3", "2", "1", "1", "1", "2", "3"] in lines
    assert "100.0% of the prompts of test are also in train" in ended.out
    assert "own: demonstrations, licence mit" in ended.out
    assert ended.out.count("sample of train") == 2 and ended.out.count("sample of test") == 1
    assert "completion: four it is" in ended.out


def test_data_prints_one_split_without_samples(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = irl_align(capsys, "data", folder / "own.md", "--split", "test", "--samples", 0)
    assert ended.status == 0 and "train" not in ended.out and "sample" not in ended.out
    line = the_line(irl_align(capsys, "data", folder / "own.md", "--split", "dev"))
    assert "found no split 'dev', expected one of train, test" in line


def test_data_check_names_every_difference(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder / "demos.jsonl", ROWS[:2])
    checksum = f"\n  sha256: {{test: '{'0' * 64}'}}\n---\n"
    text = CARD.replace("license: mit\n", "").replace("\n---\n", checksum)
    (folder / "own.md").write_text(text)
    shown = irl_align(capsys, "data", folder / "own.md")
    assert shown.status == 0 and "note: own train: found 2 rows, the card says 3" in shown.out
    line = the_line(irl_align(capsys, "data", folder / "own.md", "--check"))
    assert line.startswith("data.card own: 3 checks failed: own train: found 2 rows")
    assert "the card says 0000" in line and "the card gives no license" in line


@pytest.mark.parametrize("command", ["export", "push", "data"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    ended = irl_align(capsys, command, "--help")
    assert ended.status == 0 and f"Example: irl-align {command}" in " ".join(ended.out.split())


def test_data_reports_broken_data_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "demos.jsonl").write_text('{"q": "2+2?"}\n')
    line = the_line(irl_align(capsys, "data", folder / "own.md", "--check"))
    assert "demos.jsonl, line 1: found columns q, expected a column 'a'" in line
    assert "did you mean" in the_line(irl_align(capsys, "data", "e2e_nlgg"))


def test_data_generates_the_built_in_task(capsys: pytest.CaptureFixture[str]) -> None:
    ended = irl_align(capsys, "data", "restaurant", "--task", "size=40", "--check", "--samples", 1)
    assert ended.status == 0 and ended.out.count("sample of") == 3
    assert re.search(r"train +\d+ ", ended.out)
    assert "found 'size', expected key=value" in the_line(
        irl_align(capsys, "data", "restaurant", "--task", "size")
    )


# --- what columns can say -------------------------------------------------------------------------


def own_card(folder: Path, options: str) -> Any:
    path = folder / "own.md"
    path.write_text(f"---\nirl_align:\n{options}---\n")
    return load_card(path)


def test_load_preferences_takes_paths_as_columns(tmp_path: Path) -> None:
    options = (
        "  kind: preferences\n  splits: {test: {files: x.jsonl}}\n  faulty: drop\n"
        "  columns: {prompt: p, chosen: answers.0.text, rejected: answers.2.text}\n"
        "  where: {answers.0.rank: 1, a.b: 5}\n"
    )
    ranked = [{"text": "best", "rank": 1.0}, {"text": "so", "rank": 2.0}, {"text": "bad"}]
    rows = [
        {"p": "x", "answers": ranked, "a.b": 5},  # a column's own name goes first
        {"p": "y", "answers": ranked[:2], "a.b": 5},  # too few: faulty
        {"p": "z", "answers": [ranked[1], *ranked[1:]], "a.b": 5},  # its first is not the best
    ]
    write(tmp_path / "x.jsonl", rows)
    actual = load_preferences(own_card(tmp_path, options), "test")
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in actual] == [("x", "best", "bad")]
    (tmp_path / "x.jsonl").write_text('{"p": "x", "a.b": 5}\n')
    with pytest.raises(UserError, match=r"line 1: found columns p, a\.b, expected a column 'ans"):
        load_preferences(load_card(tmp_path / "own.md"), "test")


def test_load_demonstrations_splits_a_text_after_its_prompt(tmp_path: Path) -> None:
    options = (
        "  kind: demonstrations\n  splits: {train: {files: x.jsonl}}\n"
        "  columns: {text: t}\n  prompt_words: 3\n  faulty: FAULTY\n"
    )
    texts = [" A  good\nfilm  indeed, very.", "Just three words ", "One two three four"]
    write(tmp_path / "x.jsonl", [{"t": text} for text in texts])
    actual = load_demonstrations(own_card(tmp_path, options.replace("FAULTY", "drop")), "train")
    assert [(row["prompt"], row["completion"]) for row in actual] == [
        (" A  good\nfilm", "  indeed, very."),
        ("One two three", " four"),
    ]
    with pytest.raises(UserError, match="line 2: column 't': found no more than the 3 words"):
        load_demonstrations(own_card(tmp_path, options.replace("FAULTY", "error")), "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("columns: {text: t}", "prompt_words: goes with columns.text, which needs it"),
        ("columns: {prompt: p, completion: c}\n  prompt_words: 2", "prompt_words: goes with"),
        ("columns: {prompt: p, completion: c}\n  labels: [0, 1]", "labels: goes with columns.la"),
        ("columns: {prompt: p, completion: c}\n  labels: [0]", "labels: .*at least 2"),
    ],
)
def test_load_card_refuses_contradictory_columns(
    tmp_path: Path, options: str, message: str
) -> None:
    start = "  kind: demonstrations\n  splits: {train: {files: x}}\n  "
    with pytest.raises(UserError, match=message):
        own_card(tmp_path, f"{start}{options}\n")


def test_load_preferences_takes_other_labels(tmp_path: Path) -> None:
    options = (
        "  kind: preferences\n  splits: {test: {files: x.jsonl}}\n  labels: [0, 1]\n"
        "  columns: {prompt: p, first: a, second: b, label: better}\n"
    )
    row = {"p": "x", "a": "A", "b": "B"}
    write(tmp_path / "x.jsonl", [{**row, "better": 0}, {**row, "better": "1"}])
    actual = load_preferences(own_card(tmp_path, options), "test")
    assert [r["chosen"] for r in actual] == ["A", "B"]
    write(tmp_path / "x.jsonl", [{**row, "better": 2}])
    with pytest.raises(UserError, match="found 2, expected 0 or 1, which names the better text"):
        load_preferences(load_card(tmp_path / "own.md"), "test")


# --- the Hub --------------------------------------------------------------------------------------


def parquet(*rows: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), content)
    return content.getvalue()


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def add(
    hub: Hub, name: str, content: dict[str, bytes], pattern: str = "", config: str = ""
) -> None:
    """A data set of splits -> content: files of the pattern, and a README that names them.

    Without a config there is no README: the client finds the splits by their names.
    """
    pattern = pattern or "data/{split}-00000.parquet"
    files = {pattern.format(split=split): bytes_ for split, bytes_ in content.items()}
    if config:
        named = [{"split": split, "path": pattern.format(split=split)} for split in content]
        data = json.dumps([{"config_name": config, "data_files": named}])
        files["README.md"] = f"---\nconfigs: {data}\n---\n".encode()
    hub.add("dataset", name, files)


def fill_demonstrations(hub: Hub) -> None:
    """Data sets of shipped cards with rows as their public pages describe them."""
    demo = parquet({"prompt": "POST: long\n\nTL;DR:", "completion": " short"})
    add(hub, "trl-lib/tldr", dict.fromkeys(("train", "validation", "test"), demo))
    rows = [{"prompt": "", "messages": turns(f"hi {i}", "hello", "so", "no")} for i in range(200)]
    names = ("train_sft", "test_sft", "train_gen", "test_gen")
    content = dict.fromkeys(names, parquet(*rows))
    add(hub, "HuggingFaceH4/ultrachat_200k", content, config="default")
    rows = [{"instruction": f"Do {i}.", "input": "", "output": "Done."} for i in range(200)]
    with_input = {"instruction": "Sum up.", "input": "text", "output": "t"}
    add(hub, "tatsu-lab/alpaca", {"train": parquet(*rows, with_input)})
    text = "One {} two three four five six seven eight"
    reviews = [{"text": text.format(i), "label": 1} for i in range(99)]
    content = dict.fromkeys(("train", "test"), parquet(*reviews, {"text": text, "label": 0}))
    add(hub, "stanfordnlp/imdb", content, "plain_text/{split}-0.parquet", "plain_text")
    add(hub, "tuetschek/e2e_nlg", {"e2e_nlg": b"raise SystemExit('never run')"}, "{split}.py")
    converted = parquet({"meaning_representation": "name[x]", "human_reference": "x."})
    files = {f"default/{s}/0000.parquet": converted for s in ("train", "validation", "test")}
    hub.repos["dataset", "tuetschek/e2e_nlg"].commit("refs/convert/parquet", files, "parquet")


def fill_preferences(hub: Hub) -> None:
    """The same for preferences."""
    pair = parquet({"prompt": "TL;DR:", "chosen": " good", "rejected": " bad"})
    add(hub, "trl-lib/tldr-preference", {"train": pair, "validation": pair})
    judged = {"prompt": "hi", "chosen": turns("hi", "good"), "rejected": turns("hi", "bad")}
    content = dict.fromkeys(("train_prefs", "test_prefs"), parquet(judged))
    add(hub, "HuggingFaceH4/ultrafeedback_binarized", content, config="default")
    bench = {"prompt": "q", "chosen": "good", "rejected": "bad", "subset": "xstest", "id": 7}
    content = dict.fromkeys(("raw", "filtered"), parquet(bench))
    add(hub, "allenai/reward-bench", content, config="default")
    seven = [{"answer": f"answer {i}", "model": "m", "rank": float(i)} for i in range(1, 8)]
    ranked = [{"prompt": f"\n\nHuman: {i}\n\nAssistant: ", "answers": seven} for i in range(200)]
    few = {"prompt": "\n\nHuman: few\n\nAssistant: ", "answers": seven[:4]}
    content = {"train": parquet(*ranked, few)}
    add(hub, "berkeley-nest/Nectar", content, "data/rlaif.parquet", "default")
    safe = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1}
    lines = (json.dumps({**safe, "safer_response_id": 0}) + "\n").encode() * 2
    content = {"train": lines, "test": lines}
    add(hub, "PKU-Alignment/PKU-SafeRLHF", content, "data/Alpaca-7B/{split}.jsonl", "default")
    dialogue = "\n\nHuman: hi\n\nAssistant: "
    line = json.dumps({"chosen": f"{dialogue}good", "rejected": f"{dialogue}bad"}).encode()
    content = {"harmless-base/train": line, "harmless-base/test": line, "other/train": b"{}"}
    add(hub, "Anthropic/hh-rlhf", content, "{split}.jsonl")


LOAD = """
import json, sys
from irl_align.data.cards import load_card
from irl_align.data.loading import load_demonstrations, load_preferences
from irl_align.errors import UserError

loaded = {}
for name in sys.argv[1:]:
    card = load_card(name)
    load = load_demonstrations if card.kind == "demonstrations" else load_preferences
    try:
        rows = {split: load(card, split) for split in card.split_names}
        assert all(row.pop("place") for split in rows.values() for row in split)
        loaded[card.name] = rows
    except UserError as error:
        loaded[card.name] = str(error)
print(json.dumps(loaded))
"""


def test_cards_of_the_hub_load_with_the_real_client(tmp_path: Path) -> None:
    """Revisions, configurations, folders, nested columns: by `datasets` from a server."""
    names = "tldr ultrachat_200k alpaca imdb e2e_nlg tldr_comparisons ultrafeedback reward_bench"
    shipped = [*names.split(), "nectar", "pku_saferlhf", "hh_rlhf"]
    (tmp_path / "gone.md").write_text(
        "---\nirl_align:\n  kind: demonstrations\n  source: {hub: me/gone}\n"
        "  splits: {train: {hub: train}}\n  columns: {prompt: p, completion: c}\n---\n"
    )
    with serve() as hub:
        fill_demonstrations(hub)
        fill_preferences(hub)
        done = subprocess.run(
            [sys.executable, "-c", LOAD, *shipped, str(tmp_path / "gone.md")],
            env={**os.environ, **environment(hub, tmp_path, None), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=220,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    actual = json.loads(done.stdout)

    assert "cannot load me/gone train from the Hub" in actual.pop("gone")
    demo = {"prompt": "POST: long\n\nTL;DR:", "completion": " short"}
    assert actual["tldr"] == {split: [demo] for split in ("train", "validation", "test")}
    assert set(actual["tldr_comparisons"]) == {"train", "test"}
    assert actual["tldr_comparisons"]["test"][0]["chosen"] == " good"
    first = actual["ultrachat_200k"]["test"][0]
    assert first == {"prompt": turns("hi 0"), "completion": "hello"}
    sizes = {split: len(rows) for split, rows in actual["ultrachat_200k"].items()}
    assert sizes["train"] + sizes["validation"] == sizes["test"] == 200 and sizes["validation"]
    assert sum(map(len, actual["alpaca"].values())) == 200  # the row with an input is left out
    better = actual["ultrafeedback"]["test"][0]
    assert (better["chosen"], better["rejected"]) == ("good", "bad")
    assert actual["reward_bench"]["test"][0]["subset"] == "xstest"
    assert len(actual["imdb"]["test"]) == 99
    assert actual["imdb"]["test"][0] == {
        "prompt": "One 0 two three four five six seven",
        "completion": " eight",
    }
    assert sum(map(len, actual["nectar"].values())) == 200
    worst = actual["nectar"]["test"][0]
    assert (worst["chosen"], worst["rejected"]) == ("answer 1", "answer 7")
    assert actual["pku_saferlhf"]["train"][0]["chosen"] == "b"
    assert actual["hh_rlhf"]["train"][0]["prompt"] == turns("hi")
    assert actual["e2e_nlg"]["train"] == [{"prompt": "name[x]", "completion": "x."}]
