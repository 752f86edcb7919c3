"""Samples for the report's browser, and PPO samples whose tokens carry credit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from irl_align.files import read_lines
from irl_align.report.curves import by_method
from irl_align.stages import RERUN, RunView
from irl_align.tables import policy_label

BUDGET = 2_500_000  # bytes of samples in a page that is to stay below 5 MB
CREDITED = 8  # samples of the first update that kept some, and as many of the last
CREDIT_BUDGET = 1_000_000
FIELDS = ("prompt", "completion", "demonstrations")
PER_TOKEN = ("credit", "advantage", "kl")


def sample_browser(views: Sequence[RunView]) -> dict[str, Any] | None:
    """Prompts with their demonstrations and what each method says at each temperature.

    Of the first seed only, and evenly chosen prompts where all would be too many. None where there
    are no samples. `rows[i]["s"][t][m]` is [text, scores...] of method m at temperature t, or null.
    """
    if not views:
        return None
    seed = views[0].recipe["seed"]
    columns = _columns([view for view in views if view.recipe["seed"] == seed])
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
        "methods": list(columns),
        "temperatures": temperatures,
        "scores": scores,
        "prompts": len(rows),
        "rows": _within(rows, BUDGET),
    }


def _columns(views: Sequence[RunView]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Label -> temperature -> rows: the policy that the runs start from, then their last ones."""
    columns: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for number in (0, None):
        for view in views:
            assert view.summary is not None
            last = int(view.summary["policy_number"])
            shown = last if number is None else number
            label = policy_label(view, shown)
            if label in columns:
                continue
            prefix = f"policy-{shown}-t"
            files = sorted((view.folder / "samples").glob(f"{prefix}*.jsonl"))
            found = {f.stem.removeprefix(prefix): read_lines(f, RERUN) for f in files}
            if found:
                columns[label] = found
    return columns


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps(row["prompt"], sort_keys=True)


def prompt_text(prompt: Any) -> str:
    """A prompt for people: text, or one line per turn of a conversation."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)


def _cell(row: Mapping[str, Any] | None, scores: Sequence[str]) -> list[Any] | None:
    if row is None:
        return None
    values = [row.get(name) for name in scores]
    return [row["completion"], *(v if isinstance(v, int | float) else None for v in values)]


def _within(rows: list[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """Rows whose JSON is at most `budget` bytes: all of them, or every so many."""
    size = sum(len(json.dumps(row, ensure_ascii=False).encode()) for row in rows)
    keep = len(rows) if size <= budget else int(len(rows) * budget / size * 0.9)
    return [rows[i * len(rows) // keep] for i in range(keep)] if keep else []


def credited_samples(views: Sequence[RunView]) -> list[dict[str, Any]]:
    """Samples of PPO stages with their tokens' credit, advantage and KL: of the first and the last
    update that kept some, of each method's first seed."""
    groups = []
    for name, own in by_method(views).items():
        view = own[0]
        for role, rows in view.ppo_records("samples.jsonl").items():
            chosen = _ends([row for row in rows if _has_credit(row)])
            samples = _within([_credited(row) for row in chosen], CREDIT_BUDGET)
            if samples:
                seed = view.recipe["seed"]
                groups.append({"title": f"{name}, seed {seed}, {role}", "samples": samples})
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
            # Share of the sample's largest value, for the shade of the token.
            "shades": {n: round((row[n][i] or 0.0) / largest[n], 3) for n in names},
        }
        for i, text in enumerate(token_texts(row["tokens"]))
    ]
    shown = {name: row.get(name) for name in ("update", "reward", "return", "truncated")}
    return {"prompt": prompt_text(row["prompt"]), "names": names, "tokens": tokens, **shown}


def token_texts(tokens: Iterable[str]) -> list[str]:
    """Tokens of a vocabulary as people read them: byte-level and SentencePiece marks undone."""
    from tokenizers import decoders

    listed = [str(token) for token in tokens]
    if any("▁" in token for token in listed):  # SentencePiece's space
        return [token.replace("▁", " ") for token in listed]
    if any("Ġ" in token or "Ċ" in token for token in listed):  # a byte-level space, a line's end
        byte_level = decoders.ByteLevel()
        return [byte_level.decode([token]) for token in listed]
    return listed
