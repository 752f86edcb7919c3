"""A run's numbers of reward health and tokens, against numbers computed again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.shared_runs import shared_run
from support.tiny_runs import BEST, irl_align, metrics, tiny_recipe

from irl_align.data.pairs import load_pairs
from irl_align.evaluation.compare.costs import method_costs, stage_costs
from irl_align.models.trl import real_tokens
from irl_align.reward.audit import within_prompts
from irl_align.reward.model import RewardModel
from irl_align.training.run_folder import Run
from irl_align.training.train import Result, train

pytestmark = pytest.mark.timeout(240)


def folder_of(run: Path, role: str) -> Path:
    stages = json.loads((run / "stages.json").read_text(encoding="utf-8"))
    return run / stages[role]["path"]


@pytest.fixture(scope="module")
def run() -> Result:
    return shared_run("irl")


def test_report_has_the_length_correlation_of_distinct_samples(run: Result) -> None:
    rows = load_pairs(folder_of(run.folder, "pairs/0") / "held_out.parquet").to_list()
    samples = {(r["prompt_key"], tuple(r["rejected_ids"])): r["prompt_ids"] for r in rows}
    assert run.reward is not None
    reward = RewardModel.from_pretrained(run.reward)
    scores = reward.score_ids(list(samples.values()), [list(ids) for _, ids in samples])
    expected = within_prompts([k for k, _ in samples], scores, [len(ids) for _, ids in samples])
    if expected is None:  # one sample for each prompt: the pairs' differences
        chosen = reward.score_ids([r["prompt_ids"] for r in rows], [r["chosen_ids"] for r in rows])
        rejected = reward.score_ids(
            [r["prompt_ids"] for r in rows], [r["rejected_ids"] for r in rows]
        )
        longer = [len(r["chosen_ids"]) - len(r["rejected_ids"]) for r in rows]
        expected = float(np.corrcoef((chosen - rejected).numpy(), longer)[0, 1])
    recorded = metrics(run.folder)["reward/0"]["audit"]["length_correlation"]
    assert recorded == pytest.approx(expected, abs=1e-4)


def test_vitals_have_the_rewards_gain_over_the_start(run: Result) -> None:
    recorded = metrics(run.folder)["vitals/1"]
    assert run.reward is not None
    reward = RewardModel.from_pretrained(run.reward)
    data = pq.read_table(folder_of(run.folder, "data") / "held_out.parquet").to_pylist()
    means = []
    for k in (1, 0):
        folder = folder_of(run.folder, f"samples/held_out/policy-{k}/t1")
        drawn = pq.read_table(folder / "samples.parquet").to_pylist()
        assert len({row["prompt"] for row in drawn}) == recorded_prompts(drawn)
        prompts = sampled_prompts(data, run)
        ids = [row["token_ids"] for row in drawn]
        scores = reward.score_ids([prompts[row["prompt"]] for row in drawn], ids)
        means.append(float(scores.mean()))
    assert recorded["reward_score"] == pytest.approx(means[0], abs=1e-4)
    assert recorded["reward_gain"] == pytest.approx(means[0] - means[1], abs=1e-4)


def recorded_prompts(drawn: list[dict[str, Any]]) -> int:
    return max(row["prompt"] for row in drawn) + 1


def sampled_prompts(data: list[dict[str, Any]], run: Result) -> list[list[int]]:
    """Distinct held-out prompts that were sampled, in their order."""
    from irl_align.data.splits import choose_prompts

    recipe = run.view().recipe
    wanted = recipe["evaluation"]["held_out_prompts"]
    keys = choose_prompts([row["prompt_key"] for row in data], wanted, recipe["seed"])
    chosen = {row["prompt_key"]: row["prompt_ids"] for row in data if row["prompt_key"] in keys}
    return list(chosen.values())


def test_stages_record_their_tokens(run: Result) -> None:
    records = metrics(run.folder)
    args = run.view().recipe["sft"]["args"]
    rows = pq.read_table(folder_of(run.folder, "data") / "sft.parquet").to_pylist()
    whole = sum(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows)
    assert records["stage/sft"]["tokens_trained"] == whole * args["num_train_epochs"]
    role = "samples/train/policy-0/t1"
    drawn = pq.read_table(folder_of(run.folder, role) / "samples.parquet").to_pylist()
    sampled = sum(len(row["token_ids"]) for row in drawn)
    assert records[f"stage/{role}"]["tokens_sampled"] == sampled
    # The reward's pairs: a prompt's tokens once in a row, and each distinct side of a batch once.
    pairs = load_pairs(folder_of(run.folder, "pairs/0") / "train.parquet").to_list()
    most = sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"])
               for p in pairs)  # fmt: skip
    assert 0.3 * most < records["stage/reward/0"]["tokens_trained"] <= most
    (cost,) = method_costs([run.view()])
    own = [s for s in stage_costs(run.view()) if s.iteration == 0]
    assert cost.by_iteration[0]["sampled"] == sum(s.sampled or 0 for s in own) > sampled
    assert cost.by_iteration[0]["trained"] == sum(s.trained or 0 for s in own)


def test_real_tokens_of_packed_rows_exclude_padding() -> None:
    packed = {
        "input_ids": torch.zeros(2, 9),
        "attention_mask": torch.ones(2, 1, 9, 9, dtype=torch.bool),
        "row": torch.tensor([0, 0, 1]),
        "start": torch.tensor([3, 5, 2]),
        "length": torch.tensor([2, 4, 3]),
    }
    assert real_tokens(packed) == 9 + 5
    assert real_tokens({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}) == 5


def test_second_iteration_reports_agreement(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    signs = "loop.signs={two_sample_accuracy: 0.0, unfit_accuracy: 0.0}"
    result = train(tiny_recipe(tiny_folder, *BEST, "loop.iterations=2", signs))
    report = metrics(result.folder)["reward/1"]
    assert set(report["agreement"]) == {"0"} and -1.0 <= report["agreement"]["0"] <= 1.0
    ended = irl_align(capsys, "show", result.folder)
    assert ended.status == 0
    for heading in ("agreement", "correlation", "score"):
        assert heading in ended.out
    ended = irl_align(capsys, "report", result.folder)
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "correlation with length" in page and "tokens sampled, thousands" in page
    assert Run.load(result.folder).summary is not None
