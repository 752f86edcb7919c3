"""Runs for the report's tests, with texts that try to break out of the page."""

import json
from pathlib import Path
from typing import Any

from irl_align.utils.files import to_lines
from support.synthetic_runs import synthetic_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"quotes\" 'too' \u2028"


def rows(texts: list[str], errors: float) -> list[dict[str, Any]]:
    return [
        {"prompt": f"prompt {i} {HOSTILE}", "completion": t, "demonstrations": [f"demo {HOSTILE}"]}
        | {"slot_errors": errors + i, "fully_right": 0.0}
        for i, t in enumerate(texts)
    ]


def samples(texts: list[str]) -> dict[str, list[dict[str, Any]]]:
    return {f"policy-{k}-t{t}": rows(texts, k) for k in (0, 1) for t in ("1", "0")}


def a_run(root: Path, name: str = "m", seed: int = 1, **options: Any) -> Path:
    texts = [HOSTILE, "second"]
    errors = [(0.3, 0.2), (0.2, 0.1)]
    return synthetic_run(root, name, seed, errors, samples=samples(texts), **options)


def with_ppo(run: Path) -> Path:
    """A PPO stage beside the run's others, with a sample whose tokens carry credit."""
    stage = run.parent / "store/ppo-1"
    stage.mkdir(parents=True)
    sample = {
        "update": 1,
        "prompt": f"ask {HOSTILE}",
        "completion": "the <b>cat",
        "reward": 1.5,
        "truncated": True,
        "tokens": ["the", "Ġ<b>", "Ġcat"],
        "credit": [0.5, -1.0, 0.0],
        "kl": [0.0, 0.1, 0.2],
        "advantage": [1.0, 2.0, -4.0],
    }
    later = [{**sample, "update": u, "reward": float(u)} for u in (2, 3)]
    broken = {**sample, "credit": [0.5], "prompt": "not shown"}
    (stage / "samples.jsonl").write_text(to_lines([sample, broken, *later]), encoding="utf-8")
    updates = [{"reward": 0.1 * i, "kl": 0.2 * i, "length": 20.0} for i in range(5)]
    (stage / "metrics.jsonl").write_text(to_lines(updates), encoding="utf-8")
    stages = json.loads((run / "stages.json").read_text())
    stages["policy-1"] = {"name": "ppo", "key": "1", "path": "../store/ppo-1"}
    (run / "stages.json").write_text(json.dumps(stages))
    return run
