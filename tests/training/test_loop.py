"""The loop from end to end: every way of making pairs, fitting rewards and improving policies."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from support.tiny_runs import BEST, SPIN, metrics, stage_folder, stage_records, tiny_recipe, weights
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from irl_align.config.recipe import load_recipe
from irl_align.errors import UserError
from irl_align.evaluation.inference import saved_reward
from irl_align.models.generation.samples import StoredSamples
from irl_align.reward.model import RewardModel
from irl_align.tasks import restaurant
from irl_align.training.run_folder import Run
from irl_align.training.trackers import LoopTrackers
from irl_align.training.train import Result, train

LN2 = math.log(2.0)
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of this module shares one store, so that SFT is trained once."""
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def run(folder: Path) -> Callable[..., Result]:
    """``run(name, *overrides)``: train the tiny recipe under a name."""
    return lambda name, *overrides: train(tiny_recipe(folder, f"name={name}", *overrides))


@pytest.fixture(scope="module")
def best(run: Callable[..., Result]) -> Result:
    """Inverse RL with Best-of-N fine-tuning, one iteration."""
    return run("best", *BEST)


@pytest.fixture(scope="module")
def spin(best: Result, run: Callable[..., Result]) -> Result:
    """SPIN, two iterations, after `best` has filled the store."""
    return run("spin", *SPIN, "loop.iterations=2", "loop.pick=nearest", "pairs.window=latest")


def column(path: Path, name: str) -> list[Any]:
    return pq.read_table(path).column(name).to_pylist()


def logp(
    model: PreTrainedModel, prompt: list[int], completion: list[int], temperature: float = 1.0
) -> float:
    """Summed log-prob of one completion, unpadded and by the model's own forward."""
    ids = torch.tensor([prompt + completion])
    with torch.inference_mode():
        table = (model(ids).logits[0].double() / temperature).log_softmax(-1)
    return sum(float(table[len(prompt) - 1 + t, token]) for t, token in enumerate(completion))


def test_best_of_n_fine_tunes_on_the_best_samples(best: Result) -> None:
    records = stage_records(best.folder)
    update = records["policy-1"]["metrics"]
    assert best.policy == stage_folder(best.folder, "policy-1") / "model"
    assert best.reward == stage_folder(best.folder, "reward/0") / "model"
    assert weights(best.policy) != weights(stage_folder(best.folder, "sft") / "model")
    # One row for each of 24 prompts with a finished sample among its 2 candidates.
    candidates = stage_folder(best.folder, "samples/candidates/policy-0/t1") / "samples.parquet"
    rows = pq.read_table(candidates).to_pylist()
    finished = {row["prompt"] for row in rows if not row["truncated"]}
    assert len(rows) == 48 and 0 < len(finished) < 24
    assert update["steps"] == math.ceil(len(finished) / 16)
    assert update["truncated"] == pytest.approx(sum(row["truncated"] for row in rows) / 48)
    assert update["score_best"] > update["score_mean"]


def test_every_policy_is_evaluated_at_every_temperature(best: Result) -> None:
    records = metrics(best.folder)
    for number in (0, 1):
        for name, temperature in (("t1", 1.0), ("t0", 0.0)):
            record = records[f"evaluation/{number}/{name}"]
            assert (record["policy"], record["temperature"]) == (number, temperature)
            assert 0.0 <= record["metrics"]["fully_right"] <= 1.0
            shown = (best.folder / f"samples/policy-{number}-{name}.jsonl").read_text().splitlines()
            assert len(shown) == 12
            assert {"prompt", "completion", "demonstrations"} <= set(json.loads(shown[0]))
    assert abs(records["evaluation/0/t1"]["kl"]) < 1e-4  # pi_0 against itself
    assert records["evaluation/demonstrations"]["metrics"]["fully_right"] == 1.0
    summary = best.view().summary
    assert summary is not None and summary["ended"] == "1 iterations done"
    assert best.folder.parent / summary["policy"] == best.policy


def test_entropy_is_matched_for_gold_alone(folder: Path) -> None:
    no_gold = ("name=no-gold", "data.card=ultrachat_200k", "data.task={}")
    recipe = tiny_recipe(folder, *no_gold, "evaluation.match_entropy=true")
    with pytest.raises(
        UserError, match="match_entropy: it compares gold metrics, and card ultrachat_200k"
    ):
        train(recipe)
    assert not (folder / "runs" / "no-gold-seed0").exists()


