"""Cards of what a run made: the Hub's metadata, and the sections in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from irl_align.hub.facts import Artefact, Facts, card_name
from irl_align.hub.licences import Licence
from irl_align.hub.sections import (
    Measured,
    accuracy_section,
    gold_table,
    limits_section,
    load_section,
    method_section,
    origin_section,
    result,
    scores_section,
)
from irl_align.hub.snippets import adapter_snippets, policy_snippets, reward_snippets
from irl_align.reward.settings import RewardSettings

REPOSITORY_TAGS = ["irl-align", "inverse-reinforcement-learning"]


def reward_card(
    facts: Facts,
    found: Artefact,
    settings: RewardSettings,
    measured: Measured,
    licence: Licence,
    adapter_base: str | None = None,
) -> str:
    """README.md of an exported reward model, or of its adapter on a base."""
    results = [
        result(facts, "text-classification", "accuracy", f"{source}, held out", interval.value)
        for source, interval in measured.held_out.items()
    ]
    metadata = _model_data(facts, licence, "text-classification", ["reward-model"], results)
    metadata.metrics = ["accuracy"]
    snippets = reward_snippets(settings, measured.difference is not None)
    if adapter_base is not None:
        metadata.library_name = "peft"
        snippets = adapter_snippets("reward", settings.mean)
    sections = [
        f"# Reward model learned from {facts.data_name}",
        f"A scalar reward r(x, y) for a prompt x and an answer y, learned {_learned(facts)}.",
        load_section(snippets),
        scores_section(settings, measured),
        method_section(facts, found),
        accuracy_section(facts, found, measured),
        limits_section(facts, _reward_limits(facts)),
        origin_section(facts, found, measured.source_checksum, licence),
    ]
    return _join(metadata, sections)


def policy_card(
    facts: Facts,
    found: Artefact,
    checksum: str,
    licence: Licence,
    adapter_base: str | None = None,
) -> str:
    """README.md of an exported policy, or of its adapter on a base."""
    table, results = gold_table(facts, found)
    metadata = _model_data(facts, licence, "text-generation", ["text-generation"], results)
    k = found.iteration
    snippets = policy_snippets(facts)
    if adapter_base is not None:
        metadata.library_name = "peft"
        snippets = adapter_snippets("policy")
    sections = [
        f"# Policy learned from {facts.data_name}",
        f"Policy pi_{k} of a run of irl-align: a causal language model "
        + (
            f"after {k} outer iteration{'s' if k > 1 else ''} of inverse reinforcement learning "
            "from demonstrations alone."
            if k
            else "before the loop of inverse reinforcement learning, supervised only."
        )
        + _selecting(facts, k),
        load_section(snippets),
        method_section(facts, found),
        "## Evaluation\n\n" + table,
        limits_section(facts, _policy_limits()),
        origin_section(facts, found, checksum, licence),
    ]
    return _join(metadata, sections)


def pairs_card(facts: Facts, counts: Mapping[str, int], licence: Licence) -> str:
    """README.md of exported pairs and samples; it is a data card of irl-align as well."""
    card = facts.card
    options = {
        "kind": "preferences",
        "splits": {s: {"files": f"pairs/{s}-*.parquet"} for s in ("train", "validation")},
        "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
        | {"subset": "source"},
        "where": {"source": "demonstration/policy"},
        "template": card.template if card is not None else "{prompt}",
        "lowercase": card.lowercase if card is not None else False,
        "faulty": "drop",
    }
    metadata = DatasetCardData(
        pretty_name=f"{facts.data_name}: demonstrations against samples",
        language=facts.front.get("language"),
        license=licence.name,
        license_name=licence.other,
        task_categories=["text-generation"],
        tags=[*REPOSITORY_TAGS, "preferences"],
        configs=_configs(counts["samples"] > 0),
        irl_align=options,
    )
    rows = "\n".join(f"- `{name}`: {count:,} rows" for name, count in counts.items())
    sections = [
        f"# {facts.data_name}: demonstrations against samples",
        "Pairs that a reward was learned from: `chosen` is a demonstration, `rejected` what a "
        "policy said (source `demonstration/policy`), the same demonstration under another prompt "
        "(`demonstration/contrast`, with `rejected_prompt`), or a pair of two models' samples. "
        "**No person compared them.** `rejected_truncated` marks samples cut at the longest "
        "length. The configuration `samples` has every policy's answers to evaluation prompts with "
        "the gold metrics of each.",
        f"## Contents\n\n{rows}",
        origin_section(facts, None, None, licence),
    ]
    return _join(metadata, sections)


def _configs(samples: bool) -> list[dict[str, Any]]:
    """The Hub's configurations of exported pairs: which files are which split."""
    splits = ("train", "validation")
    files = [{"split": split, "path": f"pairs/{split}-*.parquet"} for split in splits]
    configs: list[dict[str, Any]] = [{"config_name": "pairs", "default": True, "data_files": files}]
    if samples:
        files = [{"split": "test", "path": "samples/*.parquet"}]
        configs.append({"config_name": "samples", "data_files": files})
    return configs


def _model_data(
    facts: Facts, licence: Licence, task: str, tags: list[str], results: list[EvalResult]
) -> ModelCardData:
    return ModelCardData(
        base_model=facts.base_hub_id,
        datasets=[facts.data_hub_id] if facts.data_hub_id else None,
        eval_results=results or None,
        model_name=str(facts.view.recipe["name"]) if results else None,
        language=facts.front.get("language"),
        library_name="transformers",
        license=licence.name,
        license_name=licence.other,
        pipeline_tag=task,
        tags=[*tags, *REPOSITORY_TAGS],
    )


def _join(metadata: Any, sections: Sequence[str]) -> str:
    body = "\n\n".join(section.rstrip() for section in sections if section)
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}\n"


def _learned(facts: Facts) -> str:
    """From what a reward was learned: demonstrations, preferences, or both."""
    preferences = facts.view.recipe["reward"].get("preferences") or {}
    name = f"`{card_name(preferences['card'])}`" if preferences else ""
    if preferences.get("use") == "alone":
        return f"**from human preferences alone**, those of {name}: no inverse RL, for comparison"
    besides = f", besides those of {name} (weight {preferences['weight']:g})" if preferences else ""
    return (
        "by inverse reinforcement learning **from demonstrations alone**: it was fitted to score "
        "demonstrations above what a policy trained on the same data says. No human preference was "
        f"used{besides}"
    )


def _selecting(facts: Facts, k: int) -> str:
    ranking = facts.summary.get("ranking")
    if ranking is None or k != facts.summary["policy_number"]:
        return ""
    return (
        f" **The run's policy is best-of-{ranking['n']} selection**: it samples this model "
        f"{ranking['n']} times at temperature {ranking['temperature']:g} and keeps the best by "
        f"{ranking['score']}. These are the weights that it samples; export the reward too."
    )


def _policy_limits() -> list[str]:
    return [
        "It was trained to answer like the demonstrations and knows nothing of safety beyond them.",
        "Prompts must be written as in training: the chat template does it.",
    ]


def _reward_limits(facts: Facts) -> list[str]:
    return [
        "It tells demonstrations from one policy's samples. Far from both it is unknown: as a "
        "policy is optimised against it, its scores rise beyond what they mean.",
        "It compares answers to one prompt. Scores of different prompts cannot be compared.",
        "It learned one data set's taste, its mistakes and biases included, and nothing of safety "
        "beyond it.",
        "An answer cut off before its EOS is outside what it was fitted on"
        + (
            " (truncated samples were left out)."
            if facts.view.recipe["pairs"]["truncated"] == "drop"
            else "."
        ),
    ]
