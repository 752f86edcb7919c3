"""Comparisons of runs, on run folders written by hand."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.synthetic_runs import synthetic_recipe, synthetic_run

from irl_align.cli.show import show_comparison
from irl_align.errors import UserError
from irl_align.evaluation.compare.aggregate import AnalysisOptions, analyse, compare_runs
from irl_align.evaluation.compare.costs import sharing
from irl_align.evaluation.compare.run_tables import policy_tables
from irl_align.evaluation.compare.tables import (
    comparison_tables,
    headline_measures,
    notes,
    to_csv,
    to_markdown,
)
from irl_align.training.run_folder import Run, RunView


def views(*folders: Path) -> list[RunView]:
    return [Run.load(folder) for folder in folders]


def three_seeds(root: Path) -> list[RunView]:
    """SFT at 30%, 31%, 32%; `good` 10 points below it in every seed, `even` about as good."""
    folders = []
    for seed, start in enumerate((0.30, 0.31, 0.32), 1):
        for name, change in (("good", -0.10), ("even", 0.01 * (-1) ** seed)):
            errors = [(start, start / 2), (start + change, start / 2)]
            folders.append(synthetic_run(root, name, seed, errors))
    return views(*folders)


def test_results_on_unseen_and_seen_prompts_are_apart(tmp_path: Path) -> None:
    folders = []
    for seed in (1, 2, 3):
        run = synthetic_run(tmp_path, "m", seed, [(0.3, 0.2), (0.2, 0.1)])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for record in lines:
            if record["key"] in ("evaluation/0/t1", "evaluation/1/t1"):
                value = record["metrics"]["slot_error_rate"]
                for part, change in (("unseen", 0.05), ("seen", -0.1)):
                    own = {"slot_error_rate": value + change + 0.01 * seed}
                    record[part] = {"prompts": 10, "metrics": own}
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folders.append(run)
    analysis = analyse(compare_runs(views(*folders)))
    (table,) = [t for t in comparison_tables(analysis) if t.title.startswith("results, unseen")]
    names = ["slot error rate, unseen % T=1", "slot error rate, seen % T=1"]
    assert [column.name for column in table.columns] == ["policy", *names]
    assert table.texts()[-1] == ["m", "27.0±2.5", "12.0±2.5"]
    assert analysis["lower_is_better"]["slot_error_rate/unseen@1"] is True
    (shown,) = [t for t in policy_tables(views(folders[0])) if t.title.startswith("results, unse")]
    assert shown.texts()[-1] == ["m 1", "10", "10", "26.0%", "11.0%"]
    assert not any(
        table.title.startswith("results, unseen")
        for table in comparison_tables(analyse(compare_runs(three_seeds(tmp_path / "other"))))
    )


def row(analysis: dict[str, Any], label: str) -> dict[str, Any]:
    (actual,) = [r for r in analysis["rows"] if r["label"] == label]
    return actual


def test_methods_by_seeds(tmp_path: Path) -> None:
    analysis = analyse(compare_runs(three_seeds(tmp_path)))
    assert [r["label"] for r in analysis["rows"]] == ["demonstrations", "SFT", "good", "even"]
    assert (analysis["baseline"], analysis["ranked_by"]) == ("SFT", "slot_error_rate@1")
    good = row(analysis, "good")
    # Means of 0.20, 0.21, 0.22; s = 0.01; t = 4.302653.
    half = 4.302653 * 0.01 / 3**0.5
    assert good["estimates"]["slot_error_rate@1"] == pytest.approx(
        {"mean": 0.21, "low": 0.21 - half, "high": 0.21 + half, "n": 3, "clusters": None},
        abs=1e-6,
    )
    against = good["against_baseline"]["slot_error_rate@1"]
    assert against["mean"] == pytest.approx(-0.10)
    assert against["probability_of_improvement"]["mean"] == 1.0
    assert against["p_sign_flip"] == 0.25  # two of the eight signs
    even = row(analysis, "even")["against_baseline"]["slot_error_rate@1"]
    assert even["mean"] == pytest.approx(-0.01 / 3)
    assert even["p_t"] > 0.5
    assert good["against_baseline"]["slot_error_rate@0"]["p_t"] == 1.0
    assert [r["label"] for r in analysis["ranking"]] == ["good", "even", "SFT"]
    assert analysis["ranking"][0]["beats_next"]["mean"] == 1.0
    assert "against_baseline" in good and row(analysis, "SFT")["against_baseline"] == {}


def test_stages_that_runs_share_are_paid_once(tmp_path: Path) -> None:
    # Of each of three seeds: SFT (100 s) and two updates (10 s), against twice SFT and an update.
    runs = three_seeds(tmp_path)
    assert sharing(runs) == (3 * 120.0, 3 * 2 * 110.0)
    analysis = analyse(compare_runs(runs))
    assert row(analysis, "good")["estimates"]["seconds"]["mean"] == 110.0
    assert "stages: 360 s together, 660 s if each run shared none (55%)" in notes(analysis)


def test_costs_by_part_and_iteration(tmp_path: Path) -> None:
    stage = {"stage": "samples", "reused": False, "peak_rss_mib": 700.0}
    extra = {
        "stage/samples/train/policy-0/t1": {**stage, "stage_key": "x", "seconds": 5.0},
        "stage/reward/0": {**stage, "stage_key": "y", "seconds": 15.0},
        "stage/samples/evaluation/policy-1/t1": {**stage, "stage_key": "z", "seconds": 2.0},
    }
    errors = [(0.3, 0.2), (0.2, 0.1)]
    runs = [
        synthetic_run(tmp_path, "a", 1, errors, extra=extra),
        synthetic_run(tmp_path, "b", 1, errors),
    ]
    analysis = analyse(compare_runs(views(*runs)))
    (grid,) = [g for g in comparison_tables(analysis) if g.title.startswith("seconds")]
    assert [c.name for c in grid.columns[1:]] == [
        "SFT", "samples and pairs", "reward", "policy step", "measuring",
        "total", "per iteration", "relative", "peak MiB",
    ]  # fmt: skip
    assert grid.texts() == [
        ["a", "100", "5", "15", "10", "2", "132", "30", "1.00", "700"],
        ["b", "100", "-", "-", "10", "-", "110", "10", "0.33", "512"],
    ]


def test_memory_and_tokens_by_part_and_iteration(tmp_path: Path) -> None:
    """Two seeds of two iterations; one stage went on after a stop."""
    runs = []
    for seed in (1, 2):
        extra = {}
        for k in (0, 1):
            stage = {"stage": "reward", "reused": False, "stage_key": f"r{k}-{seed}"}
            extra[f"stage/reward/{k}"] = {
                **stage,
                "seconds": 10.0 * (k + 1),
                "peak_rss_mib": 100.0 * seed + 10 * k,
                "tokens_trained": 4000 * (k + 1) * seed,
                "resumed": (k, seed) == (1, 2),
            }
        errors = [(0.3, 0.2), (0.2, 0.1), (0.2, 0.1)]
        runs.append(synthetic_run(tmp_path, "m", seed, errors, extra=extra))
    analysis = analyse(compare_runs(views(*runs)))
    actual = {g.title.partition(",")[0].partition(" (")[0]: g for g in comparison_tables(analysis)}
    memory = actual["peak MiB by part"]
    assert [c.name for c in memory.columns] == ["policy", "SFT", "reward", "policy step"]
    assert memory.texts() == [["m", "512", "210", "512"]]
    tokens = actual["thousands of tokens by part"]
    assert ([c.name for c in tokens.columns], tokens.texts()) == (
        ["policy", "reward trained"],
        [["m", "18"]],
    )
    assert actual["by iteration"].texts() == [
        ["m, iteration 0", "20", "6", "-", "512"],
        ["m, iteration 1", "30", "12", "-", "512"],
    ]
    message = "stages that resumed after a stop; their seconds cover the last attempt only: m 1"
    assert message in notes(analysis)
    stored = json.loads(json.dumps(analysis))  # as the report reads it
    assert [g.texts() for g in comparison_tables(stored)] == [
        g.texts() for g in comparison_tables(analysis)
    ]


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path, "one", 7, [(0.3, 0.1), (0.2, 0.1)])
    analysis = analyse(compare_runs(views(run)))
    assert analysis["interval"] is None
    assert "one seed (7): there are no intervals and no tests" in notes(analysis)
    text = to_markdown(analysis)
    assert "±" not in text and "| one | 20.0 | 10.0 |" in text
    (against,) = [g for g in comparison_tables(analysis) if g.title.startswith("against")]
    assert [line[2:] for line in against.texts()] == [
        ["-10.0", "-", "-", "-"],
        ["+0.0", "-", "-", "-"],
    ]


def test_what_is_beyond_entropy(tmp_path: Path) -> None:
    """Each seed's policy less the first policy at its entropy; no column of gold, no ranking."""
    folders = []
    for seed, (own, first) in enumerate(((0.20, 0.25), (0.22, 0.25), (0.24, 0.28)), 1):
        record = {"headline": "slot_error_rate", "lower_is_better": True, "temperature": 0.8}
        matched = {**record, "metrics": {"slot_error_rate": first}}
        errors = [(0.30, 0.15), (own, 0.1)]
        extra = {"matched-entropy/1": matched}
        folders.append(synthetic_run(tmp_path, "good", seed, errors, extra=extra))
    analysis = analyse(compare_runs(views(*folders)))
    actual = row(analysis, "good")["estimates"]
    assert actual["slot_error_rate@first-at-entropy"]["mean"] == pytest.approx(0.26)
    assert actual["slot_error_rate@beyond-entropy"]["mean"] == pytest.approx(-0.04)
    assert actual["matched_temperature"]["mean"] == pytest.approx(0.8)
    assert "slot_error_rate@1" in headline_measures(analysis)
    assert not any("entropy" in measure for measure in headline_measures(analysis))
    columns = {column.name: at for at, column in enumerate(comparison_tables(analysis)[1].columns)}
    line = comparison_tables(analysis)[1].texts()[-1]
    assert line[columns["slot error rate % first policy at its entropy"]].startswith("26.0±")
    assert line[columns["slot error rate % beyond entropy"]].startswith("-4.0±")
    assert "slot_error_rate@beyond-entropy" in to_csv(analysis)


