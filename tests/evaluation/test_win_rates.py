"""A policy judged by another reward: wins computed from the judge's own scores."""

import json
from pathlib import Path
from typing import Any

import pytest
from lxml import html
from support.chat_templates import chat_tokenizer
from support.classifiers import card_score, one_label_classifier
from support.rows import save
from support.shared_runs import shared_run
from support.synthetic_runs import synthetic_run
from support.tiny_runs import irl_align, the_line

from irl_align.evaluation.win_rates import distinct_bigrams
from irl_align.reward.model import RewardModel
from irl_align.training.train import Result

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def run() -> Result:
    return shared_run("irl")


@pytest.fixture(scope="module")
def judge() -> Result:
    return shared_run("judge")


def rows(run: Result, name: str) -> list[dict[str, Any]]:
    lines = (run.folder / f"samples/{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_win_rates_follow_the_judges_scores(
    run: Result, judge: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = irl_align(capsys, "evaluate", run.folder, "--judge", judge.folder)
    assert ended.status == 0, ended.err
    assert f"irl 1, judged by {judge.folder.name}: wins %" in ended.out
    (report,) = json.loads((run.folder / "evaluation.json").read_text())["judged"]
    assert [row["temperature"] for row in report["rows"]] == [1.0, 0.0]
    assert judge.reward is not None
    reward = RewardModel.from_pretrained(judge.reward)
    for actual, temperature in zip(report["rows"], ("1", "0"), strict=True):
        own, start = (rows(run, f"policy-{k}-t{temperature}") for k in (1, 0))
        prompts = [row["prompt"] for row in own]
        assert prompts == [row["prompt"] for row in start]
        mine = reward.score(prompts, [row["completion"] for row in own])
        for name, texts in (
            ("start", [row["completion"] for row in start]),
            ("demonstrations", [row["demonstrations"][0] for row in own]),
        ):
            theirs = reward.score(prompts, texts)
            same = [a["completion"] == text for a, text in zip(own, texts, strict=True)]
            wins = sum(
                0.5 if equal else float(a > b)
                for a, b, equal in zip(mine.tolist(), theirs.tolist(), same, strict=True)
            )
            assert actual[f"wins_against_{name}"]["mean"] == pytest.approx(wins / len(own))
        assert actual["samples"] == len(own) == 12
    irl_align(capsys, "report", run.folder)
    page = html.document_fromstring((run.folder / "report.html").read_text(encoding="utf-8"))
    assert any("judged by judge-seed3" in text for text in page.xpath("//summary/text()"))


def test_judge_refuses_the_policys_own_reward(
    run: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    for own in (run.folder, run.reward):
        line = the_line(irl_align(capsys, "evaluate", run.folder, "--judge", own))
        assert line.endswith("the reward that the policy was trained on; expected another")


def test_win_rates_of_sft_are_against_demonstrations_only(
    tmp_path: Path, judge: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    sft, output = shared_run("sft"), tmp_path / "sft.json"
    assert judge.reward is not None
    ended = irl_align(capsys, "evaluate", sft.folder, "--judge", judge.reward, "--output", output)
    assert ended.status == 0, ended.err
    (report,) = json.loads(output.read_text())["judged"]
    assert all("wins_against_start" not in row for row in report["rows"])
    assert all("wins_against_demonstrations" in row for row in report["rows"])


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a b c", "a b d"], 3 / 4),  # ab, bc, bd of ab, bc, ab, bd
        (["a a a a"], 1 / 3),
        (["one", ""], 0.0),
    ],
)
def test_distinct_bigrams_counts_pairs_of_neighbouring_words(
    texts: list[str], expected: float
) -> None:
    assert distinct_bigrams(texts) == pytest.approx(expected)


def test_win_rates_by_another_projects_reward_are_those_of_its_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reads conversations as its chat template writes them, whole."""
    tokenizer = chat_tokenizer("chatml")
    plain = one_label_classifier(tokenizer)
    judge = save(plain, tokenizer, tmp_path / "judge")
    prompts: list[list[dict[str, str]]] = [
        [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": f"Yes {i}?"},
            {"role": "user", "content": "Where is it?"},
        ]
        for i in range(6)
    ]
    answers = {
        name: [f"{text} {i}." for i in range(6)]
        for name, text in (("policy-1-t0", "Near"), ("policy-0-t0", "In the city"))
    }
    samples = {
        name: [{"prompt": p, "completion": text} for p, text in zip(prompts, texts, strict=True)]
        for name, texts in answers.items()
    }
    run = synthetic_run(tmp_path, "m", 1, [(0.3, 0.2), (0.2, 0.1)], samples=samples)
    wins = [
        card_score(plain, tokenizer, p, own) > card_score(plain, tokenizer, p, start)
        for p, own, start in zip(prompts, *answers.values(), strict=True)
    ]
    ended = irl_align(capsys, "evaluate", run, "--judge", judge)
    assert ended.status == 0, ended.err
    [report] = json.loads((run / "evaluation.json").read_text())["judged"]
    assert report["rows"][0]["wins_against_start"]["mean"] == pytest.approx(sum(wins) / 6)
    needs_chat = irl_align(capsys, "evaluate", run, "--judge", judge, "--template", "Q {prompt}")
    assert "a conversation needs template: chat" in the_line(needs_chat)


def test_evaluate_refuses_a_template_that_no_model_reads(
    run: Result, judge: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--template", "chat")
    ended = irl_align(capsys, "evaluate", run.folder, "--judge", judge.folder, *options)
    assert "--template: found only models that were made by irl-align" in the_line(ended)
    ended = irl_align(capsys, "evaluate", run.folder, "--best-of", 2, *options)
    assert "found --template without --card or --judge, which reads it" in the_line(ended)
