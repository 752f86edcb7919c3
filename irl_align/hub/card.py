"""Cards of the exported models and pairs: the Hub's metadata, and a text with the run's numbers.

The texts are the templates reward.md.j2, policy.md.j2 and pairs.md.j2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, DatasetCardData, EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from irl_align.hub.facts import Artefact, Facts, Licence, card_name
from irl_align.hub.results import Measured, accuracy_table, eval_result, gold_table, share
from irl_align.policy.roles import Role
from irl_align.reward.settings import RewardSettings
from irl_align.utils.version import __version__

REPOSITORY_TAGS = ["irl-align", "inverse-reinforcement-learning"]
LOSSES = {
    "bradley_terry": "Bradley-Terry, -log sigmoid(r(x, y_E) - r(x, y)): arXiv:2503.13538, eq. 11",
    "linear": "linear, r(x, y) - r(x, y_E) of a bounded reward: arXiv:2503.13538, eq. 10",
}
LEVELS = {
    "implicit": "implicit, r = beta log(pi / pi_reference), as in SPIN, arXiv:2401.01335",
    "functions": "none: functions are the reward",
}
UPDATES = {
    "best_of_n": "Best-of-N on the reward",
    "ppo": "PPO on the reward with a KL penalty",
    "identity": "none besides the fit of the implicit reward (SPIN, arXiv:2401.01335)",
    "sft": "more supervised fine-tuning",
    "iqlearn": "offline IQLearn on the demonstrations (arXiv:2409.01369)",
}
POLICY_LIMITS = [
    "It was trained to answer like the demonstrations and knows nothing of safety beyond them.",
    "Prompts must be written as in training: the chat template does it.",
]
LOAD_BASE = {
    "dtype": "torch.float32",
    "quantization_config": "AutoConfig.from_pretrained(REPO).quantization_config",
    "attn_implementation": '"eager"',
}
"""Option of an adapter's base -> its code in a snippet."""
REWARD_LIMITS = [
    "It separates demonstrations from the samples of one policy, and is untested far from both: as "
    "a policy is optimised against it, its scores rise beyond what they mean.",
    "It compares answers to one prompt. Scores of different prompts cannot be compared.",
    "It learned the taste of one data set, with its mistakes and biases, and nothing of safety "
    "beyond it.",
]


def reward_card(
    facts: Facts,
    artefact: Artefact,
    settings: RewardSettings,
    measured: Measured,
    licence: Licence,
    *,
    adapter: Mapping[str, Any] | None = None,
) -> str:
    """README.md of an exported reward model, or of its adapter on a base.

    adapter: options with which the base is loaded; None for a whole model.
    """
    results = [
        eval_result(facts, "text-classification", "accuracy", f"{source}, held out", accuracy.mean)
        for source, accuracy in measured.held_out.items()
    ]
    metadata = _model_data(facts, licence, "text-classification", results, adapter is not None)
    metadata.tags = ["reward-model", *REPOSITORY_TAGS]
    metadata.metrics = ["accuracy"]
    cut = "An answer that is cut off before its EOS is outside what the reward was fitted on"
    dropped = facts.view.recipe["pairs"]["truncated"] == "drop"
    cut += " (truncated samples were left out)." if dropped else "."
    return _render(
        "reward.md.j2",
        metadata,
        facts=facts,
        settings=settings,
        measured=measured,
        adapter=adapter,
        code=LOAD_BASE,
        preferences=facts.view.recipe["reward"].get("preferences"),
        accuracy=accuracy_table(facts, artefact, measured),
        method=_method(facts, artefact),
        limits=_limits(facts, [*REWARD_LIMITS, cut]),
        origin=_origin(facts, artefact.role, measured.source_checksum),
        licence=licence,
    )


def policy_card(
    facts: Facts,
    artefact: Artefact,
    checksum: str,
    licence: Licence,
    *,
    adapter: Mapping[str, Any] | None = None,
) -> str:
    """README.md of an exported policy, or of its adapter on a base.

    checksum: SHA-256 of the run's own model folder. adapter: options with which the base is loaded;
    None for a whole model.
    """
    gold = gold_table(facts, artefact)
    metadata = _model_data(facts, licence, "text-generation", gold.results, adapter is not None)
    metadata.tags = ["text-generation", *REPOSITORY_TAGS]
    is_last = artefact.iteration == facts.summary["policy_number"]
    return _render(
        "policy.md.j2",
        metadata,
        facts=facts,
        artefact=artefact,
        adapter=adapter,
        code=LOAD_BASE,
        ranking=facts.summary.get("ranking") if is_last else None,
        longest=facts.view.recipe["generation"]["max_new_tokens"],
        gold=gold,
        method=_method(facts, artefact),
        limits=_limits(facts, POLICY_LIMITS),
        origin=_origin(facts, artefact.role, checksum),
        licence=licence,
    )