def test_methods_at_the_same_entropy_by_seed(tmp_path: Path) -> None:
    """Two methods, each beyond the first policy at its own entropy, beside each other by seed."""
    folders = []
    for name, at_entropy, last in (("spin", 0.26, 0.23), ("irl", 0.31, 0.24)):
        for seed, own in ((1, 0.20), (2, 0.22), (3, last)):
            record = {"headline": "slot_error_rate", "lower_is_better": True, "temperature": 0.8}
            matched = {**record, "metrics": {"slot_error_rate": at_entropy + seed / 100}}
            errors = [(0.30, 0.15), (own, 0.1)]
            extra = {"matched-entropy/1": matched}
            folders.append(synthetic_run(tmp_path, name, seed, errors, extra=extra))
    analysis = analyse(compare_runs(views(*folders)), AnalysisOptions(baseline="spin"))
    (against,) = [g for g in comparison_tables(analysis) if g.title.startswith("against spin")]
    lines = {tuple(line[:2]): line[2:] for line in against.texts()}
    beyond = "slot error rate % beyond entropy"
    # spin is 7, 6, 6 points beyond, irl 12, 11, 10; SFT at its own entropy is itself.
    assert lines["irl", beyond] == ["-4.7±1.4", "0.005", "0.250", "1.00 [0.44, 1.00]"]
    assert lines["SFT", beyond][0] == "+6.3±1.4"
    assert f"| irl | {beyond} | -4.7±1.4 |" in to_markdown(analysis)
    assert any(line.startswith("beyond entropy: at T=1, minus what") for line in notes(analysis))
    by_default = analyse(compare_runs(views(*folders)))
    actual = row(by_default, "irl")["against_baseline"]["slot_error_rate@beyond-entropy"]
    assert actual["mean"] == pytest.approx(-0.11)