def test_the_first_policy_at_a_later_ones_entropy(best: Result, run: Callable[..., Result]) -> None:
    result = run("matched", *BEST, "evaluation.match_entropy=true")
    records = metrics(result.folder)
    assert "matched-entropy/0" not in records and "matched-entropy/1" not in metrics(best.folder)
    matched, own = records["matched-entropy/1"], records["evaluation/1/t1"]
    assert matched["entropy"] == pytest.approx(own["entropy"], rel=0.1)
    assert matched["temperature"] * 100 == pytest.approx(round(matched["temperature"] * 100))
    settings = stage_records(result.folder)["matched-entropy/1"]["settings"]
    assert settings["prompts"] == 12  # of fewer prompts it is another stage
    judged = stage_folder(result.folder, "matched-entropy/1") / "samples.jsonl"
    lines = [json.loads(line) for line in judged.read_text().splitlines()]
    role = f"samples/evaluation/policy-0/t{matched['temperature']:g}"
    rows = pq.read_table(stage_folder(result.folder, role) / "samples.parquet").to_pylist()
    assert len(lines) == len(rows) == 12
    # The samples' entropy once more, by the model's own forward, unpadded.
    data = pq.read_table(stage_folder(result.folder, "data") / "evaluation.parquet").to_pylist()
    prompt_ids = {row["prompt"]: row["prompt_ids"] for row in data}
    sft = AutoModelForCausalLM.from_pretrained(stage_folder(result.folder, "sft") / "model").eval()
    sums = [
        logp(sft, prompt_ids[prompt], row["token_ids"], matched["temperature"])
        for row in rows
        for prompt in [lines[row["prompt"]]["prompt"]]
    ]
    tokens = sum(len(row["token_ids"]) for row in rows)
    assert -sum(sums) / tokens == pytest.approx(matched["entropy"], rel=1e-3)
    wrong = [e for line in lines for e in restaurant.errors(line["prompt"], line["completion"])]
    slots = sum(line["slots"] for line in lines)
    assert matched["metrics"]["slot_error_rate"] == pytest.approx(len(wrong) / slots)


def test_the_reward_is_centred_on_the_demonstrations(best: Result) -> None:
    assert best.reward is not None
    rows = pq.read_table(stage_folder(best.folder, "data") / "reward.parquet").to_pylist()
    reward = RewardModel.from_pretrained(best.reward)
    scores = reward.score_ids(
        [row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows]
    ).double()
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-4)
    _, std = stage_records(best.folder)["reward/0"]["metrics"]["demonstration_scores"]
    assert float(scores.std(correction=0)) == pytest.approx(std, abs=1e-4)  # still in nats


def test_spin_starts_at_ln_2_and_moves_the_policy(spin: Result) -> None:
    records = stage_records(spin.folder)
    for k in (0, 1):
        fit = records[f"reward/{k}"]["metrics"]
        assert fit["first_loss"] == pytest.approx(LN2, abs=1e-5)
        assert fit["last_loss"] < LN2
    models = [stage_folder(spin.folder, role) / "model" for role in ("sft", "reward/0", "reward/1")]
    assert len({weights(model) for model in models}) == 3
    assert spin.reward is None  # it is inside the policy
    logged = metrics(spin.folder)
    assert set(logged["reward/1"]["older"]) == set(logged["reward/1"]["older_before"]) == {"0"}
    assert logged["reward/0"]["held_out"]["accuracy"] > 0.5


def test_pick_nearest_takes_the_iterate_that_the_last_reward_tells_least(spin: Result) -> None:
    accuracy = metrics(spin.folder)["pick"]["accuracy"]
    assert len(accuracy) == 3
    number = min(range(3), key=lambda i: (abs(accuracy[i] - 0.5), i))
    models = [stage_folder(spin.folder, role) / "model" for role in ("sft", "reward/0", "reward/1")]
    assert spin.policy == models[number]
    summary = spin.view().summary
    assert summary is not None and summary["policy_number"] == number


def test_a_second_recipe_reuses_what_it_shares(best: Result, spin: Result) -> None:
    del best  # it came first
    reused = {key: r["reused"] for key, r in metrics(spin.folder).items() if "reused" in r}
    shared = ("start", "data", "sft", "samples/train/policy-0/t1", "evaluation/0/t0", "vitals/0")
    assert all(reused[f"stage/{role}"] for role in shared)
    assert not reused["stage/reward/0"]


