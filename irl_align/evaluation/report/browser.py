"""The samples that a report shows: of every policy, and of PPO with the credit of tokens."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from irl_align.data.rows import prompt_text
from irl_align.evaluation.compare.policies import by_method, final_policy, policy_label
from irl_align.evaluation.report.templates import render, script_json
from irl_align.training.run_folder import RunView

BUDGET = 2_500_000  # bytes of samples in a page
CREDITED = 8  # samples of the first and of the last update that stored samples
CREDIT_BUDGET = 1_000_000  # bytes of samples with credit, of all methods
FIELDS = ("prompt", "completion", "demonstrations", "seen")
PER_TOKEN = ("credit", "advantage", "kl")
Item = TypeVar("Item")


def sample_browser(views: Sequence[RunView], budget: int = BUDGET) -> dict[str, Any] | None:
    """Prompts with their demonstrations and the sample of each method at each temperature.

    The samples are of one seed, the first that most methods have. If all prompts take more than
    `budget` bytes, evenly spaced ones are chosen. None if there are no samples.
    `rows[i]["s"][t][m]` is [text, scores...] of method m at temperature t, or null. `without` names
    the methods that have no run with the seed.
    """
    if not views:
        return None
    # Runs are sorted by seed; the first of equally common seeds counts.
    seed = Counter(view.recipe["seed"] for view in views).most_common(1)[0][0]
    own = [view for view in views if view.recipe["seed"] == seed]
    columns = _columns(own)
    files = {
        (label, temperature): {_key(row): row for row in rows}
        for label, by_temperature in columns.items()
        for temperature, rows in by_temperature.items()
    }
    if not files:
        return None
    temperatures = sorted({t for _, t in files}, key=float, reverse=True)
    first = next(iter(files.values()))
    scores = sorted({k for rows in files.values() for row in list(rows.values())[:1] for k in row}
                    - set(FIELDS))  # fmt: skip
    rows = [
        {
            "p": prompt_text(row["prompt"]),
            "d": [str(text) for text in row.get("demonstrations", [])][:8],
            "s": [
                [_cell(files.get((label, t), {}).get(key), scores) for label in columns]
                for t in temperatures
            ],
        }
        for key, row in first.items()
    ]
    return {
        "seed": seed,
        "without": [name for name in by_method(views) if name not in by_method(own)],
        "methods": list(columns),
        "temperatures": temperatures,
        "scores": scores,
        "prompts": len(rows),
        "rows": _within(rows, budget, lambda row: script_json(row) + ","),
    }


def _columns(views: Sequence[RunView]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Label -> temperature -> rows, for the first policy of the runs and their last ones."""
    columns: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for number in (0, None):
        for view in views:
            shown = final_policy(view) if number is None else number
            label = policy_label(view, shown)
            if label in columns:
                continue
            answers = {f"{t:g}": rows for t, rows in view.answers(shown).items()}
            if answers:
                columns[label] = answers
    return columns


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps(row["prompt"], sort_keys=True)


def _cell(row: Mapping[str, Any] | None, scores: Sequence[str]) -> list[Any] | None:
    if row is None:
        return None
    values = [row.get(name) for name in scores]
    return [row["completion"], *(v if isinstance(v, int | float) else None for v in values)]


def _within(items: list[Item], budget: int, written: Callable[[Item], str] = str) -> list[Item]:
    """The items, or evenly spaced ones that take at most `budget` bytes when written."""
    sizes = [len(written(item).encode()) for item in items]
    keep = len(items)
    while keep:
        chosen = [i * len(items) // keep for i in range(keep)]
        size = sum(sizes[at] for at in chosen)
        if size <= budget:
            return [items[at] for at in chosen]
        keep = min(keep - 1, int(keep * budget / size))
    return []


def credited_samples(views: Sequence[RunView], budget: int = CREDIT_BUDGET) -> list[dict[str, Any]]:
    """Samples of PPO with the credit, advantage and KL of their tokens, as HTML.

    They come from each method's first seed, and from the first and the last update that stored
    samples. Trainings share the `budget` of bytes equally, and the rest that shorter ones leave.
    """
    groups: list[dict[str, Any]] = []
    for name, own in by_method(views).items():
        seed = own[0].recipe["seed"]
        for role, rows in own[0].ppo_records("samples.jsonl").items():
            chosen = _ends([row for row in rows if _has_credit(row)])
            articles = [render("credited.html.j2", sample=_credited(row)) for row in chosen]
            if articles:
                title = f"{name}, seed {seed}, {role}"
                groups.append({"title": title, "samples": articles, "of": len(articles)})
    left = budget
    by_size = sorted(groups, key=lambda group: sum(map(len, group["samples"])))
    for number, group in enumerate(by_size):
        group["samples"] = _within(group["samples"], left // (len(groups) - number))
        left -= sum(len(article.encode()) for article in group["samples"])
    return groups


def _has_credit(row: Mapping[str, Any]) -> bool:
    tokens, credit = row.get("tokens"), row.get("credit")
    same = isinstance(tokens, list) and isinstance(credit, list) and len(tokens) == len(credit)
    return same and bool(tokens)


def _ends(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first rows of the first and of the last update."""
    if not rows:
        return []
    updates = sorted({row.get("update", 0) for row in rows})
    chosen = []
    for update in dict.fromkeys((updates[0], updates[-1])):
        chosen += [row for row in rows if row.get("update", 0) == update][:CREDITED]
    return chosen


def _credited(row: Mapping[str, Any]) -> dict[str, Any]:
    """One sample: its prompt, reward, and per token its text, values and shade."""
    names = [n for n in PER_TOKEN if len(row.get(n) or ()) == len(row["tokens"])]
    largest = {n: max((abs(v) for v in row[n] if v is not None), default=0.0) or 1.0 for n in names}
    tokens = [
        {
            "text": text,
            "values": [{"name": n, "value": row[n][i]} for n in names],
            # The shade of a token is its share of the largest value in the sample.
            "shades": {n: round((row[n][i] or 0.0) / largest[n], 3) for n in names},
        }
        for i, text in enumerate(token_texts(row["tokens"]))
    ]
    shown = {name: row.get(name) for name in ("update", "truncated")}
    shown["reward"] = round(float(row["reward"]), 4) if row.get("reward") is not None else "unknown"
    return {"prompt": prompt_text(row["prompt"]), "names": names, "tokens": tokens, **shown}


def token_texts(tokens: Iterable[str]) -> list[str]:
    """Tokens of a vocabulary as readable text, without byte-level and SentencePiece marks."""
    from tokenizers import decoders

    listed = [str(token) for token in tokens]
    if any("▁" in token for token in listed):  # SentencePiece's space
        return [token.replace("▁", " ") for token in listed]
    if any("Ġ" in token or "Ċ" in token for token in listed):  # a byte-level space or line end
        byte_level = decoders.ByteLevel()
        return [byte_level.decode([token]) for token in listed]
    return listed