def test_ranked_over_the_seeds_that_all_have(tmp_path: Path) -> None:
    """Seed 1 is easy; `lucky` has no other, and would lead by its mean over its own."""
    folders = [
        synthetic_run(tmp_path, "good", seed, [(0.5, 0.5), (error, error)])
        for seed, error in ((1, 0.05), (2, 0.40), (3, 0.45))
    ]
    folders.append(synthetic_run(tmp_path, "lucky", 1, [(0.5, 0.5), (0.10, 0.1)]))
    analysis = analyse(compare_runs(views(*folders)))
    assert [(r["label"], r["mean"], r["n"]) for r in analysis["ranking"]] == [
        ("good", 0.05, 1),
        ("lucky", 0.10, 1),
        ("SFT", 0.5, 1),
    ]
    message = "ranking: over the seeds that all policies have (1); fewer: lucky"
    assert message in notes(analysis)
    (grid,) = [g for g in comparison_tables(analysis) if g.title.startswith("ranking")]
    assert grid.texts()[0] == ["1", "good", "5.0", "1", "-"]
    # Without a seed in all of them each has its own, and that is told.
    apart = [*folders[1:3], folders[3]]
    analysis = analyse(compare_runs(views(*apart)))
    assert [(r["label"], r["n"]) for r in analysis["ranking"]] == [
        ("lucky", 1),
        ("good", 2),
        ("SFT", 3),
    ]
    assert any(line.startswith("ranking: no seed is in all") for line in notes(analysis))


