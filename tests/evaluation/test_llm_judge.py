"""A chat model as the judge: both orders, ties, retries, errors, bad replies and resuming."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_server import chat_server
from support.synthetic_runs import synthetic_run
from support.tiny_runs import irl_align, the_line
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from irl_align.errors import UserError
from irl_align.evaluation.chat_client import Endpoint, NoReply
from irl_align.evaluation.llm_judge import Pair, Verdicts, chat_win_rates, question_text

ASKED = re.compile(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\n\[Which", re.DOTALL)


def answers(body: dict[str, Any]) -> tuple[str, str]:
    """Texts A and B of a question."""
    actual = ASKED.search(body["messages"][1]["content"])
    assert actual is not None
    return actual[1], actual[2]


def longer_wins(body: dict[str, Any]) -> str:
    a, b = map(len, answers(body))
    return f"[[A]] at first sight. [[{'C' if a == b else 'A' if a > b else 'B'}]]"


def run_of(tmp_path: Path, own: list[str], start: list[str], demos: list[str]) -> Path:
    """A run whose greedy samples are given, with one prompt each."""

    def rows(texts: list[str]) -> list[dict[str, Any]]:
        return [
            {"prompt": f"p{i}", "completion": text, "demonstrations": [demo]}
            for i, (text, demo) in enumerate(zip(texts, demos, strict=True))
        ]

    samples = {"policy-1-t0": rows(own), "policy-0-t0": rows(start)}
    return synthetic_run(tmp_path, "m", 1, [(0.3, 0.2), (0.2, 0.1)], samples=samples)


def endpoint(url: str, **options: Any) -> Endpoint:
    return Endpoint(url, "judge-1", pause=0.01, **options)


def test_chat_win_rates_count_wins_ties_and_losses(tmp_path: Path) -> None:
    run = run_of(
        tmp_path,
        own=["long text", "x", "same", "ab"],
        start=["short", "longer", "same", "cd"],  # won, lost, equal texts, tied
        demos=["s", "s", "s", "s"],
    )
    with chat_server(longer_wins) as server:
        report = chat_win_rates(run, endpoint(server.url))
        # Of the four pairs against the start one is not asked; four against the demonstrations.
        assert len(server.requests) == 2 * 3 + 2 * 4
        assert {path for path, _, _ in server.requests} == {"/v1/chat/completions"}
        body = server.requests[0][1]
        assert body["model"] == "judge-1" and body["temperature"] == 0.0
    start, demonstrations = report["rows"]
    assert (start["against"], demonstrations["against"]) == ("start", "demonstrations")
    counts = {k: start[k] for k in ("wins", "ties", "losses", "inconsistent", "equal_texts")}
    assert counts == {"wins": 1, "ties": 2, "losses": 1, "inconsistent": 0, "equal_texts": 1}
    assert start["win_rate"]["mean"] == 0.5 and start["win_rate"]["low"] < 0.5
    assert demonstrations["wins"] == 3 and demonstrations["ties"] == 1
    assert demonstrations["win_rate"]["mean"] == pytest.approx(3.5 / 4)


def test_chat_win_rates_of_a_judge_that_prefers_the_first_answer_are_ties(tmp_path: Path) -> None:
    run = run_of(tmp_path, ["a", "b"], ["c", "d"], ["e", "f"])
    with chat_server(lambda body: "[[A]]") as server:
        row = chat_win_rates(run, endpoint(server.url))["rows"][0]
    assert (row["wins"], row["ties"], row["inconsistent"]) == (0, 2, 2)
    assert row["win_rate"]["mean"] == 0.5


def test_chat_win_rates_again_asks_for_missing_verdicts_only(tmp_path: Path) -> None:
    run = run_of(tmp_path, ["long text", "xyz"], ["short", "y"], ["s", "s"])

    def silent_of_xyz(body: dict[str, Any]) -> str:
        return "I cannot say." if "xyz" in answers(body) else longer_wins(body)

    with chat_server(silent_of_xyz) as server:
        row = chat_win_rates(run, endpoint(server.url))["rows"][0]
        assert (row["pairs"], row["judged"], row["unreadable"]) == (2, 1, 1)
        assert row["win_rate"] == {
            **{"mean": 1.0, "low": None, "high": None},
            **{"n": 1, "clusters": 1},
        }
        (file,) = (run / "judgements").glob("judge-1-*.jsonl")
        whole = file.read_bytes()
        file.write_bytes(whole[:-9])  # killed while it wrote
        server.requests.clear()
        server.answer = longer_wins
        rows = chat_win_rates(run, endpoint(server.url))["rows"]
        assert [row["judged"] for row in rows] == [2, 2]
        assert len(server.requests) == 4 + 1  # both pairs of xyz, and the line that was cut off
        server.requests.clear()
        assert chat_win_rates(run, endpoint(server.url))["rows"] == rows
        assert server.requests == []


def test_chat_win_rates_on_few_prompts_reuse_their_verdicts_on_more(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(10)]
    run = run_of(tmp_path, texts, ["x"] * 10, ["y"] * 10)
    with chat_server(longer_wins) as server:
        assert chat_win_rates(run, endpoint(server.url), prompts=3)["rows"][0]["pairs"] == 3
        assert len(server.requests) == 3 * 2 * 2
        chat_win_rates(run, endpoint(server.url), prompts=5)
        assert len(server.requests) == 5 * 2 * 2


def test_reply_tries_again_after_a_busy_server() -> None:
    said: list[Any] = [429, 503, (200, "<html>"), "fine [[B]]"]
    with chat_server(lambda body: said.pop(0)) as server:
        asked = endpoint(server.url)
        assert asked.reply([]) == ""  # 200, but no chat completion: a reply without a verdict
        assert asked.reply([]) == "fine [[B]]" and said == []


def test_reply_reports_a_permanent_error_at_once_without_the_key() -> None:
    key = "sk-very-secret"
    refusals: list[Any] = [(401, f"bad key {key}"), (302, "http://elsewhere.invalid/v1"), 404]
    for refusal in refusals:
        with chat_server(lambda body, refusal=refusal: refusal) as server:
            with pytest.raises(UserError, match=r"^--judge: http://127.*status \d{3}") as caught:
                endpoint(server.url, key=key).reply([])
            assert len(server.requests) == 1 and server.requests[0][2] == f"Bearer {key}"
            assert key not in str(caught.value)
    assert key not in repr(endpoint("http://h/v1", key=key))


def test_reply_raises_no_reply_after_time_outs() -> None:
    def late(body: dict[str, Any]) -> str:
        time.sleep(0.5)
        return "[[A]]"

    with chat_server(late) as server, pytest.raises(NoReply, match=r"[Tt]ime"):
        endpoint(server.url, timeout=0.05, retries=1).reply([])


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://", "no valid address"),
        ("http://h:port/v1", "no valid address"),
        ("https://me:word@h/v1", "a user, password or query in the address of h"),
        ("https://h/v1?key=secret", "a user, password or query in the address of h"),
    ],
)
def test_endpoint_refuses_a_bad_address_without_its_secrets(url: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        Endpoint(url, "m")
    assert expected in str(caught.value)
    assert not re.search("word|secret", str(caught.value).replace("password", ""))


def test_verdicts_ask_stops_at_a_silent_server_and_saves_its_verdicts(tmp_path: Path) -> None:
    pairs = [Pair(f"k{i}", f"p{i}", "own", "other!") for i in range(40)]
    with chat_server(longer_wins) as server:
        there = endpoint(server.url, retries=0)
        Verdicts(tmp_path, there).ask(pairs[:3])
        server.answer = lambda body: 500
        with pytest.raises(UserError, match=r"does not answer: status 500.*; 6 verdicts are saved"):
            Verdicts(tmp_path, there).ask(pairs)
        assert len(server.requests) < 6 + 40  # it was not asked for all


def test_evaluate_with_a_judge_at_an_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    run = run_of(tmp_path, ["long text", "ab"], ["short", "cd"], ["s", "s"])
    monkeypatch.setenv("JUDGE_API_KEY", "sk-test")
    with chat_server(longer_wins) as server:
        to = ("--judge", server.url)
        ended = irl_align(capsys, "evaluate", run, *to, "--judge-model", "judge-1")
        assert ended.status == 0, ended.err
        assert "judged by judge-1" in ended.out and "75.0" in ended.out
        assert {key for _, _, key in server.requests} == {"Bearer sk-test"}
        server.answer = lambda body: "What a lovely <b>day</b>."
        line = the_line(irl_align(capsys, "evaluate", run, *to, "--judge-model", "other"))
        assert line.startswith("--judge: other: none of 8 replies has a verdict [[A]], [[B]] or")
        assert line.endswith("one of them: 'What a lovely <b>day</b>.'")
        assert "expected both" in the_line(irl_align(capsys, "evaluate", run, *to))
    written = (run / "evaluation.json").read_text(encoding="utf-8")
    assert "sk-test" not in written
    assert [one["judge"] for one in json.loads(written)["judged_by_chat"]] == ["judge-1"]
    assert "expected both" in the_line(irl_align(capsys, "evaluate", run, "--judge-model", "m"))


def test_evaluate_again_keeps_the_results_of_other_judges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, ["long text", "ab"], ["short", "cd"], ["s", "s"])
    with chat_server(longer_wins) as server:
        for model in ("one", "two", "one"):
            ended = irl_align(
                capsys, "evaluate", run, "--judge", server.url, "--judge-model", model
            )
            assert ended.status == 0 and ended.out.count("judged by") == 1
    actual = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert sorted(one["judge"] for one in actual["judged_by_chat"]) == ["one", "two"]


def test_evaluate_saves_results_before_a_later_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, ["long text", "ab"], ["short", "cd"], ["s", "s"])
    monkeypatch.setattr("irl_align.evaluation.lm_eval_harness.find_spec", lambda name: None)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    (run / "summary.json").write_text(json.dumps(summary | {"policy": "model"}), encoding="utf-8")
    (run.parent / "model").mkdir()
    with chat_server(longer_wins) as server:
        judge = ("--judge", server.url, "--judge-model", "m")
        line = the_line(irl_align(capsys, "evaluate", run, *judge, "--lm-eval", "piqa"))
    assert line.startswith("--lm-eval: lm-eval is not installed")
    actual = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert actual["judged_by_chat"][0]["rows"][0]["judged"] == 2


TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.mark.vllm
@pytest.mark.timeout(400)
def test_chat_win_rates_by_a_local_vllm_server(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A tiny model that has learned the verdicts on one run's pairs by heart judges that run as the
    rule that it learned them from; another run's it has never seen."""
    pytest.importorskip("vllm")
    run = run_of(tmp_path / "known", ["a cheap pub", "near"], ["a pub", "far off"], ["s", "s"])
    with chat_server(longer_wins) as rule:
        expected = chat_win_rates(run, endpoint(rule.url))["rows"]
        asked = [body for _, body, _ in rule.requests]
    assert [(row["wins"], row["losses"]) for row in expected] == [(1, 1), (2, 0)]
    folder = tmp_path / "judge"
    tiny_tokenizer.chat_template = TEMPLATE
    _learn_by_heart(asked, [longer_wins(body)[-5:] for body in asked], tiny_tokenizer, folder)
    with _vllm_serving(folder, tmp_path / "log") as url:
        there = Endpoint(f"{url}/v1", "tiny", max_tokens=8)
        assert chat_win_rates(run, there)["rows"] == expected
        nonsense = Endpoint(f"{url}/v1", "tiny", max_tokens=1)  # "[[" is no verdict
        with pytest.raises(UserError, match="none of 8 replies has a verdict"):
            chat_win_rates(run_of(tmp_path / "cut", ["a", "b"], ["c", "d"], ["e", "f"]), nonsense)
        with pytest.raises(UserError, match="status 404"):
            Endpoint(f"{url}/v1", "another", max_tokens=8).reply([{"role": "user", "content": "a"}])


