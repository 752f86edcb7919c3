"""Runs with functions of one's own and with ensembles: every policy update, resume, refusals."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import reward_functions
from support.own_card import lines
from support.tiny_runs import (
    BEST,
    irl_align,
    metrics,
    stage_folder,
    stage_records,
    the_line,
    tiny_recipe,
    weights,
    write_recipe,
)

from irl_align.errors import UserError
from irl_align.policy.ppo.trainer import PPOTrainer
from irl_align.reward.model import RewardModel
from irl_align.training.train import Result, train

pytestmark = pytest.mark.timeout(240)
WORDS = "support.reward_functions:words"
PPO = (
    "policy_update={kind: ppo, credit: red, batch_size: 8, episodes: 16, checkpoint_every: 1}",
    "policy_update.held_out_prompts=4",
    "policy_update.missing_eos=ignore",
)
ONLY = ("reward.kind=functions", "reward.args={}", "reward.schedule={}")


@pytest.fixture(scope="module")
def run(tiny_folder: Path) -> Callable[..., Result]:
    """``run(name, *overrides)``: train the tiny recipe under a name."""
    return lambda name, *overrides: train(tiny_recipe(tiny_folder, f"name={name}", *overrides))


def functions(*paths: str) -> str:
    return f"reward.functions=[{', '.join(paths)}]"


def test_functions_only_need_no_pairs_and_move_the_policy(run: Callable[..., Result]) -> None:
    """Best of 4 by the negative number of words: shorter answers, and no reward is fitted."""
    shorter = f"reward.functions=[{{path: '{WORDS}', weight: -1.0}}]"
    result = run("shorter", *ONLY, shorter, "policy_update={use: select, n: 4}")
    roles = stage_records(result.folder)
    assert not [role for role in roles if role.startswith(("pairs", "reward"))]
    assert result.reward is None
    first, last = (metrics(result.folder)[f"vitals/{k}"] for k in (0, 1))
    assert last["reward_parts"][WORDS] < first["reward_parts"][WORDS] - 1.0
    assert last["reward_score"] == pytest.approx(-last["reward_parts"][WORDS])
    assert last["reward_gain"] > 1.0
    assert "fresh" not in last and "outliers" not in last


UPDATES = {
    "sft": BEST,
    "dpo": (*BEST, "policy_update.use=dpo"),
    "select": ("policy_update.use=select",),
    "ppo": PPO,
}
HALF = f"reward.functions=[{{path: '{WORDS}', weight: 0.5}}]"


@pytest.mark.parametrize("name", UPDATES)
def test_functions_beside_a_learned_reward(run: Callable[..., Result], name: str) -> None:
    update = UPDATES[name]
    result = run(f"{name}-beside", *update, HALF)
    assert result.reward is not None
    records = metrics(result.folder)
    vitals = records["vitals/1"]
    parts = vitals["reward_parts"]
    assert set(parts) == {"learned", WORDS}
    assert vitals["reward_score"] == pytest.approx(parts["learned"] + 0.5 * parts[WORDS])
    # What is measured on pairs is what was fitted on them, as in the same run without functions.
    plain = run(f"{name}-without", *update)
    assert records["reward/0"] == metrics(plain.folder)["reward/0"]
    assert stage_folder(result.folder, "reward/0") == stage_folder(plain.folder, "reward/0")
    changed = [r for r in stage_records(result.folder) if r in ("policy-1", "candidate-rewards/0")]
    for role in changed:
        assert stage_folder(result.folder, role) != stage_folder(plain.folder, role)


def test_functions_get_the_rows_columns(tmp_path: Path, run: Callable[..., Result]) -> None:
    rows = [{"q": f"count {i % 20}", "a": f"it is {i}.", "answer": i % 20} for i in range(60)]
    (tmp_path / "demos.jsonl").write_text(lines(rows))
    card = tmp_path / "own.md"
    card.write_text(
        "---\nirl_align:\n  kind: demonstrations\n  extra: [answer]\n  template: '{prompt}:'\n"
        "  splits: {train: {files: demos.jsonl}, validation: {from: train, share: 0.2}}\n"
        "  columns: {prompt: q, completion: a}\n---\n"
    )
    reward_functions.seen.clear()
    named = functions("support.reward_functions:recorded")
    out = f"output_dir={tmp_path / 'runs'}"
    update = "policy_update={use: select, n: 2}"
    own = (f"data.card={card}", "data.task={}", out, *ONLY, named, update)
    train(tiny_recipe(tmp_path, "sft.args={max_steps: 1}", *own))
    call = reward_functions.seen[0]  # before any training
    assert len(call["prompts"]) == 2
    for call in reward_functions.seen:
        for prompt, answer, shown in zip(
            call["prompts"], call["answer"], call["demonstrations"], strict=True
        ):
            assert prompt == f"count {answer}"
            assert shown == [f"it is {i}." for i in range(60) if i % 20 == answer]
    assert call["completion_ids"] and isinstance(call["completions"][0], str)

    # The values belong to the key: other answers give other rewards.
    (tmp_path / "demos.jsonl").write_text(lines({**row, "answer": 1} for row in rows))
    before = stage_records(tmp_path / "runs/tiny-seed0")["vitals/1"]["key"]
    again = train(tiny_recipe(tmp_path, "name=other", "sft.args={max_steps: 1}", *own))
    assert stage_records(again.folder)["vitals/1"]["key"] != before

    (tmp_path / "demos.jsonl").write_text(lines({**row, "answer": i} for i, row in enumerate(rows)))
    with pytest.raises(UserError, match="extra: answer has two values in the rows of one prompt"):
        train(tiny_recipe(tmp_path, "name=third", *own))


@pytest.mark.parametrize("kind", ["heads", "models"])
def test_ensembles_are_fitted_scored_and_reported(run: Callable[..., Result], kind: str) -> None:
    ensemble = f"reward.ensemble={{members: 2, kind: {kind}, penalty: 0.5}}"
    result = run(kind, *BEST, ensemble, "loop.iterations=2", "reward.init=warm")
    record = metrics(result.folder)
    assert record["vitals/2"]["reward_parts"]["deviation"] > 0.0
    assert record["reward/1"]["held_out"]["accuracy"] > 0.0
    mean, _ = record["reward-fit/0"]["demonstration_scores"]
    assert np.isfinite(mean)
    assert result.reward is not None
    if kind == "heads":
        heads = RewardModel.from_pretrained(result.reward).model.score.weight
        assert heads.shape[0] == 2 and not np.allclose(*heads.detach().numpy())
    else:
        one, two = (weights(result.reward / f"member-{i}") for i in range(2))
        assert one != two


def test_ensemble_of_heads_is_exported_as_their_mean(
    run: Callable[..., Result], tmp_path: Path, capsys: Any
) -> None:
    result = run("mean", *BEST, "reward.ensemble={members: 3}")
    ended = irl_align(capsys, "export", result.folder, "--to", tmp_path / "reward")
    assert ended.status == 0, ended.err
    exported = RewardModel.from_pretrained(tmp_path / "reward")
    assert result.reward is not None
    own = RewardModel.from_pretrained(result.reward)
    texts = ["a cheap pub"], ["It is cheap."]
    assert exported.model.config.num_labels == 1
    assert exported.score(*texts).tolist() == pytest.approx(own.score(*texts).tolist(), abs=1e-4)
    assert "3 heads" in (tmp_path / "reward/README.md").read_text()

    for name, ensemble, message in (
        ("heads", "{members: 2, kind: heads, penalty: 0.5}", "an ensemble with penalty 0.5"),
        ("models", "{members: 2, kind: models, penalty: 0.5}", "an ensemble of 2 models"),
    ):
        two = ("loop.iterations=2", "reward.init=warm")
        result = run(name, *BEST, f"reward.ensemble={ensemble}", *two)
        ended = irl_align(capsys, "export", result.folder, "--to", tmp_path / name)
        assert message in the_line(ended) and not (tmp_path / name).exists()


def test_score_and_generate_use_functions(
    run: Callable[..., Result], tmp_path: Path, capsys: Any
) -> None:
    rows = [{"prompt": "a cheap pub", "completion": text} for text in ("one", "one two three")]
    (tmp_path / "rows.jsonl").write_text(lines(rows))

    def scores(result: Result) -> list[float]:
        arguments = ("--input", tmp_path / "rows.jsonl", "--output", tmp_path / "out.jsonl")
        ended = irl_align(capsys, "score", result.folder, *arguments)
        assert ended.status == 0, ended.err
        return [json.loads(line)["score"] for line in (tmp_path / "out.jsonl").open()]

    shorter = f"reward.functions=[{{path: '{WORDS}', weight: -1.0}}]"
    only = run("shorter", *ONLY, shorter, "policy_update={use: select, n: 4}")
    assert scores(only) == pytest.approx([-1.0, -3.0])
    plain = run("select-without", *UPDATES["select"])
    beside = run("select-beside", *UPDATES["select"], HALF)
    expected = [a + 0.5 * b for a, b in zip(scores(plain), (1.0, 3.0), strict=True)]
    assert scores(beside) == pytest.approx(expected, abs=1e-5)

    (tmp_path / "prompts.jsonl").write_text(lines([{"prompt": "a cheap pub"}]))
    arguments = ("--input", tmp_path / "prompts.jsonl", "--output", tmp_path / "drawn.jsonl")
    for result in (only, beside):
        ended = irl_align(capsys, "generate", result.folder, *arguments, "--seed", 1)
        assert ended.status == 0, ended.err


def test_show_lists_the_parts_of_the_reward(run: Callable[..., Result], capsys: Any) -> None:
    result = run("select-beside", *UPDATES["select"], HALF)
    shown = " ".join(irl_align(capsys, "show", result.folder).out.split())  # titles are wrapped
    assert "parts, each without its weight" in shown and "learned" in shown and "words" in shown


REFUSED = [
    (functions("no_such_module:f"), "reward.functions: cannot import no_such_module:f"),
    (functions("support.reward_functions:raises"), "raised ZeroDivisionError: no words"),
    (functions("support.reward_functions:one_short"), "returned 1 values, expected a list of 2"),
    (functions("support.reward_functions:text"), "returned 'good' for completion 0"),
    (functions("support.reward_functions:nan"), "returned nan for completion 0"),
    (functions("words"), "found 'words', expected string that matches"),
    (functions(WORDS, WORDS), f"functions: {WORDS} is given twice"),
    ("reward.ensemble={members: 1}", "found 1, expected integer at least 2"),
    ("reward.ensemble={members: 2, penalty: .inf}", "found '.inf', expected a finite number"),
    (
        f"reward.functions=[{{path: '{WORDS}', weight: .nan}}]",
        "found '.nan', expected a finite number",
    ),
    ("reward={kind: functions}", "kind functions needs functions: give [module:callable]"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_train_refuses_before_any_work(
    tmp_path: Path, capsys: Any, override: str, message: str
) -> None:
    out = f"output_dir={tmp_path / 'runs'}"
    line = the_line(irl_align(capsys, "train", write_recipe(tmp_path), out, override))
    assert message in line
    store = tmp_path / "runs/store"
    assert not list(store.glob("sft-*"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("policy_update={kind: sft}",), "policy_update.kind sft does not read reward.functions"),
        ((*PPO, *ONLY), "credit red distributes the learned part of a reward"),
        ((*PPO, "policy_update.critic_init=reward"), "functions does not go with .*critic_init"),
        ((*ONLY, "loop.pick=nearest"), "loop.pick nearest needs a learned reward"),
        (("reward.kind=none", "policy_update={kind: sft}"), "functions is an option of kind"),
    ],
)
def test_recipe_refuses_functions_that_have_no_effect(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    plain = () if ONLY[0] in overrides or "reward.kind=none" not in overrides else ONLY[1:]
    with pytest.raises(UserError, match=message):
        tiny_recipe(tmp_path, *overrides, *plain, functions(WORDS))


def test_a_function_that_fails_in_ppo_loses_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    """Its error stops the run at the second update; the next try resumes from the checkpoint."""
    (tmp_path / "flaky_rewards.py").write_text(
        "import os\n"
        "def f(completions, **columns):\n"
        "    if os.environ.get('FLAKY') == '1' and len(completions) == 8:\n"
        "        raise RuntimeError('the judge is down')\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    runs: dict[str, bytes] = {}
    update = PPOTrainer._update
    for name in ("undisturbed", "resumed"):
        (tmp_path / name).mkdir()
        recipe = tiny_recipe(tmp_path / name, *PPO, functions("flaky_rewards:f"))

        def fails_at_the_second(self: Any, number: int) -> Any:
            if number == 1:
                monkeypatch.setenv("FLAKY", "1")
            return update(self, number)

        if name == "resumed":
            with monkeypatch.context() as patch:
                patch.setattr(PPOTrainer, "_update", fails_at_the_second)
                with pytest.raises(UserError, match="flaky_rewards:f raised RuntimeError: the jud"):
                    train(recipe)
            monkeypatch.delenv("FLAKY")
        result = train(recipe)
        runs[name] = weights(result.policy)
    assert stage_records(result.folder)["policy-1"]["resumed"]
    assert runs["undisturbed"] == runs["resumed"]


def test_a_changed_function_is_not_taken_for_the_old_one(
    tiny_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    source = tmp_path / "changing_rewards.py"
    monkeypatch.syspath_prepend(tmp_path)

    def trained(text: str) -> Result:
        source.write_text(f"def f(completions, **columns):\n    return {text}\n")
        sys.modules.pop("changing_rewards", None)
        update = "policy_update={use: select, n: 2}"
        named = functions("changing_rewards:f")
        recipe = tiny_recipe(tiny_folder, "name=changing", *ONLY, named, update)
        return train(recipe, replace=True)

    first = metrics(trained("[1.0] * len(completions)").folder)["vitals/1"]
    second = metrics(trained("[-1.5] * len(completions)").folder)["vitals/1"]
    assert (first["reward_score"], second["reward_score"]) == (1.0, -1.5)