def test_every_iteration(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path, "m", 1, [(0.3, 0.2), (0.25, 0.2), (0.2, 0.1)])
    actual = compare_runs(views(run), iterations=True)
    assert [(r.label, r.policy, r.final) for r in actual.rows[1:]] == [
        ("SFT", 0, True),
        ("m 1", 1, False),
        ("m 2", 2, True),
    ]
    assert [round(r.values["reward_accuracy"][1], 9) for r in actual.rows[2:]] == [0.75, 0.8]


def test_a_run_that_kept_an_earlier_policy(tmp_path: Path) -> None:
    """Seed 2 ended with policy 0: its value counts, or the mean would leave the failure out."""
    runs = [
        synthetic_run(tmp_path, "m", 1, [(0.3, 0.2), (0.2, 0.1)]),
        synthetic_run(tmp_path, "m", 2, [(0.4, 0.2), (0.9, 0.9)], final=0),
    ]
    actual = compare_runs(views(*runs))
    assert actual.rows[-1].label == "m"
    assert actual.rows[-1].values["slot_error_rate@1"] == {1: 0.2, 2: 0.4}


def test_methods_with_starts_of_their_own(tmp_path: Path) -> None:
    runs = [synthetic_run(tmp_path, n, 1, [(0.3, 0.2), (0.2, 0.1)]) for n in ("a", "b")]
    stages = json.loads((runs[1] / "stages.json").read_text())
    stages["evaluation/0/t1"]["key"] = "other"
    (runs[1] / "stages.json").write_text(json.dumps(stages))
    labels = [r.label for r in compare_runs(views(*runs), iterations=True).rows]
    assert labels == ["demonstrations", "a 0", "a 1", "b 0", "b 1"]


