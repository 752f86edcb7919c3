"""Sections of a card: texts and tables whose every number comes from the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult

from irl_align.hub.facts import Artefact, Facts, Interval, card_name, ratio_interval
from irl_align.hub.licences import Licence
from irl_align.hub.snippets import Snippet
from irl_align.policy.roles import DEMONSTRATIONS, Role
from irl_align.reward.settings import RewardSettings
from irl_align.utils.text_table import spelt
from irl_align.utils.version import __version__

LOSSES = {
    "bradley_terry": "Bradley-Terry, -log sigmoid(r(x, y_E) - r(x, y)): arXiv:2503.13538, eq. 11",
    "linear": "linear, r(x, y) - r(x, y_E) of a bounded reward: arXiv:2503.13538, eq. 10",
}
LEVELS = {
    "implicit": "implicit, r = beta log(pi / pi_reference): SPIN, arXiv:2401.01335",
    "log_prob": "none: the SFT model's mean log-prob, a control",
}
UPDATES = {
    "best_of_n": "Best-of-N on the reward",
    "ppo": "PPO on the reward with a KL penalty",
    "identity": "none besides the implicit reward's fit (SPIN, arXiv:2401.01335)",
    "sft": "more supervised fine-tuning",
    "iqlearn": "offline IQLearn on the demonstrations (arXiv:2409.01369)",
}
TEXT_METRICS = ("bleu", "chrf")  # of completions against references, where there are any
# Corpus metric -> (numerator, denominator) in a sample's row; other metrics are means of rows.
RATIOS = {"slot_error_rate": ("slot_errors", "slots")}


@dataclass(frozen=True)
class Measured:
    """What an export measured of a reward."""

    rows: int
    """Held-out demonstrations that were scored by transformers alone and by irl-align."""
    difference: float | None
    """Largest difference of the two; None where transformers alone cannot give the score."""
    same_ids: int | None
    """Rows that the chat template encodes as in training; None if it is the tokenizer's own."""
    held_out: dict[str, Interval]
    """Source of held-out pairs -> accuracy."""
    pairs: int
    """Held-out pairs in all."""
    source_checksum: str
    """SHA-256 of the run's own model folder."""


def result(
    facts: Facts, task: str, metric: str, name: str, value: float, split: str = "train"
) -> EvalResult:
    """One entry of the model index."""
    return EvalResult(
        task_type=task,
        dataset_type=facts.data_hub_id or card_name(facts.view.recipe["data"]["card"]),
        dataset_name=facts.data_name,
        dataset_split=split,
        metric_type=metric,
        metric_name=name,
        metric_value=round(value, 4),
    )


def load_section(snippets: Sequence[Snippet]) -> str:
    """How to load, with code."""
    shown = "\n\n".join(f"{title}\n\n```{kind}\n{code}```" for title, kind, code in snippets)
    return f"## How to load\n\nIn the snippets `REPO` is this repository or folder.\n\n{shown}"


def scores_section(settings: RewardSettings, measured: Measured) -> str:
    """What a score means, and what the logit of transformers is to it."""
    lines = ["## What a score is", ""]
    lines.append(
        "The score of a whole answer, read at its last token (EOS). On the demonstrations that it "
        "was fitted on it has mean 0 and standard deviation 1. Only differences between answers "
        "to one prompt mean something."
    )
    if settings.lm_coef:
        lines.append(
            f"Besides the head it has {settings.lm_coef:.6g} times the answer's mean log-prob "
            "under the backbone, which transformers alone does not add: load it with irl-align."
        )
    elif settings.bound is not None:
        lines.append(
            f"It is b tanh(u / b) - {settings.mean:.6g} with b = {settings.bound:.6g} and u the "
            "logit that transformers gives: the same order, other numbers."
        )
    elif settings.mean:
        lines.append(
            f"**The logit that transformers gives is the score plus {settings.mean:.6g}**: the "
            "standard deviation is in the weights, but neither the head nor the RMSNorm before "
            "it has a bias to hold the mean, which is in config.json (`irl_reward.mean`). It "
            "cancels in comparisons, in Best-of-N, and in advantages with a baseline."
        )
    else:
        lines.append("The logit that transformers gives is the score: nothing is to be added.")
    if measured.difference is not None:
        lines.append(
            f"\nChecked at export: on {measured.rows} held-out demonstrations transformers alone "
            f"and the run's own reward differ by at most {measured.difference:.1e}."
        )
    if measured.same_ids is not None:
        lines.append(
            f"The chat template encodes {measured.same_ids} of these {measured.rows} texts to the "
            "very token ids of training."
        )
    return "\n".join(lines)


