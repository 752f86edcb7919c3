"""The commands, as a user types them: what they print, where, and with which exit status."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.tiny_runs import (
    SPIN,
    Ended,
    irl_align,
    stage_folder,
    the_line,
    tiny_recipe,
    write_recipe,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from irl_align.data.encoding import encode_completions, encode_prompts
from irl_align.evaluation.inference import prompt_format
from irl_align.reward.model import RewardModel
from irl_align.training.train import Result, train
from irl_align.utils.version import __version__

pytestmark = pytest.mark.timeout(240)
COMMANDS = ("train", "recipes", "show", "score", "generate")
PROMPTS = ["name[the red lion], food[thai], area[suburbs]", "name[the blue heron], price[cheap]"]


@pytest.fixture(scope="module")
def folder(tiny_folder: Path) -> Path:
    return tiny_folder


@pytest.fixture(scope="module")
def select(folder: Path) -> Result:
    """A finished run whose policy selects the best of 3."""
    return train(tiny_recipe(folder, "name=select", "policy_update={n: 3, use: select}"))


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def spawn(*arguments: object) -> Ended:
    done = subprocess.run(
        [sys.executable, "-m", "irl_align", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert irl_align(capsys, "--version") == Ended(0, f"{__version__}\n", "")
    assert spawn("--version") == Ended(0, f"{__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    ended = irl_align(capsys, command, "--help")
    assert ended.status == 0 and f"Example: irl-align {command}" in " ".join(ended.out.split())


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    ended = irl_align(capsys, "--help")
    assert ended.status == 0 and all(command in ended.out for command in COMMANDS)


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    listed = irl_align(capsys, "recipes")
    assert listed.status == 0
    paths = [line for line in listed.out.splitlines() if not line.startswith(" ")]
    assert all(Path(path).is_file() for path in paths)
    assert {"spin.yaml", "irl-best-of-n.yaml"} <= {Path(path).name for path in paths}
    assert "    Built-in restaurant task, SPIN (2 iterations)." in map(
        str.rstrip, listed.out.splitlines()
    )

    options = irl_align(capsys, "recipes", "--options").out
    assert re.search(r"^loop\.iterations  integer at least 0 = 2$", options, re.MULTILINE)
    assert re.search(r"^data\.card  string = required$", options, re.MULTILINE)


def test_train_prints_readable_lines_and_tables(tmp_path: Path) -> None:
    """What a user sees of a whole run: stages by name, no library noise, 100 columns."""
    recipe = write_recipe(tmp_path)
    arguments = ("train", recipe, f"output_dir={tmp_path / 'runs'}", "loop.iterations=1")
    ended = spawn(*arguments)
    assert ended.status == 0, ended.err
    for noise in ("Loading weights", "Writing model shards", "Filter", "Warning", "transformers"):
        assert noise not in ended.err
    lines = ended.err.splitlines()
    stages = ["start", "data", "sft", "samples/train/policy-0/t1", "pairs/0", "reward/0"]
    named = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines if line[:1].isdigit()]
    assert [name for name in named if name in stages] == stages
    assert all(
        re.match(r"(\d\d:\d\d:\d\d .|\w[\w ()]*: +\d+%\||$)", line.strip()) for line in lines
    )

    tables = [line for line in ended.out.splitlines() if str(tmp_path) not in line]
    assert max(map(len, tables)) <= 100
    for title in ("results", "vital signs", "rewards of tiny-seed0", "costs of tiny-seed0"):
        assert title in ended.out
    rows = [line.split() for line in ended.out.splitlines()]
    # In the parts of the results and of the vital signs; SFT's before the iteration and at the end.
    for policy, times in ((["SFT"], 8), (["tiny", "1"], 4)):
        assert sum(row[: len(policy)] == policy for row in rows) == times
    assert ended.out.splitlines()[-2].startswith("policy: ")

    again = spawn(*arguments)
    assert again.status == 0 and "sft: reused" in again.err
    # Run again, there is nothing to tell on the way.
    assert ended.out.split("costs of")[0].endswith(again.out.split("costs of")[0])
    assert again.out.count("results") == 1


def test_show_compares_runs(
    select: Result, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = train(tiny_recipe(folder, "name=other", "loop.iterations=0", "seed=1"))
    shown = irl_align(capsys, "show", select.folder, sft.folder)
    assert shown.status == 0 and shown.err == ""
    for label in ("SFT, seed 0", "select 1, best of 3, seed 0", "SFT, seed 1"):
        assert label in shown.out
    assert shown.out.count("<= 0.43") == 1  # log 3 - 2/3: KL of best of 3
    assert f"{select.folder}: 1 iterations done" in shown.out


def test_show_of_numbers_that_were_not_finite(
    select: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(select.folder, run)
    path = run / "metrics.jsonl"
    path.write_text(
        re.sub(r'("(kl|loss|bleu|seconds|entropy)"): [-\d.e]+', r"\1: null", path.read_text())
    )
    shown = irl_align(capsys, "show", run)
    assert shown.status == 0 and re.search(r"^ SFT +- +- ", shown.out, re.MULTILINE)


def test_score_of_completions(
    select: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": p, "completion": "the red lion serves thai food.", "id": 7} for p in PROMPTS]
    path = write_lines(tmp_path / "rows.jsonl", *rows)
    ended = irl_align(capsys, "score", select.folder, "--input", path)
    assert ended.status == 0
    scored = [json.loads(line) for line in ended.out.splitlines()]
    assert [{k: v for k, v in row.items() if k != "score"} for row in scored] == rows
    assert select.reward is not None
    reward = RewardModel.from_pretrained(select.reward)
    expected = reward.score(PROMPTS, [row["completion"] for row in rows])
    assert [row["score"] for row in scored] == pytest.approx(expected.tolist(), abs=1e-5)
    same = irl_align(capsys, "score", select.reward, "--input", path)  # the model's own folder
    assert same.out == ended.out


def test_score_of_pairs_tells_accuracy(
    select: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ("the red lion is a thai restaurant.", "blah blah", "the the the", "blah blah")
    pairs = [{"prompt": PROMPTS[0], "chosen": a, "rejected": b} for a, b in pairwise(texts)]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
        writer.writeheader()
        # A tie counts half.
        writer.writerows([*pairs, {"prompt": PROMPTS[1], "chosen": "same", "rejected": "same"}])
    output = tmp_path / "deep/er/scored.jsonl"
    ended = irl_align(
        capsys, "score", select.folder, "--input", tmp_path / "pairs.csv", "--output", output
    )
    assert (ended.status, ended.out) == (0, "")
    scored = [json.loads(line) for line in output.read_text().splitlines()]
    wins = sum(row["chosen_score"] > row["rejected_score"] for row in scored) + 0.5
    assert scored[-1]["chosen_score"] == scored[-1]["rejected_score"]
    accuracy, note = ended.err.splitlines()[-2:]
    assert accuracy.startswith(f"accuracy {wins / 4:.1%} [")
    assert accuracy.endswith("%] n=4/2 (n=pairs/prompts)")
    assert note.startswith("note: accuracies over fewer than 30 prompts (the fewest: 2)")


def test_generate(select: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(
        tmp_path / "p.jsonl", *({"prompt": p, "id": i} for i, p in enumerate(PROMPTS))
    )

    def rows(*options: object) -> list[dict[str, object]]:
        ended = irl_align(
            capsys, "generate", *options, "--input", path, "--max-new-tokens", 48, "--n", 2
        )
        assert ended.status == 0, ended.err
        return [json.loads(line) for line in ended.out.splitlines()]

    selected = rows(select.folder)
    assert [(row["id"], row["sample"]) for row in selected] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert rows(select.folder) == selected
    assert rows(select.folder, "--seed", 1) != selected
    plain = rows(select.policy)  # the same model without its reward
    assert plain != selected
    greedy = rows(select.folder, "--temperature", 0)
    assert greedy[0]["completion"] == greedy[1]["completion"]
    assert [row["completion"] for row in greedy] == [
        row["completion"] for row in rows(select.policy, "--temperature", 0)
    ]


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    ended = spawn("show", tmp_path, "--debug")
    assert ended.status == 2
    assert "Traceback" in ended.err and ended.err.splitlines()[-1].startswith(
        "irl_align.errors.UserError"
    )


def test_an_unexpected_fault_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(folder: Path) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("irl_align.training.run_folder.Run.load", fault)
    ended = irl_align(capsys, "show", tmp_path)
    assert ended.status == 1
    message = "unexpected fault: RuntimeError: two lines (run with --debug for the traceback)"
    assert ended.err == f"irl-align: {message}\n"


def test_a_run_without_a_reward_scores_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = train(tiny_recipe(folder, "name=sft", "loop.iterations=0"))
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"})
    line = the_line(irl_align(capsys, "score", sft.folder, "--input", path))
    assert "this run has no explicit reward" in line


def test_score_by_the_implicit_reward_of_spin(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """beta log(pi/pi_SFT) of the text, its EOS included, by hand."""
    spin = train(tiny_recipe(folder, "name=spin", *SPIN, "reward.args.beta=0.3"))
    rows = [{"prompt": p, "chosen": "it serves thai food.", "rejected": "no."} for p in PROMPTS]
    path = write_lines(tmp_path / "rows.jsonl", *rows)
    ended = irl_align(capsys, "score", spin.folder, "--input", path)
    assert ended.status == 0, ended.err
    tokenizer = AutoTokenizer.from_pretrained(spin.policy)
    sft = stage_folder(spin.folder, "sft") / "model"
    for row in map(json.loads, ended.out.splitlines()):
        for side in ("chosen", "rejected"):
            ratio = 0.0
            for sign, where in ((1, spin.policy), (-1, sft)):
                model = AutoModelForCausalLM.from_pretrained(where)
                card = prompt_format(where)
                (prompt,) = encode_prompts([row["prompt"]], tokenizer, card)
                (answer,) = encode_completions(
                    [row["prompt"]], [row[side]], [prompt], tokenizer, card
                )
                logits = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
                at = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
                ratio += sign * logits[list(at), answer].sum().item()
            assert row[f"{side}_score"] == pytest.approx(0.3 * ratio, abs=2e-5)
            assert abs(row[f"{side}_score"]) > 1e-4


def test_show_refuses_a_run_whose_recipe_lost_a_group(
    select: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(select.folder, run)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("\nreward:", "\nreword:"))
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"})
    line = the_line(irl_align(capsys, "score", run, "--input", path))
    assert line.startswith(
        f"{run}/recipe.yaml: found no reward, expected the whole recipe of a run; "
    )


def test_hub_warnings_are_printed_once() -> None:
    code = (
        "import logging; from irl_align.cli.terminal import set_up; set_up(False); "
        "import huggingface_hub.file_download; "
        "logging.getLogger('huggingface_hub.file_download').warning('retrying')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("retrying") == 1


@pytest.mark.parametrize("command", ["score", "generate"])
def test_score_refuses_an_output_that_cannot_be_written_before_the_work(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    options = (command, folder / "no-model", "--input", tmp_path / "rows.jsonl", "--output")
    assert the_line(irl_align(capsys, *options, "/")) == "--output: / is a folder, expected a file"
    line = the_line(irl_align(capsys, *options, tmp_path))
    assert line == f"--output: {tmp_path} is a folder, expected a file"
    inside = tmp_path / "rows.jsonl" / "scores.jsonl"
    line = the_line(irl_align(capsys, *options, inside))
    assert line == f"--output: {inside}: nothing can be written in {tmp_path / 'rows.jsonl'}"