def test_select_shows_its_bound_and_best_of(tmp_path: Path) -> None:
    options = {"kind": "best_of_n", "n": 16, "use": "select"}
    recipe = synthetic_recipe("sel", 1, policy_update=options)
    bound = {"policy": 1, "temperature": 1.0, "kl_bound": 1.8351, "length": 20.0, "metrics": {}}
    extra = {"evaluation/1/t1": bound}
    run = synthetic_run(tmp_path, "sel", 1, [(0.3, 0.2), (0.2, 0.1)], recipe=recipe, extra=extra)
    analysis = analyse(compare_runs(views(run)))
    vitals = comparison_tables(analysis)[1]
    assert vitals.texts()[-1][:2] == ["sel, best of 16", "<= 1.84"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data": {"card": "toy", "path": None, "share": 0.5}}, "data.share: found 1.0 and 0.5"),
        ({"evaluation": {"split": "validation", "temperatures": [1.0, 0.0]}}, "evaluation.split"),
        (
            {"generation": {"top_p": 0.9, "top_k": 0, "max_new_tokens": 64}},
            "generation.top_p: found 1.0 and 0.9",
        ),
    ],
)
def test_other_data_or_evaluation_is_refused(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    first = synthetic_run(tmp_path, "a", 1, [(0.3, 0.2)])
    other = synthetic_recipe("b", 2, **change)
    second = synthetic_run(tmp_path, "b", 2, [(0.3, 0.2)], recipe=other)
    with pytest.raises(UserError) as caught:
        compare_runs(views(first, second))
    assert named in str(caught.value) and "--force" in str(caught.value)
    assert str(first) in str(caught.value) and str(second) in str(caught.value)
    forced = analyse(compare_runs(views(first, second), force=True))
    assert any(line.startswith("differs: ") and named in line for line in notes(forced))


def test_other_content_is_refused_and_another_path_is_not(tmp_path: Path) -> None:
    moved = synthetic_recipe("b", 1, data={"card": "toy", "path": "/elsewhere", "share": 1.0})
    first = synthetic_run(tmp_path, "a", 1, [(0.3, 0.2)])
    second = synthetic_run(tmp_path, "b", 1, [(0.3, 0.2)], recipe=moved)
    assert compare_runs(views(first, second)).differences == []
    sums = {"sft": "a1", "reward": "a", "held_out": "b", "evaluation": "changed"}
    third = synthetic_run(tmp_path, "c", 1, [(0.3, 0.2)], checksums=sums)
    with pytest.raises(UserError, match="checksum of data evaluation: found 'c' and 'changed'"):
        compare_runs(views(first, third))


def test_unfinished_and_double_runs_are_refused(tmp_path: Path) -> None:
    stopped = synthetic_run(tmp_path, "a", 1, [(0.3, 0.2)], finished=False)
    with pytest.raises(UserError, match="not finished"):
        compare_runs(views(stopped))
    one = synthetic_run(tmp_path / "x", "a", 2, [(0.3, 0.2)])
    two = synthetic_run(tmp_path / "y", "a", 2, [(0.3, 0.2)])
    with pytest.raises(UserError, match="the same name and seed"):
        compare_runs(views(one, two))
    with pytest.raises(UserError, match="no finished run"):
        compare_runs([])


def test_a_measure_that_some_seeds_lack(tmp_path: Path) -> None:
    runs = three_seeds(tmp_path)
    (records,) = [v.metrics for v in runs if v.folder.name == "good-seed3"]
    (record,) = [r for r in records if r["key"] == "evaluation/1/t0"]
    record["metrics"]["slot_error_rate"] = None  # what was not finite
    only = [v for v in runs if v.folder.name != "even-seed1"]
    analysis = analyse(
        compare_runs(only, missing=["even-seed1: gone"]), AnalysisOptions(baseline="good")
    )
    assert row(analysis, "good")["estimates"]["slot_error_rate@0"]["n"] == 2
    message = notes(analysis)
    assert "good: not in all of its seeds: slot_error_rate@0" in message
    assert "even: 2 of 3 seeds" in message and "not compared: even-seed1: gone" in message
    paired = row(analysis, "even")["against_baseline"]["slot_error_rate@0"]
    assert paired["n"] == 1  # seed 2 alone has both
    assert paired["p_t"] is None


def test_baseline_and_measure_are_checked(tmp_path: Path) -> None:
    comparison = compare_runs(three_seeds(tmp_path))
    assert analyse(comparison, AnalysisOptions("slot_error_rate@0", "even"))["baseline"] == "even"
    assert analyse(comparison, AnalysisOptions("bleu"))["ranked_by"] == "bleu@1"
    with pytest.raises(UserError, match="--baseline: found 'x', expected one of SFT, good, even"):
        analyse(comparison, AnalysisOptions(baseline="x"))
    with pytest.raises(UserError, match="--by: found 'kl@1', expected a gold metric"):
        analyse(comparison, AnalysisOptions("kl"))


def test_without_gold_nothing_is_ranked(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path, "a", 1, [(0.3, 0.2), (0.2, 0.1)])
    path = run / "metrics.jsonl"
    lines = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        for field in ("metrics", "headline", "lower_is_better"):
            record.pop(field, None)
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))
    analysis = analyse(compare_runs(views(run)))
    assert analysis["ranking"] == [] and analysis["ranked_by"] is None
    assert [c.name for c in comparison_tables(analysis)[0].columns] == ["policy", "length"]