def method_section(facts: Facts, found: Artefact) -> str:
    """Data, base model, losses, settings."""
    recipe = facts.view.recipe
    reward, update, pairs = recipe["reward"], recipe["policy_update"], recipe["pairs"]
    base = facts.base_model or f"from scratch ({recipe['model']['from_scratch']['architecture']})"
    level = LEVELS.get(reward["kind"]) or LOSSES[reward["loss"]]
    rows = [
        ("demonstrations", _demonstrations(facts)),
        ("base model", base),
        ("negatives", ", ".join(pairs["sources"]) + f"; window {pairs['window']}"),
        ("reward level", level),
        ("reward starts", {"cold": "from SFT", "warm": "from the one before"}[reward["init"]]),
        ("policy level", UPDATES.get(update["kind"], f"`{update['kind']}`")),
        ("outer iteration", f"{found.iteration} of {recipe['loop']['iterations']}"),
        ("seed", str(recipe["seed"])),
    ]
    if reward["kind"] != "explicit":
        rows = [row for row in rows if row[0] != "reward starts"]
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "## Method\n\nInverse reinforcement learning from demonstrations, arXiv:2503.13538, "
        f"algorithm 1.\n\n| | |\n| --- | --- |\n{lines}\n\n<details><summary>All settings "
        f"(recipe.yaml)</summary>\n\n```yaml\n{facts.recipe_text()}```\n\n</details>"
    )


def _demonstrations(facts: Facts) -> str:
    data = facts.metrics.get("data", {})
    name = facts.data_name
    if facts.data_hub_id:
        name = f"[{name}](https://huggingface.co/datasets/{facts.data_hub_id})"
    used = ", ".join(
        f"{data[f'{part}_rows']:,} rows of {data[f'{part}_prompts']:,} prompts for {use}"
        for part, use in (("sft", "SFT"), ("reward", "the reward"), ("held_out", "holding out"))
        if f"{part}_rows" in data
    )
    return f"{name}: {used}" if used else name


def accuracy_section(facts: Facts, found: Artefact, measured: Measured) -> str:
    """Held-out accuracy beside the shortcut audit's."""
    report = facts.view.record(Role.reward(found.iteration))
    audit = report.get("audit", {})
    rows = [
        f"| this reward, {source} | {_percent(value)} |"
        for source, value in measured.held_out.items()
    ]
    names = {
        "length": "length alone",
        "truncation": "missing EOS alone",
        "logprob_sum": "summed log-prob under SFT",
        "logprob_mean": "mean log-prob under SFT",
    }
    rows += [f"| {name} | {_share(audit[key])} |" for key, name in names.items() if key in audit]
    older = "".join(
        f"| this reward, on samples of iteration {i} | {_share(r['accuracy'])} |\n"
        for i, r in report.get("older", {}).items()
    )
    held = report.get("held_out", {})
    loss = (
        f" Pair loss {held['loss']:.4f} (ln 2 is chance), calibration error "
        f"{_share(held['calibration_error'])}."
        if held.get("loss") is not None
        else ""
    )
    fresh = facts.view.record(Role.vitals(found.iteration + 1)).get("fresh_accuracy")
    after = (
        f" Against fresh samples of the policy improved on it: {fresh:.1%}."
        if fresh is not None
        else ""
    )
    return (
        f"## Evaluation\n\nHow often a demonstration scores above a sample, on {measured.pairs:,} "
        "pairs of prompts that no model was trained on. Intervals are 95%, pairs of one prompt "
        "taken as one group. The audit's shortcuts are judged on the same pairs, each in its "
        "better direction: a reward no better than one of them may have learned it instead.\n\n"
        f"| | accuracy |\n| --- | ---: |\n" + "\n".join(rows) + "\n" + older + f"\n{loss}{after} "
        "High accuracy is not success: it falls to 50% as the policy comes near the "
        "demonstrations. Accuracy on human preferences was not measured by this run."
    )