def pairs_card(facts: Facts, counts: Mapping[str, int], licence: Licence) -> str:
    """README.md of exported pairs and samples; it is a data card of irl-align as well."""
    card = facts.card
    options = {
        "kind": "preferences",
        "splits": {s: {"files": f"pairs/{s}-*.parquet"} for s in ("train", "validation")},
        "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
        | {"subset": "source"},
        "where": {"source": "demonstration/policy"},
        "template": "{prompt}" if card is None else card.template,
        "lowercase": card is not None and card.lowercase,
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
    origin = _origin(facts, str(Role.pairs(max(facts.pairs()))), None)
    return _render(
        "pairs.md.j2", metadata, facts=facts, counts=counts, origin=origin, licence=licence
    )


def _render(template: str, metadata: CardData, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"share": share, "card_name": card_name}
    text = environment.get_template(template).render(**values)
    return f"---\n{metadata.to_yaml()}\n---\n\n{text}\n"


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
    facts: Facts, licence: Licence, task: str, results: list[EvalResult], adapter: bool
) -> ModelCardData:
    return ModelCardData(
        base_model=facts.base_hub_id,
        datasets=[facts.data_hub_id] if facts.data_hub_id else None,
        eval_results=results or None,
        model_name=str(facts.view.recipe["name"]) if results else None,
        language=facts.front.get("language"),
        library_name="peft" if adapter else "transformers",
        license=licence.name,
        license_name=licence.other,
        pipeline_tag=task,
    )


def _method(facts: Facts, artefact: Artefact) -> list[tuple[str, str]]:
    """Rows of a table: data, base model, losses, settings."""
    recipe = facts.view.recipe
    reward, update, pairs = recipe["reward"], recipe["policy_update"], recipe["pairs"]
    scratch = recipe["model"]["from_scratch"]
    starts = {"cold": "from SFT", "warm": "from the previous reward"}[reward["init"]]
    return [
        ("demonstrations", _demonstrations(facts)),
        ("base model", facts.base_model or f"from scratch ({scratch['architecture']})"),
        ("negatives", ", ".join(pairs["sources"]) + f"; window {pairs['window']}"),
        ("reward level", LEVELS.get(reward["kind"]) or LOSSES[reward["loss"]]),
        *([("reward starts", starts)] if reward["kind"] == "explicit" else []),
        *_composition(reward),
        ("policy level", UPDATES.get(update["kind"], f"`{update['kind']}`")),
        ("outer iteration", f"{artefact.iteration} of {recipe['loop']['iterations']}"),
        ("seed", str(recipe["seed"])),
    ]


def _composition(reward: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table of the method: an ensemble, and functions that the export lacks."""
    rows = []
    if ensemble := reward.get("ensemble"):
        members = f"{ensemble['members']} {ensemble['kind']}"
        rows.append(("ensemble", f"{members}, mean - {ensemble['penalty']:g} deviations"))
    if functions := reward.get("functions"):
        named = ", ".join(f"{f['weight']:g} x `{f['path']}`" for f in functions)
        rows.append(("functions added to the reward, not exported", named))
    return rows


def _demonstrations(facts: Facts) -> str:
    data = facts.view.by_key.get("data", {})
    name = facts.data_name
    if facts.data_hub_id:
        name = f"[{name}](https://huggingface.co/datasets/{facts.data_hub_id})"
    used = ", ".join(
        f"{data[f'{part}_rows']:,} rows of {data[f'{part}_prompts']:,} prompts for {use}"
        for part, use in (("sft", "SFT"), ("reward", "the reward"), ("held_out", "holding out"))
        if f"{part}_rows" in data
    )
    return f"{name}: {used}" if used else name


def _limits(facts: Facts, limits: list[str]) -> list[str]:
    """Known limits of the method, of the data, and of this run."""
    warnings = [f"Warning in training: {sign}." for sign in facts.view.signs()]
    problems = facts.about.partition("**Known problems.**")[2].split("\n\n")[0].split()
    data = [f"The demonstrations: {' '.join(problems)}"] if problems else []
    return [*limits, *data, *(warnings or ["No warning sign was raised in training."])]


def _origin(facts: Facts, role: str, checksum: str | None) -> dict[str, Any]:
    """Stages and checksums as rows of a table, and the versions of all libraries."""
    rows = [(name, f"`{stage}`") for name, stage in facts.lineage(role).items()]
    sums = facts.view.by_key.get("data", {}).get("checksums", {})
    rows += [(f"{part} demonstrations", f"sha256 `{value}`") for part, value in sums.items()]
    if checksum is not None:
        rows.append(("the run's model folder", f"sha256 `{checksum}`"))
    environment = facts.view.by_key.get("environment", {})
    libraries = (name for name in environment if name not in ("key", "device", "seed"))
    versions = ", ".join(f"{name} {environment[name]}" for name in libraries)
    return {"rows": rows, "versions": versions, "exporter": __version__}