def test_tables_in_all_forms(tmp_path: Path) -> None:
    analysis = analyse(compare_runs(three_seeds(tmp_path)))
    assert headline_measures(analysis) == ["slot_error_rate@1", "slot_error_rate@0",
                                           "fully_right@1", "bleu@1", "bleu@0"]  # fmt: skip
    markdown = to_markdown(analysis)
    assert "| good | 21.0±2.5 | 15.5±1.2 | - | 40.0 | 40.0 |" in markdown
    rows = list(csv.DictReader(io.StringIO(to_csv(analysis))))
    (line,) = [r for r in rows if (r["policy"], r["measure"]) == ("good", "slot_error_rate@1")]
    assert float(line["mean"]) == pytest.approx(0.21) and line["seeds"] == "3"
    assert float(line["difference"]) == pytest.approx(-0.1)
    assert (line["probability_low"][:5], line["probability_high"]) == ("0.438", "1.0")
    (line,) = [r for r in rows if (r["policy"], r["measure"]) == ("even", "slot_error_rate@1")]
    bounds = [float(line[f"probability_{which}"]) for which in ("low", "high")]
    shown = "{:.2f} [{:.2f}, {:.2f}]".format(float(line["probability_of_improvement"]), *bounds)
    assert bounds[0] < bounds[1] and f" | {shown} |" in markdown
    console = Console(width=100, record=True, file=io.StringIO())
    show_comparison(analysis, console)
    text = console.export_text()
    assert "21.0±2.5" in text and max(map(len, text.splitlines())) <= 100
    bootstrap = analyse(compare_runs(three_seeds(tmp_path)), AnalysisOptions(interval="bootstrap"))
    assert "21.0 [20.0, 22.0]" in to_markdown(bootstrap) and "bootstrap" in notes(bootstrap)[0]


def test_wide_tables_are_printed_in_parts(tmp_path: Path) -> None:
    analysis = analyse(compare_runs(three_seeds(tmp_path)))
    for row_ in analysis["rows"]:
        row_["label"] = f"a name of a policy that is long, {row_['label']}"
    console = Console(width=60, record=True, file=io.StringIO())
    show_comparison(analysis, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 60
    for cell in ("21.0±2.5", "15.5±1.2", "40.0"):
        assert cell in text  # whole, not cut by an ellipsis
    assert "…" not in text and text.count("that is long, good") >= 2


def test_markdown_escapes_names(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path, "a", 1, [(0.3, 0.2), (0.2, 0.1)])
    analysis = analyse(compare_runs(views(run)))
    analysis["rows"][-1]["label"] = "<b>|`x`_"
    assert "| &#60;b&#62;&#124;&#96;x&#96;&#95; | 20.0" in to_markdown(analysis)
