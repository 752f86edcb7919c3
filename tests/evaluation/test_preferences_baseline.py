"""Rewards trained on preferences for comparison, and judges that the policy was trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.preference_rows import CARD, PAIRS, write_pairs
from support.shared_runs import shared_run
from support.tiny_runs import BEST, irl_align, stage_folder, the_line, tiny_recipe

from irl_align.evaluation.preference_tables import preference_notes
from irl_align.reward.settings import read_settings
from irl_align.training.train import Result, train

pytestmark = pytest.mark.timeout(240)
OTHER = CARD.replace("test: {files: pairs.jsonl}, train", "dev: {files: pairs.jsonl}, train")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The card toy of pairs to evaluate, and the card other, of pairs to train on."""
    folder = tmp_path_factory.mktemp("baseline")
    (folder / "toy.md").write_text(CARD)
    write_pairs(folder / "pairs.jsonl", PAIRS)
    (folder / "other.md").write_text(OTHER)
    more = [(p.replace("lion", "fox"), c, r, s, m) for p, c, r, s, m in PAIRS]
    write_pairs(folder / "train.jsonl", more)
    return folder


def run_in_the_store(*overrides: str) -> Result:
    """A tiny run next to the shared ones."""
    return train(tiny_recipe(shared_run("irl").folder.parents[1], *overrides))


@pytest.fixture(scope="module")
def unusual() -> Result:
    """A run without SFT whose reward reads the prompt again, and trains an adapter."""
    return run_in_the_store(
        *BEST,
        "name=unusual",
        "sft.enabled=false",
        "reward.echo=true",
        "reward.lora={r: 2, lora_alpha: 4}",
        "model.from_scratch.max_position_embeddings=256",
        "generation.max_new_tokens=64",
    )


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict[str, Any], str]:
    output = Path(str(arguments[0])).parent / "baseline.json"
    ended = irl_align(capsys, "evaluate", *arguments, "--output", output)
    assert ended.status == 0, ended.err
    return json.loads(output.read_text())["sets"][0], ended.out


def baselines(run: Result) -> set[Path]:
    return set((run.folder.parent / "store").glob("preference-reward-*"))


def settings(stage: Path) -> dict[str, Any]:
    record = json.loads((stage / "stage.json").read_text(encoding="utf-8"))
    return dict(record["settings"])


def test_preference_reward_trained_on_another_card(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, before = shared_run("irl"), baselines(shared_run("irl"))
    arguments = (run.folder, "--card", folder / "toy.md", "--train-set")
    report, out = evaluated(capsys, *arguments, f"{folder / 'other.md'}={folder}")
    assert report["trained_on"] == {
        "card": "other", "split": "train", "pairs": 4, "dropped": 0, "shared_prompts": 2,
    }  # fmt: skip
    assert "toy: the reward on preferences was trained on 4 pairs of other, train" in out
    assert "toy: the reward on preferences was trained on the prompts of 2 of the 4 pairs" in out
    best = report["scorers"]["trained on preferences"]["overall"]["mean"]
    for actual in report["scorers"].values():
        expected = None if best <= 0.5 else (actual["overall"]["mean"] - 0.5) / (best - 0.5)
        assert actual["excess_share"] == expected
    (made,) = baselines(run) - before
    # The same pairs are the same stage, by whichever card and option they come.
    same, _ = evaluated(capsys, *arguments[:3], "--train-split", "train")
    assert baselines(run) == before | {made}
    assert same["scorers"] == report["scorers"]
    # Another --sft is the baselines' alone: the preference reward starts from the run's own model.
    start = stage_folder(run.folder, "start") / "model"
    other, _ = evaluated(capsys, *arguments[:3], "--train-split", "train", "--sft", start)
    name = "trained on preferences"
    assert other["scorers"][name]["overall"] == report["scorers"][name]["overall"]
    assert baselines(run) == before | {made}


def test_preference_notes_say_where_the_excess_share_means_little() -> None:
    trained = {"card": "c", "split": "train", "pairs": 3, "dropped": 2, "shared_prompts": 0}
    own = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 99, "clusters": 50}
    groups = dict[str, Any](subsets={}, axes={}, margins={})
    scorers = {"trained on preferences": {"overall": own, **groups}, "SFT log-prob, mean": groups}
    report = {"card": "toy", "only": None, "dropped": 0, "section_gaps": {}, "seen": 0}
    report |= {"scorers": scorers, "trained_on": trained}
    assert preference_notes(report) == [
        "toy: the reward on preferences was trained on 3 pairs of c, train, 2 too long and left "
        "out",
        "toy: no excess share: the reward on preferences is not above chance itself",
    ]
    own |= {"mean": 0.52, "low": 0.48}
    assert preference_notes(report)[1:] == [
        "toy: the excess share is unreliable: the interval of the reward on preferences includes "
        "chance"
    ]
    own |= {"mean": 0.62, "low": 0.58}
    assert len(preference_notes(report)) == 1