def test_the_window_decides_how_many_pairs_are_fitted(
    spin: Result, run: Callable[..., Result], caplog: pytest.LogCaptureFixture
) -> None:
    # Of 154 training demonstrations 34 are longer than the samples' limit of 64 tokens, and the
    # others make one pair each in an iteration, 32 in a batch.
    counts = metrics(spin.folder)["pairs/0"]["train"]
    assert (counts["pairs"], counts["dropped/overlong"]) == (120, 34)
    steps = stage_records(spin.folder)["reward/1"]["metrics"]["steps"]
    assert steps == math.ceil(120 / 32)  # latest
    both = run("last-2", *SPIN, "loop.iterations=2", "pairs.window=last-2")
    assert caplog.text.count("are longer than generation.max_new_tokens, 64: they make no") == 1
    assert stage_records(both.folder)["reward/1"]["metrics"]["steps"] == math.ceil(240 / 32)
    assert metrics(both.folder)["stage/reward/0"]["reused"] is False  # the window is a setting


def test_a_fit_on_a_part_of_the_pairs_shares_them(best: Result, run: Callable[..., Result]) -> None:
    part = run("part", *SPIN, "reward.max_pairs=40", "pairs.truncated=drop")
    records, whole = stage_records(part.folder), stage_records(best.folder)
    assert records["pairs/0"]["key"] == whole["pairs/0"]["key"]
    assert records["reward/0"]["metrics"]["steps"] == 2  # 40 pairs, 32 a batch


def test_running_again_builds_nothing_and_touches_no_stage(
    best: Result, folder: Path, run: Callable[..., Result]
) -> None:
    store = folder / "runs" / "store"
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    again = run("best", *BEST)
    assert again == best
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before
    reused = [r["reused"] for key, r in metrics(again.folder).items() if key.startswith("stage/")]
    assert len(reused) > 15 and all(reused)


def test_the_same_recipe_gives_the_same_bits_and_another_seed_others(
    best: Result, tmp_path: Path
) -> None:
    elsewhere = train(tiny_recipe(tmp_path, *BEST))
    assert best.reward is not None and elsewhere.reward is not None
    assert weights(elsewhere.policy) == weights(best.policy)
    assert weights(elsewhere.reward) == weights(best.reward)
    other = train(tiny_recipe(tmp_path, "seed=1", "loop.iterations=0"))
    assert other.folder.name == "tiny-seed1"
    sft = [weights(stage_folder(r.folder, "sft") / "model") for r in (best, other)]
    assert sft[0] != sft[1]


def test_best_against_worst_is_a_pairwise_fit(best: Result, run: Callable[..., Result]) -> None:
    dpo = "{kind: best_of_n, n: 4, prompts: 24, use: dpo, args: {max_steps: 3, beta: 0.1}}"
    result = run("dpo", f"policy_update={dpo}")
    records = stage_records(result.folder)
    assert records["reward/0"]["key"] == stage_records(best.folder)["reward/0"]["key"]
    assert records["policy-1"]["name"] == "best-of-n-dpo"
    assert records["policy-1"]["metrics"]["steps"] == 3
    assert records["policy-1"]["metrics"]["first_loss"] == pytest.approx(LN2, abs=1e-5)


def test_selection_keeps_the_policy_and_ranks_its_samples(
    best: Result, run: Callable[..., Result]
) -> None:
    result = run("select", "policy_update={n: 3, use: select}", "evaluation.match_entropy=true")
    assert result.policy == stage_folder(best.folder, "sft") / "model"
    summary = result.view().summary
    assert summary is not None
    assert summary["ranking"] == {"n": 3, "score": "reward", "temperature": 1.0}

    logged = metrics(result.folder)
    # KL(best-of-n || pi) is at most log n - (n - 1)/n.
    assert logged["evaluation/1/t1"]["kl_bound"] == pytest.approx(math.log(3) - 2 / 3)
    assert "evaluation/1/t0" not in logged and "entropy" not in logged["vitals/1"]
    assert not any(key.startswith("matched-entropy/") for key in logged)

    roles = ("samples/evaluation-candidates/policy-0/t1", "selected/evaluation/policy-1")
    candidates, selected = (
        pq.read_table(stage_folder(result.folder, role) / "samples.parquet").to_pylist()
        for role in roles
    )
    assert (len(candidates), len(selected)) == (36, 12)
    prompts = _evaluation_prompts(result)
    assert result.reward is not None
    reward = RewardModel.from_pretrained(result.reward)
    for number, chosen in enumerate(selected):
        group = [row for row in candidates if row["prompt"] == number]
        done = [row for row in group if not row["truncated"]] or group[:1]
        ids = [row["token_ids"] for row in done]
        scores = reward.score_ids([prompts[number]] * len(ids), ids)
        assert chosen["token_ids"] == ids[int(scores.argmax())]


