"""`irl-align evaluate`: accuracies on preference sets, beside baselines worked out by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluated_runs import evaluated_run
from tiny_runs import irl_align, the_line
from transformers import AutoModelForCausalLM, AutoTokenizer

from irl_align.api import Result
from irl_align.preference_report import (
    PairSet,
    excess_share,
    preference_grids,
    preference_report,
)
from irl_align.rewardbench import SECTIONS, section_scores
from irl_align.serve import score_rows

pytestmark = pytest.mark.timeout(240)
CARD = """\
---
irl_align:
  kind: preferences
  splits: {test: {files: pairs.jsonl}, train: {files: train.jsonl}}
  columns: {prompt: prompt, chosen: chosen, rejected: rejected, subset: axis, margin: margin}
---
"""
PAIRS = [
    # prompt, chosen, rejected, axis, margin
    ("name[the red lion], food[thai]", "the red lion serves thai food.", "it.", "a/x", 1.0),
    ("name[the red lion], food[thai]", "thai.", "the red lion is the red lion.", "a/x", 2.0),
    ("name[the blue heron]", "the blue heron is cheap.", "the blue heron", "b", 1.0),
    ("name[the blue heron]", "the the the", "the the", "b", 3.0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "toy.md").write_text(CARD)
    write_pairs(folder / "pairs.jsonl", PAIRS)
    more = [(p.replace("the", "a"), c, r, s, m) for p, c, r, s, m in PAIRS]
    write_pairs(folder / "train.jsonl", more)
    return folder


def write_pairs(path: Path, pairs: list[tuple[Any, ...]]) -> None:
    names = ("prompt", "chosen", "rejected", "axis", "margin")
    lines = [json.dumps(dict(zip(names, pair, strict=True))) + "\n" for pair in pairs]
    path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def run() -> Result:
    return evaluated_run("irl")


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    output = Path(str(arguments[0])).parent / "evaluation.json"
    ended = irl_align(capsys, "evaluate", *arguments, "--output", output)
    assert ended.status == 0, ended.err
    (report,) = json.loads(output.read_text())["sets"]
    return report


def test_a_run_beside_its_baselines(
    run: Result, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluated(capsys, run.folder, "--card", folder / "toy.md")
    accuracy = {name: s["overall"]["mean"] for name, s in report["scorers"].items()}
    assert list(accuracy) == [
        "reward",
        "longer wins",
        "shorter wins",
        "SFT log-prob, sum",
        "SFT log-prob, mean",
    ]
    # The chosen one is longer in pairs 1, 3 and 4.
    assert (accuracy["longer wins"], accuracy["shorter wins"]) == (0.75, 0.25)
    assert run.reward is not None
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=False)) for pair in PAIRS]
    assert accuracy["reward"] == score_rows(run.reward, rows, "cpu")[1]
    sums, means = by_hand(run)
    assert accuracy["SFT log-prob, sum"] == sums
    assert accuracy["SFT log-prob, mean"] == means
    longer = report["scorers"]["longer wins"]
    assert {k: v["mean"] for k, v in longer["subsets"].items()} == {"a/x": 0.5, "b": 1.0}
    assert {k: (v["mean"], v["n"]) for k, v in longer["margins"].items()} == {
        "margin 1": (1.0, 2),
        "margin 2": (0.0, 1),
        "margin 3": (1.0, 1),
    }
    assert (report["pairs"], report["prompts"], report["dropped"]) == (4, 2, 0)


def by_hand(run: Result) -> tuple[float, float]:
    """Accuracy of the SFT model's summed and mean log-probs, with transformers alone."""
    stages = json.loads((run.folder / "stages.json").read_text())
    path = run.folder / stages["sft"]["path"] / "model"
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    wins = np.zeros(2)
    for prompt, chosen, rejected, *_ in PAIRS:
        totals = []
        for text in (chosen, rejected):
            start = tokenizer(prompt + "\n", add_special_tokens=False)["input_ids"]
            if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
                start = [tokenizer.bos_token_id, *start]
            rest = tokenizer(text, add_special_tokens=False)["input_ids"]
            rest = [*rest, tokenizer.eos_token_id]
            ids = torch.tensor([[*start, *rest]])
            with torch.no_grad():
                logps = model(ids).logits[0, len(start) - 1 : -1].log_softmax(-1)
            chosen_logps = logps[range(len(rest)), rest].double()
            totals.append([float(chosen_logps.sum()), float(chosen_logps.mean())])
        wins += np.greater(totals[0], totals[1])
    return float(wins[0] / 4), float(wins[1] / 4)


