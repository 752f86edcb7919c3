"""The numbers on a card, as rows of its tables and as the Hub's evaluation results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult

from irl_align.evaluation.compare.policies import gold_estimate, reward_reports
from irl_align.hub.facts import Artefact, Facts, card_name
from irl_align.policy.roles import DEMONSTRATIONS
from irl_align.reward.health import DISCRIMINATOR, SHORTCUTS, accuracies
from irl_align.utils.statistics import Estimate, few_clusters
from irl_align.utils.text_table import metric_name

TEXT_METRICS = ("bleu", "chrf")  # of completions against references, where there are any


@dataclass(frozen=True)
class Measured:
    """What an export measured of a reward."""

    rows: int
    """Held-out demonstrations that were scored by transformers alone and by irl-align."""
    difference: float | None
    """Largest difference of the two; None where transformers alone cannot give the score."""
    held_out: dict[str, Estimate]
    """Source of held-out pairs -> accuracy."""
    pairs: int
    """Number of held-out pairs."""
    source_checksum: str
    """SHA-256 of the run's own model folder."""


@dataclass(frozen=True)
class GoldTable:
    """Policies and demonstrations by the task's gold metric."""

    split: str
    name: str
    """The gold metric; empty if the task has none."""
    better: str
    columns: list[str]
    rows: list[list[str]]
    results: list[EvalResult]
    """Results of the artefact's weights, for the Hub."""


def eval_result(facts: Facts, task: str, metric: str, name: str, value: float) -> EvalResult:
    """One entry of the model index."""
    recipe = facts.view.recipe
    return EvalResult(
        task_type=task,
        dataset_type=facts.data_hub_id or card_name(recipe["data"]["card"]),
        dataset_name=facts.data_name,
        dataset_split=recipe["evaluation"]["split"] if task == "text-generation" else "train",
        metric_type=metric,
        metric_name=name,
        metric_value=round(value, 4),
    )


def accuracy_table(facts: Facts, artefact: Artefact, measured: Measured) -> dict[str, Any]:
    """Accuracy of a reward on held-out pairs.

    rows: a table by source, by shortcut of its audit, by iteration, and on samples of the policy
    that was improved on the reward. held_out: pair loss and calibration error, None where the run
    did not measure them. note: what is said of few prompts, or None.
    """
    report = dict(reward_reports(facts.view)).get(artefact.iteration)
    shares = dict(measured.held_out)
    if report is not None:
        others = accuracies({**report, "by_source": {}})
        shares |= {name: one for name, one in others.items() if name != "held-out pairs"}
    others_of = {DISCRIMINATOR, *SHORTCUTS.values()}
    rows = [
        [name if name in others_of else f"this reward, {name}", *_share_cells(one)]
        for name, one in shares.items()
    ]
    held_out = {} if report is None else report["held_out"]
    measured_loss = held_out if held_out.get("loss") is not None else None
    return {"rows": rows, "held_out": measured_loss, "note": few_clusters(shares.values())}


def _share_cells(share: Estimate) -> list[str]:
    """A share with its interval, its pairs and its prompts."""
    return [percent(share), f"{share.n:,}", f"{share.clusters or share.n:,}"]


def gold_table(facts: Facts, artefact: Artefact) -> GoldTable:
    """Policies 0 to k and the demonstrations by the task's gold metric.

    The results for the Hub are those of the artefact's weights: where pi_k selects among the
    samples of an earlier policy, those of the earlier policy.
    """
    k, selects = artefact.iteration, artefact.weights != artefact.iteration
    records = [record for record in facts.view.evaluations() if record["policy"] <= k]
    texts = [name for name in TEXT_METRICS if any(name in r.get("metrics", {}) for r in records)]
    demonstrations = facts.view.record(DEMONSTRATIONS)
    headline = str(demonstrations.get("headline", ""))
    rows, results = [], list[EvalResult]()
    if headline:
        value, length = demonstrations["metrics"].get(headline), demonstrations["length"]
        blank = [""] * len(texts)
        rows.append(["demonstrations", "", share(value), *blank, "", f"{length:.1f}"])
    for record in sorted(records, key=lambda r: (r["policy"], -r["temperature"])):
        number, temperature = record["policy"], f"{record['temperature']:g}"
        samples = facts.view.answers(number).get(record["temperature"], [])
        gold = gold_estimate(headline, record, samples)
        if gold is not None and number == artefact.weights:
            name = f"{headline}, T={temperature}"
            results.append(eval_result(facts, "text-generation", headline, name, gold.mean))
        label = "pi_0 (SFT)" if number == 0 else f"pi_{number}"
        label = f"{label}, selected" if selects and number == k else label
        values = [record.get("metrics", {}).get(name) for name in texts]
        cells = [label, temperature, "" if gold is None else percent(gold)]
        cells += ["" if value is None else f"{value:.1f}" for value in values]
        rows.append([*cells, _kl(record), f"{record['length']:.1f}"])
        if "unseen" in record:
            unseen = [row for row in samples if not row.get("seen")]
            apart = gold_estimate(headline, record["unseen"], unseen)
            values = [record["unseen"]["metrics"].get(name) for name in texts]
            name = f"{label}, {record['unseen']['prompts']:,} prompts that are not in training"
            cells = [name, temperature, "" if apart is None else percent(apart)]
            cells += ["" if value is None else f"{value:.1f}" for value in values]
            rows.append([*cells, "", ""])
    title = metric_name(headline)
    columns = ["policy", "temperature", title or "gold", *map(metric_name, texts)]
    columns += ["KL to pi_0", "tokens"]
    better = "lower" if demonstrations.get("lower_is_better") else "higher"
    split = str(facts.view.recipe["evaluation"]["split"])
    return GoldTable(split, title, better, columns, rows, results)


def _kl(record: Mapping[str, Any]) -> str:
    if record.get("kl") is None:
        return ""
    return f"{round(record['kl'], 2) + 0.0:.2f} ± {1.96 * record['kl_se']:.2f}"  # + 0.0: no -0.00


def share(value: float | None) -> str:
    """A share in percent."""
    return "-" if value is None else f"{value:.1%}"


def percent(estimate: Estimate) -> str:
    """A share in percent, with its interval if there is one."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:.1%}"
    return f"{estimate.mean:.1%} ({estimate.low:.1%} to {estimate.high:.1%})"
