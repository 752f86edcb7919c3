"""`irl-align evaluate`: accuracies on preference sets, compared with numbers by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.chat_templates import chat_tokenizer
from support.classifiers import card_score, one_label_classifier
from support.preference_rows import CARD, PAIRS, write_pairs
from support.rows import save
from support.shared_runs import shared_run
from support.tiny_runs import irl_align, stage_folder, the_line
from transformers import AutoModelForCausalLM, AutoTokenizer

from irl_align.data.columns import read_parquet
from irl_align.evaluation import preferences
from irl_align.evaluation.evaluate import IDENTITY, merged
from irl_align.evaluation.inference import score_rows
from irl_align.evaluation.preference_data import load_set
from irl_align.evaluation.preference_tables import (
    PairSet,
    excess_share,
    preference_report,
    preference_report_tables,
)
from irl_align.reward.foreign import load_text_reward
from irl_align.reward.model import RewardModel
from irl_align.training.train import Result

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "toy.md").write_text(CARD)
    write_pairs(folder / "pairs.jsonl", PAIRS)
    more = [(p.replace("the", "a"), c, r, s, m) for p, c, r, s, m in PAIRS]
    write_pairs(folder / "train.jsonl", more)
    return folder


@pytest.fixture(scope="module")
def run() -> Result:
    return shared_run("irl")


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    output = Path(str(arguments[0])).parent / "evaluation.json"
    ended = irl_align(capsys, "evaluate", *arguments, "--output", output)
    assert ended.status == 0, ended.err
    (report,) = json.loads(output.read_text())["sets"]
    return report


def test_evaluate_compares_a_reward_with_baselines(
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
    scored = score_rows(run.reward, rows, "cpu")[1]
    assert scored is not None and accuracy["reward"] == scored.mean
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


def test_evaluate_reports_pairs_whose_prompts_the_run_was_trained_on_apart(
    run: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = read_parquet(stage_folder(run.folder, "data") / "sft.parquet")["prompt"][0]
    (tmp_path / "toy.md").write_text(CARD)
    write_pairs(tmp_path / "pairs.jsonl", [*PAIRS, (trained, "a a", "a", "b", 1.0)])
    output = tmp_path / "evaluation.json"
    ended = irl_align(
        capsys, "evaluate", run.folder, "--card", tmp_path / "toy.md", "--output", output
    )
    (report,) = json.loads(output.read_text())["sets"]
    groups = report["scorers"]["longer wins"]["axes"]["prompts of the run's training"]
    assert {name: (one["mean"], one["n"]) for name, one in groups.items()} == {
        "seen": (1.0, 1),
        "unseen": (0.75, 4),
    }
    assert "1 of 5 pairs have a prompt that the run was trained on" in " ".join(ended.out.split())


def test_evaluate_compares_an_implicit_reward_with_other_rewards(
    run: Result, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spin = shared_run("spin")
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


def test_margins_of_a_log_ratio_are_those_of_its_models(folder: Path) -> None:
    """Without a reference they are the margins of the log-prob; a model against itself ties."""
    sft = shared_run("sft").policy
    ratios = {
        "mean": preferences.Implicit(sft, (), mean=True),
        "sum": preferences.Implicit(sft, ()),
        "half": preferences.Implicit(sft, ((0.5, sft),)),
        "nothing": preferences.Implicit(sft, ((0.25, sft), (0.75, sft))),
    }
    scorers = preferences.Scorers(ratios, sft)
    report = preferences.evaluate_preferences(scorers, load_set(str(folder / "toy.md")))
    overall = {name: scorer["overall"] for name, scorer in report["scorers"].items()}
    assert overall["mean"] == overall["SFT log-prob, mean"]
    assert overall["sum"] == overall["half"] == overall["SFT log-prob, sum"]
    assert overall["nothing"]["mean"] == 0.5


def test_train_split_trains_a_reward_once(
    run: Result, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (run.folder, "--card", folder / "toy.md", "--train-split", "train")
    report = evaluated(capsys, *arguments)
    trained = report["scorers"]["trained on preferences"]
    best = trained["overall"]["mean"]
    for actual in report["scorers"].values():
        expected = None if best <= 0.5 else (actual["overall"]["mean"] - 0.5) / (best - 0.5)
        assert actual["excess_share"] == expected
    stages = set((run.folder.parent / "store").glob("preference-reward-*"))
    assert evaluated(capsys, *arguments) == report
    assert set((run.folder.parent / "store").glob("preference-reward-*")) == stages


def test_evaluate_scores_a_text_of_several_pairs_once(
    run: Result, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    score_ids, completion_logprobs = RewardModel.score_ids, preferences.completion_logprobs

    def scoring(self: RewardModel, prompts: Any, completions: Any, *rest: Any) -> torch.Tensor:
        read.append(len(completions))
        return score_ids(self, prompts, completions, *rest)

    def logprobs(model: Any, prompts: Any, completions: Any, **rest: Any) -> Any:
        read.append(len(completions))
        return completion_logprobs(model, prompts, completions, **rest)

    monkeypatch.setattr(RewardModel, "score_ids", scoring)
    monkeypatch.setattr(preferences, "completion_logprobs", logprobs)
    once = evaluated(capsys, run.folder, "--card", folder / "toy.md")
    texts = {(p, text) for p, chosen, rejected, *_ in PAIRS for text in (chosen, rejected)}
    assert read == [len(texts)] * 2
    # Every pair again, and once with the other side preferred: of three, two are won as before.
    other = [(p, rejected, chosen, s, m) for p, chosen, rejected, s, m in PAIRS]
    again = folder / "again"
    again.mkdir()
    write_pairs(again / "pairs.jsonl", [*PAIRS, *other, *reversed(PAIRS)])
    more = evaluated(capsys, run.folder, "--card", f"{folder / 'toy.md'}={again}")
    assert read == [len(texts)] * 4
    for name, actual in more["scorers"].items():
        won = once["scorers"][name]["overall"]["mean"]
        assert actual["overall"]["mean"] == pytest.approx((2 * won + (1 - won)) / 3), name


def test_evaluate_refuses_bad_input(
    run: Result, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error_of(*arguments: object) -> str:
        return the_line(irl_align(capsys, "evaluate", *arguments))

    toy = folder / "toy.md"
    assert "config.json: found no such file" in error_of(tmp_path, "--card", toy)
    assert "needs --sft" in error_of(run.policy, "--card", toy)
    assert "found no split 'dev', expected one of test, train" in error_of(
        run.folder, "--card", toy, "--split", "dev"
    )
    assert "which is evaluated on" in error_of(run.folder, "--card", toy, "--train-split", "test")
    assert "found no run with an explicit reward" in error_of(
        run.reward, "--card", toy, "--train-split", "train"
    )
    assert "found a card of demonstrations, expected preferences" in error_of(
        run.folder, "--card", "restaurant"
    )
    equal = tmp_path / "equal.md"
    equal.write_text(CARD)
    write_pairs(tmp_path / "pairs.jsonl", [("p", "same", "same", "a", 1.0)])
    assert "chosen and rejected are the same text" in error_of(run.folder, "--card", equal)


def test_evaluate_leaves_out_and_counts_pairs_that_are_too_long(
    run: Result, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "long.md"
    card.write_text(CARD)
    write_pairs(tmp_path / "pairs.jsonl", [*PAIRS, ("p", "word " * 300, "no", "b", 1.0)])
    assert evaluated(capsys, run.folder, "--card", card)["dropped"] == 1
    write_pairs(tmp_path / "pairs.jsonl", [("p", "word " * 300, "no", "b", 1.0)])
    line = the_line(irl_align(capsys, "evaluate", run.folder, "--card", card))
    assert line == "long: all 1 pairs are longer than the models' context"


def evaluation(
    capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[dict[str, Any], str]:
    """The only set's report, and what was printed."""
    output = Path(str(arguments[0])).parent / "evaluation.json"
    ended = irl_align(capsys, "evaluate", *arguments, "--output", output)
    assert ended.status == 0, ended.err
    return json.loads(output.read_text())["sets"][0], ended.out