def test_train_set_refuses_bad_combinations(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy, other = folder / "toy.md", folder / "other.md"

    def error_of(source: Path | None, *arguments: object) -> str:
        return the_line(irl_align(capsys, "evaluate", source, "--card", toy, *arguments))

    run = shared_run("irl")
    assert error_of(run.folder, "--train-set", other, "--train-split", "dev") == (
        "--train-set: found 'other, dev', which is evaluated on; expected another"
    )
    assert "found no split 'test', expected one of dev, train" in error_of(
        run.folder, "--train-set", other, "--train-split", "test"
    )
    assert "found a card of demonstrations, expected preferences" in error_of(
        run.folder, "--train-set", "restaurant"
    )
    for source in (run.reward, shared_run("spin").folder, shared_run("sft").folder):
        assert "found no run with an explicit reward" in error_of(source, "--train-set", other)
    long = folder / "long.md"
    long.write_text(CARD.replace("train.jsonl", "long.jsonl"))
    write_pairs(folder / "long.jsonl", [("p", "word " * 300, "no", "b", 1.0)])
    assert error_of(run.folder, "--train-set", long) == (
        "long, train: all 1 pairs to train on are longer than the model's context"
    )


def test_preference_reward_has_the_echo_adapter_and_start_of_the_runs_reward(
    folder: Path, unusual: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    before = baselines(unusual)
    arguments = (unusual.folder, "--card", folder / "toy.md", "--train-split", "train")
    report, _ = evaluated(capsys, *arguments)
    assert "trained on preferences" in report["scorers"]
    (made,) = baselines(unusual) - before
    assert settings(made)["reward"]["echo"] is True
    assert settings(made)["reward"]["lora"]["r"] == 2
    assert (made / "model" / "adapter_config.json").is_file()
    assert read_settings(made / "model").echo
    record = json.loads((made / "stage.json").read_text(encoding="utf-8"))
    stages = json.loads((unusual.folder / "stages.json").read_text(encoding="utf-8"))
    assert "sft" not in stages and record["inputs"]["sft"] == stages["start"]["key"]


def test_echo_leaves_out_pairs_that_are_too_long_with_the_prompt_twice(
    folder: Path, tmp_path: Path, unusual: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prompt fits once with its completions, and not twice."""
    long = "name[the red lion], " * 13
    card = tmp_path / "long.md"
    card.write_text(CARD)
    for name in ("pairs.jsonl", "train.jsonl"):
        rows = [*PAIRS, (f"{long}{name}", "thai food.", "no", "b", 1.0)]
        write_pairs(tmp_path / name, rows if name == "pairs.jsonl" else [*rows[1:], rows[0]])
    plain, _ = evaluated(capsys, shared_run("irl").folder, "--card", card)
    assert plain["dropped"] == 0
    report, out = evaluated(capsys, unusual.folder, "--card", card, "--train-split", "train")
    assert (report["pairs"], report["dropped"]) == (4, 1)
    assert report["trained_on"]["dropped"] == 1 and report["trained_on"]["pairs"] == 4
    assert "4 pairs of long, train, 1 too long and left out" in out


def test_judge_refuses_every_reward_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    run = run_in_the_store(*BEST, "name=twice", "loop.iterations=2")
    for number, which in ((0, "the reward of iteration 1 that"), (1, "the reward that")):
        judge = stage_folder(run.folder, f"reward/{number}") / "model"
        line = the_line(irl_align(capsys, "evaluate", run.folder, "--judge", judge))
        assert line == (
            f"--judge: found {judge}, {which} the policy was trained on; expected another"
        )