def test_an_implicit_reward_and_another_beside_it(
    run: Result, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spin = evaluated_run("spin")
    report = evaluated(
        capsys, spin.folder, "--card", folder / "toy.md", "--beside", run.folder, "--beside",
        run.reward,
    )  # fmt: skip
    names = list(report["scorers"])
    assert names[:3] == ["irl-seed0", "model", "implicit reward"]
    assert report["scorers"]["irl-seed0"] == report["scorers"]["model"]
    assert "calibration_error" not in report["scorers"]["implicit reward"]
    # The same by folders of models: SPIN's policy against the SFT model that it started from.
    stages = json.loads((spin.folder / "stages.json").read_text())
    sft = spin.folder / stages["sft"]["path"] / "model"
    alone = evaluated(capsys, spin.policy, "--sft", sft, "--card", folder / "toy.md")
    assert alone["scorers"]["implicit reward"] == report["scorers"]["implicit reward"]


def test_a_reward_trained_on_preferences(
    run: Result, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (run.folder, "--card", folder / "toy.md", "--train-split", "train")
    report = evaluated(capsys, *arguments)
    trained = report["scorers"]["trained on preferences"]
    best = trained["overall"]["mean"]
    for found in report["scorers"].values():
        expected = None if best <= 0.5 else (found["overall"]["mean"] - 0.5) / (best - 0.5)
        assert found["excess_share"] == expected
    stages = list((run.folder.parent / "store").glob("preference-reward-*"))
    assert len(stages) == 1
    assert evaluated(capsys, *arguments) == report
    assert list((run.folder.parent / "store").glob("preference-reward-*")) == stages


def test_mistakes_are_told(
    run: Result, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: object) -> str:
        return the_line(irl_align(capsys, "evaluate", *arguments))

    toy = folder / "toy.md"
    assert "found no config.json to read" in told(tmp_path, "--card", toy)
    assert "needs --sft" in told(run.policy, "--card", toy)
    assert "found no split 'dev', expected one of test, train" in told(
        run.folder, "--card", toy, "--split", "dev"
    )
    assert "which is evaluated on" in told(run.folder, "--card", toy, "--train-split", "test")
    assert "found no run with an explicit reward" in told(
        run.reward, "--card", toy, "--train-split", "train"
    )
    assert "found a card of demonstrations, expected preferences" in told(
        run.folder, "--card", "restaurant"
    )
    equal = tmp_path / "equal.md"
    equal.write_text(CARD)
    write_pairs(tmp_path / "pairs.jsonl", [("p", "same", "same", "a", 1.0)])
    assert "chosen and rejected are the same text" in told(run.folder, "--card", equal)


def test_pairs_beyond_the_context_are_left_out_and_counted(
    run: Result, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "long.md"
    card.write_text(CARD)
    write_pairs(tmp_path / "pairs.jsonl", [*PAIRS, ("p", "word " * 300, "no", "b", 1.0)])
    assert evaluated(capsys, run.folder, "--card", card)["dropped"] == 1
    write_pairs(tmp_path / "pairs.jsonl", [("p", "word " * 300, "no", "b", 1.0)])
    line = the_line(irl_align(capsys, "evaluate", run.folder, "--card", card))
    assert line == "long: all 1 pairs are longer than the models' context"


def pair_set(subsets: list[str], margins: list[float | None]) -> PairSet:
    prompts = [str(i) for i in range(len(subsets))]
    return PairSet("toy", "test", prompts, subsets, margins)


def test_ties_count_half_and_thirds_split_margins() -> None:
    pairs = pair_set(["s"] * 9, [float(i) for i in range(9)])
    scores = {"reward": np.array([1.0, 0, -1] * 3), "longer wins": np.ones(9)}
    report = preference_report(pairs, scores, {"reward": 0.25})
    reward = report["scorers"]["reward"]
    assert reward["overall"]["mean"] == 0.5 and reward["subsets"] == {}
    assert {k: (v["mean"], v["n"]) for k, v in reward["margins"].items()} == {
        "margin up to 2.66667": (0.5, 3),
        "margin up to 5.33333": (0.5, 3),
        "margin above 5.33333": (0.5, 3),
    }
    assert reward["against"]["longer wins"]["mean"] == -0.5
    assert "against" not in report["scorers"]["longer wins"]
    (overall, by_margin, against) = preference_grids(report)
    assert overall.rows[0][0] == "reward" and overall.rows[0][3] == "25.0"
    assert [row[0] for row in by_margin.rows] == list(reward["margins"])
    assert against.rows[0][:3] == ["reward", "longer wins", "-50.0"]


def test_excess_share() -> None:
    assert excess_share(0.6, 0.7) == pytest.approx(0.5)
    assert excess_share(0.45, 0.75) == pytest.approx(-0.2)
    assert excess_share(0.9, 0.5) is None


def test_rewardbench_weighs_subsets_by_their_pairs() -> None:
    assert section_scores({"other": 1.0, "llmbar-natural": 1.0}) == {}
    chat = dict.fromkeys(SECTIONS["Chat"], 0.0) | {"alpacaeval-easy": 1.0}
    assert section_scores(chat) == {"Chat": pytest.approx(100 / 358)}
    every = {subset: 0.5 for section in SECTIONS.values() for subset in section}
    # math-prm weighs as much as the six languages together: 984 = 6 x 164.
    scores = section_scores(every | {"math-prm": 1.0})
    assert scores["Reasoning"] == pytest.approx(0.75)
    assert scores["RewardBench"] == pytest.approx((0.5 + 0.5 + 0.5 + 0.75) / 4)
    pairs = pair_set(list(chat), [None] * 5)
    report = preference_report(pairs, {"reward": np.array([1.0, -1, -1, -1, -1])}, {})
    assert report["scorers"]["reward"]["sections"]["Chat"] == pytest.approx(100 / 358)
    assert any(grid.title.startswith("RewardBench") for grid in preference_grids(report))