def test_pairs_say_how_a_selecting_policy_drew(run: Callable[..., Result]) -> None:
    update = "policy_update={n: 3, use: select, temperature: 0.5}"
    result = run("selecting", update, "loop={iterations: 2, signs: {unfit_accuracy: 0.0}}")
    for iteration, temperature, known in ((0, 1.0, True), (1, 0.5, False)):
        pairs = stage_folder(result.folder, f"pairs/{iteration}") / "train.parquet"
        assert set(column(pairs, "temperature")) == {temperature}
        # How likely a sample is to be the best of three is not known.
        assert all((logp is not None) == known for logp in column(pairs, "rejected_logp"))


def _evaluation_prompts(result: Result) -> list[list[int]]:
    """Prompt ids of the evaluation's samples, in their order."""
    rows = pq.read_table(stage_folder(result.folder, "data") / "evaluation.parquet").to_pylist()
    ids = {row["prompt"]: row["prompt_ids"] for row in rows}
    shown = (result.folder / "samples/policy-1-t1.jsonl").read_text().splitlines()
    return [ids[json.loads(line)["prompt"]] for line in shown]


def test_more_sft_is_the_control_without_a_reward(run: Callable[..., Result]) -> None:
    result = run(
        "control", "reward={kind: none}", "policy_update={kind: sft, args: {max_steps: 2}}"
    )
    records = stage_records(result.folder)
    assert result.reward is None
    assert "pairs/0" not in records and "reward/0" not in records
    assert records["policy-1"]["metrics"]["steps"] == 2
    summary = result.view().summary
    assert summary is not None and summary["reward"] is None


def test_a_log_ratio_needs_no_fit_and_is_scored_after_the_run(run: Callable[..., Result]) -> None:
    """r(x, y) is pi_0's mean log-prob, and PPO runs on it."""
    ppo = "policy_update={kind: ppo, advantage: rloo, batch_size: 8, n: 2, episodes: 16}"
    ratio = "reward={kind: implicit, numerator: initial, reference: none, mean: true}"
    result = run("log-ratio", ratio, ppo)
    sft = AutoModelForCausalLM.from_pretrained(stage_folder(result.folder, "sft") / "model").eval()
    rows = pq.read_table(stage_folder(result.folder, "data") / "reward.parquet").to_pylist()
    assert result.reward is None and "reward/0" not in stage_records(result.folder)
    ids = [[row[name] for row in rows] for name in ("prompt_ids", "completion_ids")]
    actual = saved_reward(result.folder, "cpu").score_ids(*ids)
    expected = [logp(sft, p, c) / len(c) for p, c in zip(*ids, strict=True)]
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-4)
    logged = metrics(result.folder)
    assert logged["reward/0"]["held_out"]["pairs"] > 0 and logged["vitals/1"]["fresh"]["pairs"] > 0
    assert len(stage_records(result.folder)["policy-1"]["metrics"]["history"]) == 2