def gold_table(facts: Facts, found: Artefact) -> tuple[str, list[EvalResult]]:
    """Policies 0 to k and the demonstrations by the task's gold metric, and results of the weights
    of pi_k (those of the policy that it samples, where it selects)."""
    k, selects = found.iteration, found.weights != found.iteration
    records = [record for record in facts.view.evaluations() if record["policy"] <= k]
    texts = [name for name in TEXT_METRICS if any(name in r.get("metrics", {}) for r in records)]
    split = str(facts.view.recipe["evaluation"]["split"])
    rows, results = [], list[EvalResult]()
    demonstrations = facts.view.record(DEMONSTRATIONS)
    headline = str(demonstrations.get("headline", ""))
    if headline:
        value = _share(demonstrations["metrics"].get(headline))
        blank = " |" * len(texts)
        rows.append(f"| demonstrations | | {value} |{blank} | {demonstrations['length']:.1f} |")
    for record in sorted(records, key=lambda r: (r["policy"], -r["temperature"])):
        number, temperature = record["policy"], record["temperature"]
        said = facts.view.answers(number).get(temperature, [])
        gold = _interval(headline, said, record)
        if gold is not None and number == found.weights:
            name = f"{headline}, T={temperature:g}"
            results.append(result(facts, "text-generation", headline, name, gold.value, split))
        label = "pi_0 (SFT)" if number == 0 else f"pi_{number}"
        label = f"{label}, selected" if selects and number == k else label
        rows.append(_gold_row(label, record, gold, texts))
    title = spelt(headline) or "gold"
    better = "lower" if demonstrations.get("lower_is_better") else "higher"
    table = (
        f"| | temperature | {title} |{''.join(f' {spelt(name)} |' for name in texts)} KL to pi_0 "
        f"| tokens |\n| --- | --- | ---: |{' ---: |' * len(texts)} ---: | ---: |\n"
        + "\n".join(rows)
    )
    intro = f"Split `{split}`, one sample per prompt. Intervals are 95% over prompts, one seed."
    if headline:
        intro += f" For {title}, {better} is better; it is for reporting and selected nothing."
    return f"{intro}\n\n{table}", results


def _gold_row(
    label: str, record: Mapping[str, Any], gold: Interval | None, texts: Sequence[str]
) -> str:
    """texts: the metrics of the samples' texts, a column each."""
    shown = "" if gold is None else _percent(gold)
    found = [record.get("metrics", {}).get(name) for name in texts]
    columns = "".join("  |" if value is None else f" {value:.1f} |" for value in found)
    kl = ""
    if record.get("kl") is not None:  # adding 0 makes of -0.0 a 0
        kl = f"{round(record['kl'], 2) + 0.0:.2f} ± {1.96 * record['kl_se']:.2f}"
    length = f"{record['length']:.1f}"
    return f"| {label} | {record['temperature']:g} | {shown} |{columns} {kl} | {length} |"


def _interval(
    metric: str, rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any]
) -> Interval | None:
    """A corpus metric with its interval from its rows; without one where they do not make it up."""
    value = record.get("metrics", {}).get(metric)
    if value is None:
        return None
    top, bottom = RATIOS.get(metric, (metric, ""))
    names = [name for name in (top, bottom) if name]
    if not rows or any(row.get(name) is None for row in rows for name in names):
        return Interval(value, math.nan, math.nan)
    found = ratio_interval(
        [row[top] for row in rows], [row[bottom] if bottom else 1.0 for row in rows]
    )
    same = math.isclose(found.value, value, rel_tol=1e-6, abs_tol=1e-9)
    return found if same else Interval(value, math.nan, math.nan)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _percent(interval: Interval) -> str:
    if math.isnan(interval.low):
        return f"{interval.value:.1%}"
    low, high = max(0.0, interval.low), interval.high
    return f"{interval.value:.1%} ({low:.1%} to {high:.1%})"


def limits_section(facts: Facts, limits: list[str]) -> str:
    """What is known to go wrong, of the method, the data and this run."""
    signs = facts.view.signs()
    told = [f"Warned of in training: {sign}." for sign in signs] or [
        "No warning sign was raised in training."
    ]
    problems = facts.about.partition("**Known problems.**")[2].split("\n\n")[0]
    data = [f"The demonstrations: {' '.join(problems.split())}"] if problems.strip() else []
    lines = "\n".join(f"- {line}" for line in (*limits, *data, *told))
    return f"## Known limits\n\n{lines}"


def origin_section(
    facts: Facts, found: Artefact | None, checksum: str | None, licence: Licence
) -> str:
    """Stages, checksums, versions and licence."""
    role = found.role if found is not None else str(Role.pairs(max(facts.pairs())))
    lineage = facts.lineage(role)
    rows = [f"| {r['role']} | `{r['name']}-{r['key']}` |" for r in lineage]
    sums = facts.metrics.get("data", {}).get("checksums", {})
    rows += [f"| {part} demonstrations | sha256 `{value}` |" for part, value in sums.items()]
    if checksum is not None:
        rows.append(f"| the run's model folder | sha256 `{checksum}` |")
    versions = {
        name: value
        for name, value in facts.metrics.get("environment", {}).items()
        if name not in ("key", "device", "seed")
    }
    made = ", ".join(f"{name} {value}" for name, value in versions.items())
    table = "| stage | key |\n| --- | --- |\n" + "\n".join(rows)
    other = f" ({licence.other})" if licence.other else ""
    return (
        f"## Where it comes from\n\n{table}\n\nA stage's key is a hash of its settings and of the "
        f"keys of what it was made from. Run with {made}; exported by irl-align {__version__}.\n\n"
        f"## Licence\n\n{licence.name}{other}, {licence.why}."
    )
