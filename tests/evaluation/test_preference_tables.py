"""RewardBench's sections: scores, missing subsets, and the command on a small made-up copy."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.shared_runs import shared_run
from support.tiny_runs import irl_align, the_line

from irl_align.evaluation.preference_tables import (
    SECTIONS,
    PairSet,
    preference_notes,
    preference_report,
    preference_report_tables,
    section_gaps,
    section_scores,
)

pytestmark = pytest.mark.timeout(240)
EVERY = [subset for section in SECTIONS.values() for subset in section]


def pair_set(subsets: list[str]) -> PairSet:
    prompts = [str(i) for i in range(len(subsets))]
    return PairSet("toy", "test", prompts, subsets, [None] * len(subsets))


def test_section_scores_weigh_subsets_by_their_pairs() -> None:
    assert section_scores({"other": 1.0, "llmbar-natural": 1.0}) == {}
    chat = dict.fromkeys(SECTIONS["Chat"], 0.0) | {"alpacaeval-easy": 1.0}
    assert section_scores(chat) == {"Chat": pytest.approx(100 / 358)}
    # math-prm weighs as much as the six languages together: 984 = 6 x 164.
    scores = section_scores(dict.fromkeys(EVERY, 0.5) | {"math-prm": 1.0})
    assert scores["Reasoning"] == pytest.approx(0.75)
    assert scores["RewardBench"] == pytest.approx((0.5 + 0.5 + 0.5 + 0.75) / 4)
    report = preference_report(
        pair_set(list(chat)), {"reward": np.array([1.0, -1, -1, -1, -1])}, {}
    )
    assert report["scorers"]["reward"]["sections"]["Chat"] == pytest.approx(100 / 358)
    assert any(grid.title.startswith("RewardBench") for grid in preference_report_tables(report))


def test_section_gaps_name_missing_and_unknown_subsets() -> None:
    assert section_gaps(["a", "b"]) == {} == section_gaps(EVERY)
    subsets = [name for name in EVERY if name not in ("hep-go", "hep-js", "llmbar-natural")]
    gaps = section_gaps([*subsets, "zebra", "other"])
    assert gaps == {
        "missing": {"Chat Hard": ["llmbar-natural"], "Reasoning": ["hep-go", "hep-js"]},
        "unknown": ["other", "zebra"],
    }
    report = preference_report(
        pair_set([*subsets, "zebra"]), {"reward": np.ones(len(subsets) + 1)}, {}
    )
    assert list(report["scorers"]["reward"]["sections"]) == ["Chat", "Safety"]
    assert [line for line in preference_notes(report) if "RewardBench" in line] == [
        "toy: RewardBench: no score of Chat Hard (lacks llmbar-natural); Reasoning (lacks hep-go, "
        "hep-js); so no mean",
        "toy: RewardBench: in no section, left out of its scores: zebra",
    ]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder in the layout of the card reward_bench: two pairs of each subset."""
    rows = [
        {
            "id": number,
            "prompt": f"name[the red lion], food[{subset}]",
            "chosen": "the red lion serves food." if right else "no.",
            "rejected": "it.",
            "chosen_model": "one",
            "rejected_model": "two",
            "subset": subset,
        }
        for number, subset in enumerate(EVERY)
        for right in (True, False)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "filtered.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def test_evaluate_reports_rewardbench_by_sections(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = shared_run("irl"), tmp_path / "found.json"
    command = ("evaluate", run.folder, "--output", output, "--card", f"reward_bench={copy}")
    ended = irl_align(capsys, *command)
    assert ended.status == 0, ended.err
    (report,) = json.loads(output.read_text())["sets"]
    assert report["pairs"] == 2 * len(EVERY) and report["section_gaps"] == {}
    for actual in report["scorers"].values():
        assert list(actual["sections"]) == [*SECTIONS, "RewardBench"]
        # By hand: each section's subsets by their own pairs, and the mean of the sections.
        scores = []
        for section, weights in SECTIONS.items():
            right = sum(n * actual["subsets"][name]["mean"] for name, n in weights.items())
            scores.append(right / sum(weights.values()))
            assert actual["sections"][section] == pytest.approx(scores[-1])
        assert actual["sections"]["RewardBench"] == pytest.approx(sum(scores) / 4)
    assert "RewardBench's sections: score %" in ended.out and "no score of" not in ended.out

    chat = [word for name in SECTIONS["Chat"] for word in ("--subset", name)]
    ended = irl_align(capsys, *command, *chat)
    assert ended.status == 0, ended.err
    (part,) = json.loads(output.read_text())["sets"]
    assert list(part["scorers"]["reward"]["sections"]) == ["Chat"]
    assert part["scorers"]["reward"]["sections"]["Chat"] == pytest.approx(
        report["scorers"]["reward"]["sections"]["Chat"]
    )
    assert "RewardBench: no score of Chat Hard (lacks mt-bench-hard, llmbar-natural," in ended.out
    line = the_line(irl_align(capsys, *command, "--subset", "Chat"))
    assert line.startswith("--subset: reward_bench, test: found no subset 'Chat', expected one of ")
