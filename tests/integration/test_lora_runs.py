"""Runs with LoRA adapters as policies and rewards: SPIN, Best-of-N, PPO on one backbone."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.snippets import run_snippet
from support.tiny_runs import BEST, SPIN, metrics, stage_folder, stage_records, tiny_recipe

from irl_align.errors import UserError
from irl_align.hub.export import Form, export
from irl_align.models.lm_head import completion_logprobs
from irl_align.models.loading import load_model
from irl_align.models.lora import base_of, is_adapter
from irl_align.reward.model import RewardModel
from irl_align.training.train import Result, train

LN2 = math.log(2.0)
pytestmark = pytest.mark.timeout(240)
LORA = '{"r": 4, "lora_alpha": 8.0}'
FEW = ("evaluation={prompts: 4, held_out_prompts: 4, temperatures: [1.0]}",)


@pytest.fixture(scope="module")
def spin(tiny_folder: Path) -> Result:
    """Two iterations of SPIN by adapters on pi_0, whose SFT trained all weights."""
    lora = (f"model.lora={LORA}", "sft.full=true", "reward.schedule.learning_rate=[0.02]")
    two = ("loop.iterations=2", "pairs.window=latest")
    return train(tiny_recipe(tiny_folder, "name=spin", *FEW, *SPIN, *lora, *two))


def summed(model: Path, rows: list[dict[str, Any]], side: str) -> np.ndarray:
    prompts = [row["prompt_ids"] for row in rows]
    logprobs = completion_logprobs(load_model(model), prompts, [row[side] for row in rows])
    return np.asarray([logps.sum(dtype=np.float64) for logps in logprobs])


def test_the_opponent_of_spin_is_the_previous_adapter_and_not_the_base(spin: Result) -> None:
    records = stage_records(spin.folder)
    for k in (0, 1):
        assert records[f"reward/{k}"]["metrics"]["first_loss"] == pytest.approx(LN2, abs=1e-5)
        assert records[f"reward/{k}"]["metrics"]["last_loss"] < LN2
    base = stage_folder(spin.folder, "sft") / "model"
    first = stage_folder(spin.folder, "reward/0") / "model"
    second = stage_folder(spin.folder, "reward/1") / "model"
    assert not is_adapter(base)
    assert Path(base_of(first)).resolve() == Path(base_of(second)).resolve() == base
    # With the adapter switched off, a common mistake, the first loss would differ from ln 2.
    rows = pq.read_table(stage_folder(spin.folder, "pairs/1") / "train.parquet").to_pylist()[:24]
    margins = [
        summed(model, rows, "chosen_ids") - summed(model, rows, "rejected_ids")
        for model in (first, base)
    ]
    wrong = torch.from_numpy(0.1 * (margins[0] - margins[1]))
    assert abs(float(-torch.nn.functional.logsigmoid(wrong).mean()) - LN2) > 1e-3


def test_an_iteration_samples_from_the_previous_adapter(spin: Result) -> None:
    rows = pq.read_table(stage_folder(spin.folder, "pairs/1") / "train.parquet").to_pylist()[:16]
    first = stage_folder(spin.folder, "reward/0") / "model"
    drawn = np.asarray([row["rejected_logp"] for row in rows])
    np.testing.assert_allclose(summed(first, rows, "rejected_ids"), drawn, atol=1e-3)


# --- explicit rewards: Best-of-N, then PPO on one backbone ----------------------------------------


@pytest.fixture(scope="module")
def best(tiny_folder: Path) -> Result:
    """A reward and a policy by adapters on pi_0, whose SFT trained all weights."""
    lora = (f"model.lora={LORA}", f"reward.lora={LORA}", "sft.full=true")
    rate = "policy_update.args.learning_rate=0.02"
    return train(tiny_recipe(tiny_folder, "name=best", *FEW, *BEST, *lora, rate))


@pytest.fixture(scope="module")
def ppo(best: Result, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """SFT, reward and PPO by adapters on one base, which is in memory once; its own store."""
    model = {"path": str(stage_folder(best.folder, "sft") / "model"), "lora": json.loads(LORA)}
    update = {
        **{"kind": "ppo", "backbone": "shared", "critic_init": "reward", "credit": "red"},
        **{"episodes": 32, "batch_size": 16, "epochs": 1, "learning_rate": 0.01},
        **{"held_out_prompts": 4, "evaluate_every": 2, "missing_eos": "ignore", "keep": "last"},
    }
    recipe = tiny_recipe(
        tmp_path_factory.mktemp("lora"),
        *FEW,
        f"model={json.dumps({**model, 'from_scratch': None})}",
        "sft.args={num_train_epochs: 1, learning_rate: 0.01}",
        f"reward.lora={LORA}",
        f"policy_update={json.dumps(update)}",
        "loop.signs.unfit_accuracy=0.0",
    )
    return train(recipe)


def test_best_of_n_trains_adapters_on_the_sft_model(best: Result) -> None:
    base = stage_folder(best.folder, "sft") / "model"
    assert best.reward is not None
    for model in (best.reward, best.policy):
        assert is_adapter(model) and Path(base_of(model)).resolve() == base
    stages = stage_records(best.folder)
    assert stages["reward/0"]["settings"]["reward"]["lora"]["r"] == 4
    assert stages["policy-1"]["settings"]["lora"]["r"] == 4
    assert "lora" not in stages["sft"]["settings"]  # shared with runs that train all weights


def test_ppo_on_one_backbone_in_a_recipe(ppo: Result) -> None:
    base = stage_folder(ppo.folder, "start") / "model"
    sft = stage_folder(ppo.folder, "sft") / "model"
    assert ppo.reward is not None
    for model in (sft, ppo.reward, ppo.policy):
        assert is_adapter(model) and Path(base_of(model)).resolve() == base
    logged = metrics(ppo.folder)["ppo/0"]
    assert logged["updates"] == 2 and abs(logged["last"]["kl"]) > 1e-4
    assert logged["last"]["sampler_log_ratio"] < 1e-4
    update = stage_records(ppo.folder)["policy-1"]
    assert update["settings"]["options"]["backbone"] == "shared"
    assert abs(update["metrics"]["history"][0]["kl"]) < 1e-4  # the reference is SFT's adapter


def test_a_store_of_adapters_can_be_moved(ppo: Result, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(ppo.folder.parent, moved)
    policy = moved / ppo.policy.relative_to(ppo.folder.parent)
    assert base_of(policy).startswith(str(moved))
    assert str(ppo.folder.parent) not in (policy / "adapter_config.json").read_text()
    load_model(policy)


# --- export ---------------------------------------------------------------------------------------

PROMPTS = ["name[the red lion], food[thai], area[suburbs]", "name[Blue Heron], price[cheap]"]
ANSWERS = ["The red lion serves thai food in the suburbs.", "the blue heron is cheap."]


def base_model(run: Result) -> str:
    return base_of(run.policy)


@pytest.mark.parametrize("name", ["best", "ppo"])
def test_a_reward_is_exported_merged_or_as_an_adapter(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """In ppo the reward's adapter continues that of the policy."""
    run: Result = request.getfixturevalue(name)
    assert run.reward is not None
    ours = RewardModel.from_pretrained(run.reward).score(PROMPTS, ANSWERS)
    apart = RewardModel.from_pretrained(run.reward, merge=False).score(PROMPTS, ANSWERS)
    torch.testing.assert_close(apart, ours, rtol=1e-5, atol=1e-5)

    export(run.folder, "reward", tmp_path / "merged")
    assert not is_adapter(tmp_path / "merged")
    export(run.folder, "reward", tmp_path / "alone", form=Form(True, base_model(run)))
    assert "library_name: peft" in (tmp_path / "alone" / "README.md").read_text(encoding="utf-8")
    for kind in ("merged", "alone"):
        again = RewardModel.from_pretrained(tmp_path / kind).score(PROMPTS, ANSWERS)
        torch.testing.assert_close(again, ours, rtol=1e-5, atol=1e-5)
        score = run_snippet(tmp_path / kind)["score"]
        theirs = [score(p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
        assert theirs == pytest.approx(ours.tolist(), abs=1e-5)


@pytest.mark.parametrize("name", ["best", "ppo", "spin"])
def test_a_policy_is_exported_merged_or_as_an_adapter(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run: Result = request.getfixturevalue(name)
    rows = ([[5, 6, 7]], [[8, 9, 10]])
    ours = completion_logprobs(load_model(run.policy), *rows)[0]
    export(run.folder, "policy", tmp_path / "merged")
    export(run.folder, "policy", tmp_path / "alone", form=Form(True, base_model(run)))
    for kind in ("merged", "alone"):
        scope = run_snippet(tmp_path / kind, prompt=PROMPTS[0])
        assert isinstance(scope["answer"], str)
        model = scope["model"].eval()
        model = model.get_base_model() if kind == "alone" else model
        np.testing.assert_allclose(completion_logprobs(model, *rows)[0], ours, atol=1e-5)
        assert scope["tokenizer"].eos_token_id in scope["model"].generation_config.eos_token_id


def test_export_refuses_an_adapter_whose_base_others_cannot_get(
    best: Result, spin: Result, tmp_path: Path
) -> None:
    for run, form, line in (
        (best, Form(True), "--adapter: the adapter's base is a model of this run; expected --base"),
        (best, Form(False, "x"), "--base: names the base of an adapter"),
    ):
        with pytest.raises(UserError, match=line):
            export(run.folder, "reward", tmp_path / "out", form=form)
    with pytest.raises(UserError, match=r"--adapter: .* weights are all trained"):
        export(spin.folder, "policy", tmp_path / "out", 0, form=Form(True))
    assert list(tmp_path.iterdir()) == []