def write_preferences(folder: Path) -> Path:
    card = folder / "liked.md"
    card.write_text(
        "---\nirl_align:\n  kind: preferences\n  splits: {train: {files: liked.jsonl}}\n"
        "  columns: {prompt: prompt, chosen: better, rejected: worse}\n"
        '  template: "{prompt}\\n"\n---\n'
    )
    rows = [
        {"prompt": f"name[the red lion {i}]", "better": "The red lion is good.", "worse": "No."}
        for i in range(7)
    ]
    (folder / "liked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return card


def test_options_of_the_explicit_reward(
    folder: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    """Linear loss with a bound, a warm start, lm_coef, preferences, disjoint data, all sources."""
    sources = "[demonstration/policy, demonstration/contrast, demonstration/init, sft/init]"
    result = run(
        "everything",
        "data.reward_data=disjoint",
        f"pairs={{sources: {sources}, contrast: edit, truncated: keep, window: latest}}",
        "reward={loss: linear, bound: 2.0, init: warm, lm_coef: 0.1}",
        # Nothing is learned in the second fit: a warm start then ends where the first fit did.
        "reward.schedule.learning_rate=[0.003, 0.0]",
        f"reward.preferences={{card: {write_preferences(tmp_path)}, weight: 0.5}}",
        "loop={iterations: 2, signs: {unfit_accuracy: 0.0}}",
    )
    records, data = stage_records(result.folder), stage_folder(result.folder, "data")
    sft, reward = (set(column(data / f"{part}.parquet", "prompt")) for part in ("sft", "reward"))
    assert sft and reward and not sft & reward

    counts = metrics(result.folder)["pairs/0"]["train"]
    demonstrations = len(column(data / "reward.parquet", "prompt"))
    dropped = counts["dropped/identical"] + counts["dropped/overlong"]
    assert counts["pairs/demonstration/policy"] + dropped >= demonstrations
    for source in ("demonstration/contrast", "demonstration/init", "sft/init"):
        assert counts[f"pairs/{source}"] > 0
    assert counts["rejected_truncated"] > 0  # kept, except where they would be preferred
    sft = column(
        stage_folder(result.folder, "samples/train/policy-0/t1") / "samples.parquet", "truncated"
    )
    assert counts["dropped/truncated"] == sum(sft)
    fit = records["reward/0"]["metrics"]
    assert fit["steps"] == math.ceil((counts["pairs"] + 7) / 32)

    models = [stage_folder(result.folder, f"reward/{k}") / "model" for k in (0, 1)]
    assert records["reward/1"]["inputs"]["warm"] == records["reward/0"]["key"]
    first, second = (load_file(model / "model.safetensors") for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    settings = json.loads((models[1] / "config.json").read_text())["irl_reward"]
    assert (settings["lm_coef"], settings["bound"]) == (0.1, 2.0)
    rows = pq.read_table(stage_folder(result.folder, "pairs/0") / "train.parquet").to_pylist()
    for side in ("prompt_ids", "chosen_ids"), ("rejected_prompt_ids", "rejected_ids"):
        scores = RewardModel.from_pretrained(models[1]).score_ids(
            *([row[name] for row in rows] for name in side)
        )
        raw = scores + settings["mean"]
        assert raw.abs().max() <= 2.0 + 1e-4 and raw.std() > 0


def test_a_linear_head_on_frozen_features_with_smoothed_labels(
    best: Result, run: Callable[..., Result]
) -> None:
    frozen = ("reward.train_layers=0", "reward.label_smoothing=0.1", "reward.margin_cap=3.0")
    result = run("frozen", *BEST, *frozen, "loop.signs.action=warn")
    start, fitted = (
        load_file(stage_folder(result.folder, role) / "model" / "model.safetensors")
        for role in ("sft", "reward/0")
    )
    assert all(
        torch.equal(start[name], weight) for name, weight in fitted.items() if "score" not in name
    )
    keys = [stage_records(each.folder)["reward/0"]["key"] for each in (best, result)]
    assert keys[0] != keys[1]


def test_pairs_of_the_policy_over_older_ones_begin_in_iteration_1(
    run: Callable[..., Result],
) -> None:
    sources = "pairs={sources: [demonstration/policy, policy/older, policy/sft], SHARES}"
    shares = sources.replace("SHARES", "shares: [50, 30, 20], truncated: keep, window: latest")
    options = [option for option in SPIN if not option.startswith("pairs.")]
    result = run("older", *options, shares, "loop.iterations=3", "loop.signs.action=warn")
    records = stage_records(result.folder)
    first, *later = (records[f"pairs/{k}"]["metrics"]["train"] for k in (0, 1, 2))
    assert first["pairs"] == first["pairs/demonstration/policy"] == 120
    for counts in later:
        parts = [counts[f"pairs/{source}"] for source in
                 ("demonstration/policy", "policy/older", "policy/sft")]  # fmt: skip
        assert sum(parts) == counts["pairs"] > 0
        assert [part / counts["pairs"] for part in parts] == pytest.approx(
            [0.5, 0.3, 0.2], abs=0.02
        )
    folder = stage_folder(result.folder, "pairs/2") / "train.parquet"
    rows = pq.read_table(folder).to_pylist()
    generators = {row["source"]: row["generator"] for row in rows}
    assert generators["policy/older"] == records["reward/0"]["key"]
    assert generators["policy/sft"] == records["sft"]["key"]
    assert generators["demonstration/policy"] == records["reward/1"]["key"]


def test_a_cold_start_with_neighbour_contrast_alone(run: Callable[..., Result]) -> None:
    result = run(
        "contrast",
        "pairs={sources: [demonstration/contrast], contrast_per_demonstration: 2}",
        "reward.init=cold",
        "reward.args.max_steps=2",
        "loop.iterations=2",
        "policy_update={kind: best_of_n, n: 2, prompts: 24, args: {max_steps: 1}}",
    )
    records = stage_records(result.folder)
    assert "warm" not in records["reward/1"]["inputs"]
    rows = pq.read_table(stage_folder(result.folder, "pairs/0") / "train.parquet").to_pylist()
    assert rows and all(row["chosen_ids"] == row["rejected_ids"] for row in rows)
    assert all(row["prompt_ids"] != row["rejected_prompt_ids"] for row in rows)


def test_a_mixture_reference_is_a_weighted_sum_of_log_probs(
    run: Callable[..., Result], spin: Result
) -> None:
    """The second fit learns nothing, so its margins are known from the two models alone."""
    result = run(
        "mixture",
        *SPIN,
        "reward.reference=mixture",
        "reward.mixture=0.25",
        "reward.schedule.learning_rate=[0.001, 0.0]",
        "loop.iterations=2",
    )
    records = stage_records(result.folder)
    assert records["reward/0"]["metrics"]["first_loss"] == pytest.approx(LN2, abs=1e-5)
    assert "first_loss" not in records["reward/1"]["metrics"]  # pi_1 is not the mixture
    pi_0, pi_1 = (
        AutoModelForCausalLM.from_pretrained(stage_folder(result.folder, role) / "model")
        for role in ("sft", "reward/0")
    )
    table = pq.read_table(stage_folder(result.folder, "pairs/1") / "held_out.parquet")
    margins = []
    for row in table.to_pylist():
        sides = [(row["prompt_ids"], row["chosen_ids"])]
        sides.append((row["rejected_prompt_ids"], row["rejected_ids"]))
        # beta (log pi_1 - (0.25 log pi_0 + 0.75 log pi_1)) of each side
        rewards = [0.1 * 0.25 * (logp(pi_1, *side) - logp(pi_0, *side)) for side in sides]
        margins.append(rewards[0] - rewards[1])
    report = metrics(result.folder)["reward/1"]["held_out"]
    assert report["margin"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert report["loss"] == pytest.approx(np.mean(np.logaddexp(0.0, -np.array(margins))), abs=1e-4)


def test_an_unfit_reward_is_not_optimised_on(run: Callable[..., Result]) -> None:
    """Nothing learned: every margin is 0 and the held-out loss ln 2."""
    result = run(
        "unfit", *SPIN, "reward.schedule.learning_rate=[0.0]", "loop.signs.unfit_accuracy=0.5"
    )
    logged, summary = metrics(result.folder), result.view().summary
    assert logged["reward/0"]["held_out"]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert summary is not None and summary["ended"] == "iteration 0: the reward is unfit"
    assert result.policy == stage_folder(result.folder, "sft") / "model"
    assert "vitals/1" not in logged and "evaluation/1/t1" not in logged
    assert "is unfit and is not used by the policy step" in logged["signs/reward-0"]["signs"][-1]


def test_a_sign_with_action_stop_keeps_the_policy_before(
    best: Result, run: Callable[..., Result]
) -> None:
    strict = "unfit_accuracy: 0.0, action: stop, two_sample_accuracy: 0.0"
    result = run("stopped", *BEST, f"loop.signs={{{strict}, kl: 1e-9, length_change: 1e-9}}")
    summary = result.view().summary
    assert summary is not None
    assert summary["ended"].endswith("policy 0 is kept") and summary["policy_number"] == 0
    assert result.policy == stage_folder(best.folder, "sft") / "model"
    # The policy that was refused is evaluated all the same, for the report.
    assert "evaluation/1/t1" in metrics(result.folder)


def test_loop_ends_when_the_reward_cannot_separate_fresh_samples(
    best: Result, run: Callable[..., Result]
) -> None:
    calm = "entropy_low: 0.0, entropy_high: 99.0, kl: 99.0, length_change: 99.0, missing_eos: 1.0"
    bounds = f"{calm}, demonstration_log_prob: 99.0, unfit_accuracy: 0.0, two_sample_accuracy: 1.0"
    result = run("fresh", *BEST, f"loop.signs={{{bounds}, action: stop}}", "loop.iterations=3")
    summary = result.view().summary
    assert summary is not None and "nothing is left to learn" in summary["ended"]
    assert result.policy == best.policy  # the new policy is kept
    assert "reward/1" not in stage_records(result.folder)


@pytest.mark.parametrize("group", ["sft", "reward", "policy_update"])
def test_train_refuses_contradicting_trl_options_before_any_work(
    group: str, tmp_path: Path
) -> None:
    both = (f"{group}.args.bf16=true", f"{group}.args.fp16=true")
    with pytest.raises(UserError, match=rf"^{group}: recipe: args of \w+Config: .*fp16") as caught:
        train(tiny_recipe(tmp_path, *both))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


UPDATE = """
import shutil
from irl_align.policy import Policy


class Copy:
    def __init__(self, note):
        self.note = note

    def __call__(self, context, request):
        def build(work):
            shutil.copytree(request.policy.path, work / "model")
            return {"note": self.note, "prompts": len(request.demonstrations.distinct_prompts())}

        inputs = {"policy": request.policy.key, "reward": request.reward.key}
        stage = context.stage(request.role, "copy", {"note": self.note}, inputs, build)
        return Policy(stage.path / "model", stage.key)
"""


def test_a_policy_update_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Result]
) -> None:
    (tmp_path / "my_update.py").write_text(UPDATE)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = run("own", "policy_update={kind: 'my_update:Copy', options: {note: hello}}")
    sys.modules.pop("my_update")
    records = stage_records(result.folder)
    assert records["policy-1"]["metrics"]["note"] == "hello"
    assert weights(result.policy) == weights(stage_folder(result.folder, "sft") / "model")

    with pytest.raises(UserError, match=r"policy_update\.options: my_update:Copy refused them"):
        run("own-options", "policy_update={kind: 'my_update:Copy', options: {nothing: hello}}")
    sys.modules.pop("my_update")
    with pytest.raises(UserError, match=r"policy_update\.kind: cannot import my_update:Paste"):
        run("own-kind", "policy_update={kind: 'my_update:Paste'}")
    sys.modules.pop("my_update")


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_conversations(folder: Path) -> None:
    (folder / "chat.md").write_text(
        "---\nirl_align:\n  kind: demonstrations\n  template: chat\n  columns: {messages: turns}\n"
        "  splits: {train: {files: chat.jsonl}, validation: {from: train, share: 0.2}}\n---\n"
    )
    rows = [
        [
            {"role": "user", "content": f"What is {i} and {i % 7}?"},
            {"role": "assistant", "content": f"It is {i + i % 7}."},
        ]
        for i in range(40)
    ]
    text = "".join(json.dumps({"turns": row}) + "\n" for row in rows)
    (folder / "chat.jsonl").write_text(text)


@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox"])
def test_an_existing_model_on_conversations(
    arch: str,
    tmp_path: Path,
    tiny_model: Callable[[str], PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tiny_model(arch).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    write_conversations(tmp_path)
    best = "{kind: best_of_n, n: 2, score: both, keep: 2, start: initial, args: {max_steps: 2}}"
    update = best if arch == "gpt2" else "{kind: sft, args: {max_steps: 2}}"
    (tmp_path / "chat.yaml").write_text(
        f"""\
name: chat
output_dir: {tmp_path / "runs"}
device: cpu
data: {{card: {tmp_path / "chat.md"}, held_out: 0.2}}
model: {{path: {tmp_path / "model"}, chat_template: {tmp_path / "chat.jinja"}}}
sft: {{enabled: {"true" if arch == "gpt2" else "false"}, args: {{max_steps: 4}}}}
generation: {{max_new_tokens: 24, top_k: 40}}
pairs: {{truncated: keep}}
reward: {{args: {{max_steps: 2}}}}
policy_update: {update}
loop: {{iterations: 1, signs: {{unfit_accuracy: 0.0}}}}
evaluation: {{temperatures: [1.0]}}
"""
    )
    result = train(load_recipe(tmp_path / "chat.yaml"))
    records = stage_records(result.folder)
    assert ("sft" in records) == (arch == "gpt2")
    assert json.loads((result.policy / "config.json").read_text())["model_type"] == arch
    prompt = column(stage_folder(result.folder, "data") / "sft.parquet", "prompt_ids")[0]
    text = tiny_tokenizer.decode(prompt)
    assert text.startswith("<user>What is") and text.endswith("?<assistant>")
    assert metrics(result.folder)["evaluation/1/t1"]["gold"] is None


def test_each_answer_is_kept_with_its_reward(best: Result) -> None:
    """Of the policy that came of the reward, at each temperature; SFT came of none."""
    data = stage_folder(best.folder, "data") / "evaluation.parquet"
    ids = dict(zip(column(data, "prompt"), column(data, "prompt_ids"), strict=True))
    assert best.reward is not None
    reward = RewardModel.from_pretrained(best.reward)
    for name in ("t1", "t0"):
        first, last = (
            [json.loads(line) for line in (best.folder / path).read_text().splitlines()]
            for path in (f"samples/policy-{number}-{name}.jsonl" for number in (0, 1))
        )
        assert not any("reward" in row for row in first)
        prompts = [ids[row["prompt"]] for row in last]
        stage = stage_folder(best.folder, f"samples/evaluation/policy-1/{name}")
        answers = StoredSamples(stage, prompts).completions
        scores = reward.score_ids(prompts, [group[0].token_ids for group in answers])
        assert [row["reward"] for row in last] == pytest.approx(scores.tolist(), abs=1e-5)


def test_tensorboard_gets_the_losses_and_the_numbers_of_the_loop(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = tiny_recipe(tmp_path, "report_to=[tensorboard]", "loop.iterations=1")
    for _ in range(2):  # a rerun sends all of it again, in place of what was sent
        result = train(recipe)
    actual = events.EventAccumulator(str(result.folder / "tensorboard/irl-align"))
    actual.Reload()
    by_step = {}
    for name in ("vitals/kl", "vitals/fresh_accuracy", "reward/held_out/accuracy"):
        by_step[name] = {event.step: event.value for event in actual.Scalars(name)}
        assert len(by_step[name]) == len(actual.Scalars(name))
    records = metrics(result.folder)
    kl = {step: pytest.approx(records[f"vitals/{step}"]["kl"]) for step in (0, 1)}
    assert by_step["vitals/kl"] == kl
    fresh = pytest.approx(records["vitals/1"]["fresh_accuracy"])
    assert by_step["vitals/fresh_accuracy"] == {1: fresh}
    accuracy = pytest.approx(records["reward/0"]["held_out"]["accuracy"])
    assert by_step["reward/held_out/accuracy"] == {1: accuracy}  # of the policy that comes of it
    stages = {path.parent.name for path in tmp_path.rglob("events.out.tfevents.*")}
    assert len(stages - {"irl-align"}) >= 2, stages  # the trainers' own


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_get_a_run_of_the_loops_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With a module in the tracker's place: these two need a server, or their own folder.

    In a process without a trainer: a run that goes on may find all its stages there.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    calls: list[Any] = []
    own = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)),
        finish=lambda: calls.append("finish"),
    )
    opened: list[dict[str, Any]] = []
    module = SimpleNamespace(init=lambda **options: opened.append(options) or own)
    monkeypatch.setitem(sys.modules, name, module)
    recipe = tiny_recipe(tmp_path, f"report_to=[{name}]")
    records = [
        {"key": "vitals/0", "kl": 0.0, "kl_se": None},
        {"key": "pairs/0", "train": {"pairs": 7}},
        {"key": "vitals/1", "kl": 0.25},
        {"key": "evaluation/1/t0.7", "policy": 1, "temperature": 0.7, "metrics": {"bleu": 60.5}},
        {"key": "evaluation/demonstrations", "length": 29.0},
        {"key": "signs/policy-1", "signs": []},
    ]
    with Run.open(tmp_path / "run", {}, "") as run:
        trackers = LoopTrackers(recipe, run)
        trackers.send(records[:2], 0)
        trackers.send(records)
        trackers.send(records)
        trackers.finish()
    (options,) = opened
    assert (options["project"], options["name"]) == ("irl-align", f"{recipe.name}-seed0")
    assert options.get("reinit") == ("create_new" if name == "wandb" else None)
    first = {"pairs/train/pairs": 7, "vitals/kl": 0.25, "evaluation/t0.7/metrics/bleu": 60.5}
    assert calls == [(0, {"vitals/kl": 0.0}), (1, first), "finish"]
