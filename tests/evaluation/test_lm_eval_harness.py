"""lm-eval on a task of local files with a run's policy; shots, saved results and bad input."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_templates import FAMILIES
from support.ppo_tools import small_llama
from support.rows import save
from support.shared_runs import shared_run
from support.tiny_runs import irl_align, the_line
from support.tiny_tokenizers import tiny_tokenizer

from irl_align.data.encoding import encode_prompts
from irl_align.errors import UserError
from irl_align.evaluation.inference import PromptFormat
from irl_align.evaluation.lm_eval_harness import benchmarks, run_benchmarks
from irl_align.evaluation.tables import LEADERBOARD, benchmark_table
from irl_align.models.lm_head import completion_logprobs
from irl_align.models.loading import load_model, load_tokenizer

pytestmark = pytest.mark.timeout(600)  # the harness reads all of its task files each time

TASK = """\
task: toy_choice
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{[first, second]}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 2.0}
"""
ROWS = [
    {"question": "name[the punter]", "first": "the punter", "second": "7 7 7", "answer": 0},
    {"question": "food[thai]", "first": "serves", "second": "serves thai food .", "answer": 1},
    {"question": "area[riverside]", "first": "x", "second": "the", "answer": 1},
]


def test_benchmarks_have_the_leaderboards_shots_by_default() -> None:
    asked = benchmarks("open-llm-leaderboard, arc_challenge@0,piqa,arc_challenge")
    names = ["arc_challenge@25", "hellaswag@10", "mmlu@5", "truthfulqa_mc2@0", "winogrande@5"]
    assert [b.name for b in asked] == [*names, "gsm8k@5", "arc_challenge@0", "piqa"]


@pytest.mark.parametrize("wrong", ["", "arc@", "arc@many", "a,,b", "open-llm-leaderboard@3"])
def test_benchmarks_refuse_a_bad_list(wrong: str) -> None:
    with pytest.raises(UserError, match=r"^--lm-eval: found .*, expected TASK or TASK@SHOTS"):
        benchmarks(wrong)


def test_benchmark_grid_has_the_mean_of_the_whole_leaderboard_only() -> None:
    results = [
        {"task": task, "shots": shots, "limit": None, "lm_eval": "1", "rows": 900}
        | {"metrics": {metric: {"value": 0.1 * i, "stderr": 0.01}, "other,none": {}}}
        for i, (task, (shots, metric)) in enumerate(LEADERBOARD.items())
    ]
    rows = benchmark_table(results).texts()
    assert rows[1][:4] == ["hellaswag", "acc_norm", "10", "10.0 [8.0, 12.0]"] and len(rows) == 7
    assert rows[-1][:4] == ["Open LLM Leaderboard", "mean", "-", "25.0"]
    assert len(benchmark_table(results[1:]).rows) == 5
    results[0]["shots"] = 0
    assert len(benchmark_table(results).texts()) == 6


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with one task; lm-eval reads its own task files, which takes seconds, once."""
    tasks_of_lm_eval = pytest.importorskip("lm_eval.tasks")
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (folder / "toy.yaml").write_text(TASK.replace("ROWS", str(rows)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks_of_lm_eval, "TaskManager", cache(tasks_of_lm_eval.TaskManager))
        yield folder


def test_lm_eval_of_a_runs_policy_on_a_local_task(
    tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    run = shared_run("sft")
    command = ("evaluate", run.folder, "--lm-eval-tasks", tasks, "--lm-eval")
    ended = irl_align(capsys, *command, "toy_choice@0")
    assert ended.status == 0, ended.err
    assert "toy_choice" in ended.out and f"lm-eval {lm_eval.__version__}" in ended.out
    (actual,) = json.loads((run.folder / "evaluation.json").read_text())["benchmarks"]
    assert (actual["shots"], actual["version"], actual["limit"]) == (0, 2.0, None)
    # The choice with the higher log-prob, by our own log-probs.
    model, tokenizer = load_model(run.policy), load_tokenizer(run.policy)

    def logp(row: dict[str, str], choice: str) -> float:
        text = f"{row['question']} {row[choice]}"  # the harness puts a space between them
        whole = tokenizer.encode(text)
        start = len(tokenizer.encode(row["question"]))
        (own,) = completion_logprobs(model, [whole[:start]], [whole[start:]])
        return float(own.sum())

    right = [
        (logp(row, "second") > logp(row, "first")) == bool(row["answer"])  # type: ignore[arg-type]
        for row in ROWS
    ]
    assert actual["metrics"]["acc,none"]["value"] == pytest.approx(sum(right) / len(right))
    # A finished task is not run again; another number of shots is another task.
    (saved,) = (run.folder / "lm-eval").glob("*.json")
    result = json.loads(saved.read_text())
    result["metrics"]["acc,none"]["value"] = 0.123
    saved.write_text(json.dumps(result), encoding="utf-8")
    assert "12.3" in irl_align(capsys, *command, "toy_choice@0").out
    part = irl_align(capsys, *command, "toy_choice@1", "--lm-eval-limit", "2")
    assert "lm-eval: limited to some rows: toy_choice (2 rows)" in part.out
    assert len(json.loads((run.folder / "evaluation.json").read_text())["benchmarks"]) == 2


def test_run_benchmarks_gives_the_model_one_bos(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer adds a BOS, and its chat template writes one."""
    lm_eval_models = pytest.importorskip("lm_eval.models.huggingface")
    chat = FAMILIES["llama-3"]
    tokenizer = tiny_tokenizer(
        "byte-level", chat.special, eos=chat.eos, bos=chat.bos, template=chat.template
    )
    save(small_llama(len(tokenizer)), tokenizer, tmp_path / "policy")
    rows: list[list[int]] = []
    forward = lm_eval_models.HFLM._model_call

    def recorded(model: Any, ids: torch.Tensor, *more: Any, **options: Any) -> Any:
        rows.extend(ids.tolist())
        return forward(model, ids, *more, **options)

    monkeypatch.setattr(lm_eval_models.HFLM, "_model_call", recorded)
    run_benchmarks(
        tmp_path / "policy", benchmarks("toy_choice@0"), tmp_path, "cpu", tasks_folder=tasks
    )
    assert len(rows) == 2 * len(ROWS)
    rows += encode_prompts(["red cat"], tokenizer, PromptFormat(template="chat"))
    bos = tokenizer.bos_token_id
    assert all(row[0] == bos and row.count(bos) == 1 for row in rows)


def test_lm_eval_refuses_unknown_tasks_and_missing_data(
    tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    run = shared_run("sft")
    line = the_line(irl_align(capsys, "evaluate", run.folder, "--lm-eval", "no_such_task"))
    assert line.startswith("--lm-eval: found 'no_such_task', which is no task of lm-eval ")
    (tasks / "rows.jsonl").unlink()
    options = ("--lm-eval", "toy_choice", "--lm-eval-tasks", tasks)
    line = the_line(irl_align(capsys, "evaluate", run.folder, *options))
    assert line.startswith("--lm-eval: toy_choice failed: ") and "resumes" in line


def test_lm_eval_that_is_not_installed_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("irl_align.evaluation.lm_eval_harness.find_spec", lambda name: None)
    run = shared_run("sft")
    line = the_line(irl_align(capsys, "evaluate", run.folder, "--lm-eval", "arc_challenge"))
    assert line == "--lm-eval: lm-eval is not installed; install irl-align[eval]"


def test_lm_eval_refuses_a_reward(capsys: pytest.CaptureFixture[str]) -> None:
    reward = shared_run("irl").reward
    line = the_line(irl_align(capsys, "evaluate", reward, "--lm-eval", "arc_challenge"))
    assert line.endswith("found a reward, expected a run or a policy")