def _learn_by_heart(
    asked: list[dict[str, Any]],
    replies: list[str],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
) -> None:
    """Save a tiny Llama that greedily gives each of these questions its reply."""
    rows = []
    for body, reply in zip(asked, replies, strict=True):
        text = tokenizer.apply_chat_template(body["messages"], tokenize=False)
        answer = [*tokenizer.encode(reply), tokenizer.eos_token_id]
        rows.append((tokenizer.encode(text), answer))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 2048}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(400):
        loss = model(ids, attention_mask=(ids != tokenizer.pad_token_id).long(), labels=labels).loss
        if loss.item() < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _vllm_serving(folder: Path, log_file: Path) -> Iterator[str]:
    """The address of a vLLM server of this model inside the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--dtype", "float32"]
    # By default vLLM does not start where less than 92% of the machine's memory is free.
    command += ["--kv-cache-memory-bytes", str(64 << 20)]
    url = f"http://127.0.0.1:{port}"
    with log_file.open("wb") as log:
        # Neither compiled functions nor a second process: both only make the start longer.
        quick = {"TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **quick})
    try:
        _wait_for(f"{url}/health", server, log_file)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text(errors="replace")[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server did not start")


def test_question_text_shows_a_conversation_turn_by_turn() -> None:
    turns = [("user", "Hi"), ("assistant", "Yes?"), ("user", "Where?")]
    prompt = [{"role": role, "content": text} for role, text in turns]
    assert question_text(prompt, "here", "there") == (
        "[Conversation]\n[User]\nHi\n\n[Assistant]\nYes?\n\n[User]\nWhere?\n\n"
        "[Answer A]\nhere\n\n[Answer B]\nthere\n\n[Which is better?]"
    )
    one = "[Request]\nWhere?\n\n[Answer A]\na\n\n[Answer B]\nb\n\n[Which is better?]"
    assert question_text(prompt[2:], "a", "b") == question_text("Where?", "a", "b") == one