JOINED = CARD.replace("subset: axis", "subset: domain+axis")
AXES = [
    {"prompt": f"name[{i}]", "chosen": "longer text" if long else "a", "rejected": "text",
     "domain": domain, "axis": axis, "margin": 1.0}
    for i, (domain, axis, long) in enumerate(
        [("food", "quality", True), ("food", "quality", True), ("food", "naturalness", False),
         ("rooms", "naturalness", False), ("rooms", "quality", True)]
    )
]  # fmt: skip


@pytest.fixture
def joined(tmp_path: Path) -> Path:
    """A card whose subset is two columns together."""
    (tmp_path / "joined.md").write_text(JOINED)
    rows = [json.dumps(row) + "\n" for row in AXES]
    (tmp_path / "pairs.jsonl").write_text("".join(rows), encoding="utf-8")
    return tmp_path / "joined.md"


def test_evaluate_reports_accuracy_by_each_column_of_the_subset(
    run: Result, joined: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, out = evaluation(capsys, run.folder, "--card", joined)
    for actual in report["scorers"].values():
        assert list(actual["axes"]) == ["domain", "axis"]
        assert list(actual["subsets"]) == [
            "food/naturalness", "food/quality", "rooms/naturalness", "rooms/quality"
        ]  # fmt: skip
    longer = report["scorers"]["longer wins"]["axes"]
    assert {k: (v["mean"], v["n"]) for k, v in longer["axis"].items()} == {
        "naturalness": (0.0, 2),
        "quality": (1.0, 3),
    }
    assert {k: v["n"] for k, v in longer["domain"].items()} == {"food": 3, "rooms": 2}
    by_axis = next(grid for grid in preference_report_tables(report) if ", by axis:" in grid.title)
    assert [column.name for column in by_axis.columns] == ["group", *report["scorers"]]
    shown = {row[0]: row[-1].rpartition(" ")[2] for row in by_axis.texts()}
    assert shown == {"naturalness": "n=2", "quality": "n=3"}
    assert "accuracies over fewer than 30 prompts (the fewest: 1)" in " ".join(out.split())
    assert "joined, by axis: accuracy %" in out and "joined, by domain: accuracy %" in out


def test_subset_restricts_a_set(
    run: Result, joined: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def pairs(*names: str) -> int:
        options = [word for name in names for word in ("--subset", name)]
        report, _ = evaluation(capsys, run.folder, "--card", joined, *options)
        assert report["only"] == list(dict.fromkeys(names))
        return int(report["pairs"])

    assert pairs("food/quality") == 2
    assert pairs("quality") == 3
    assert pairs("food/quality", "rooms/naturalness", "food/quality") == 3
    assert pairs("rooms", "quality") == 4  # of either
    line = the_line(
        irl_align(capsys, "evaluate", run.folder, "--card", joined, "--subset", "speed")
    )
    assert line == (
        "--subset: joined, test: found no subset 'speed', expected one of food/naturalness, "
        "food/quality, rooms/naturalness, rooms/quality, food, rooms, naturalness, quality"
    )


def test_merged_keeps_a_part_of_a_set_next_to_the_whole() -> None:
    before = {
        "sets": [{"card": "toy", "split": "test", "only": None, "pairs": 9}],
        "best_of": None,
    }
    part = {"card": "toy", "split": "test", "only": ["b"]}
    whole = {"card": "toy", "split": "test", "only": None, "pairs": 4}
    empty = {section: [] for section in IDENTITY} | {"best_of": None}
    assert merged(before, empty | {"sets": [part]})["sets"] == [*before["sets"], part]
    assert merged(before, empty | {"sets": [whole]})["sets"] == [whole]


def test_subset_refuses_a_set_without_subsets(
    run: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bare.md").write_text(CARD.replace("subset: axis, ", ""))
    write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    card = tmp_path / "bare.md"
    line = the_line(irl_align(capsys, "evaluate", run.folder, "--card", card, "--subset", "b"))
    assert line == "--subset: bare, test: found no subset 'b', and it has no subsets"


def test_beside_scores_spin_by_its_implicit_reward(
    run: Result, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spin, toy = shared_run("spin"), folder / "toy.md"
    report = evaluated(capsys, run.folder, "--card", toy, "--beside", spin.folder)
    assert list(report["scorers"])[:3] == ["reward", "spin-seed0", "longer wins"]
    alone = evaluated(capsys, spin.folder, "--card", toy)
    assert report["scorers"]["spin-seed0"] == alone["scorers"]["implicit reward"]
    for beside, expected in (
        (shared_run("sft").folder, "this run has no reward"),
        (spin.policy, "found a language model, expected a run or a reward"),
    ):
        ended = irl_align(capsys, "evaluate", run.folder, "--card", toy, "--beside", beside)
        line = the_line(ended)
        assert line.startswith(f"--beside: {beside}: ") and expected in line  # fmt: skip


def test_beside_gives_every_reward_a_name_of_its_own(
    run: Result, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.reward is not None
    named = tmp_path / "longer wins"
    named.symlink_to(run.reward, target_is_directory=True)
    report = evaluated(capsys, run.folder, "--card", folder / "toy.md", "--beside", named)
    assert list(report["scorers"])[:3] == ["reward", "longer wins 2", "longer wins"]
    assert report["scorers"]["longer wins"]["overall"]["mean"] == 0.75


def test_evaluate_of_a_reward_without_sft_says_what_is_missing(
    run: Result, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = "toy: no log-prob baselines, since a reward's folder names no SFT model: give --sft"
    report, out = evaluation(capsys, run.reward, "--card", folder / "toy.md")
    assert list(report["scorers"]) == ["reward", "longer wins", "shorter wins"]
    assert note in out.splitlines()
    sft = stage_folder(run.folder, "sft") / "model"
    report, out = evaluation(capsys, run.reward, "--card", folder / "toy.md", "--sft", sft)
    assert "SFT log-prob, mean" in report["scorers"] and note not in out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ("--judge", "x", "--train-split", "train", "--beside", "y", "--subset", "a"),
            "found --subset, --train-split, --beside without --card, which",
        ),
        (("--best-of", 4, "--split", "dev", "--sft", "x"), "found --split, --sft without --card,"),
        (("--best-of", 4, "--train-set", "toy"), "found --train-set without --card,"),
        (("--judge", "x", "--backend", "auto"), "found --backend without --best-of, which"),
        (
            ("--judge", "x", "--prompts", 4),
            "found --prompts without --best-of or a judge's address, which",
        ),
        (
            ("--card", "toy", "--lm-eval-tasks", "x", "--lm-eval-limit", 3, "--prompts", 2),
            "a judge's address; --lm-eval-tasks, --lm-eval-limit without --lm-eval, which",
        ),
        (("--judge", "x", "--judge-timeout", 3), "--judge-timeout: found no address of a judge"),
    ],
)
def test_evaluate_refuses_options_that_nothing_reads(
    run: Result, options: tuple[Any, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in the_line(irl_align(capsys, "evaluate", run.folder, *options))


def pair_set(subsets: list[str], margins: list[float | None]) -> PairSet:
    prompts = [str(i) for i in range(len(subsets))]
    return PairSet("toy", "test", prompts, subsets, margins)


def test_preference_report_counts_ties_as_half_and_splits_margins_in_thirds() -> None:
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
    (overall, by_margin, against) = preference_report_tables(report)
    assert overall.texts()[0][0] == "reward" and overall.texts()[0][3] == "25.0"
    assert [row[0] for row in by_margin.texts()] == list(reward["margins"])
    assert against.texts()[0][:3] == ["reward", "longer wins", "-50.0"]


def test_excess_share_is_relative_to_the_preference_reward() -> None:
    assert excess_share(0.6, 0.7) == pytest.approx(0.5)
    assert excess_share(0.45, 0.75) == pytest.approx(-0.2)
    assert excess_share(0.9, 0.5) is None


def test_evaluate_of_another_projects_reward_reads_its_chat_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its margins are those of the conversations that its model card scores."""
    tokenizer = chat_tokenizer("zephyr")
    plain = one_label_classifier(tokenizer)
    reward = save(plain, tokenizer, tmp_path / "theirs")
    (tmp_path / "toy.md").write_text(CARD)
    write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    report, _ = evaluation(capsys, reward, "--card", tmp_path / "toy.md")
    wins = [
        card_score(plain, tokenizer, prompt, chosen)
        > card_score(plain, tokenizer, prompt, rejected)
        for prompt, chosen, rejected, _, _ in PAIRS
    ]
    assert report["scorers"]["reward"]["overall"]["mean"] == pytest.approx(sum(wins) / len(wins))
    options = ("--card", tmp_path / "toy.md", "--template", "{prompt}")
    report, _ = evaluation(capsys, reward, *options)
    text = load_text_reward(reward, template="{prompt}")
    margins = [float(text.score([p], [a]) - text.score([p], [b])) for p, a, b, _, _ in PAIRS]
    assert report["scorers"]["reward"]["overall"]["mean"] == pytest.approx(
        sum(margin > 0 for margin in margins) / len(margins)
    )
