"""Run folders written by hand, for tests of what only reads them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from irl_align.policy.roles import Role
from irl_align.training.run_folder import Run, RunView
from irl_align.training.store import Stage
from irl_align.utils.files import atomic_write, to_lines

CHECKSUMS = {"sft": "a", "reward": "a", "held_out": "b", "evaluation": "c"}


def synthetic_recipe(name: str, seed: int, **options: Any) -> dict[str, Any]:
    """What comparisons read of a recipe; `options` replaces whole groups."""
    recipe = {
        "name": name,
        "seed": seed,
        "data": {"card": "toy", "path": None, "share": 1.0},
        "sft": {"enabled": True},
        "generation": {"top_p": 1.0, "top_k": 0, "max_new_tokens": 64},
        "reward": {"kind": "explicit"},
        "policy_update": {"kind": "best_of_n", "n": 4, "use": "sft"},
        "loop": {"iterations": 1},
        "evaluation": {"split": "test", "temperatures": [1.0, 0.0]},
    }
    return {**recipe, **options}


def synthetic_run(
    root: Path,
    name: str,
    seed: int,
    errors: list[tuple[float, float]],
    *,
    recipe: dict[str, Any] | None = None,
    final: int | None = None,
    finished: bool = True,
    extra: dict[str, Any] | None = None,
    samples: dict[str, list[dict[str, Any]]] | None = None,
    checksums: dict[str, str] | None = None,
) -> Path:
    """A run whose policy k has the slot error rates errors[k] at temperatures 1 and 0.

    Policy 0 is shared by all runs of a seed (100 s), every later one is the run's own (10 s each).
    """
    folder = root / f"{name}-seed{seed}"
    recipe = recipe or synthetic_recipe(name, seed)
    with Run.open(folder, recipe, f"name: {name}\n") as run:
        run.log("data", {"checksums": checksums or {**CHECKSUMS, "sft": f"a{seed}"}})
        demonstrations = {"slot_error_rate": 0.05, "fully_right": 0.8}
        gold = {"gold": "toy:gold", "headline": "slot_error_rate", "lower_is_better": True}
        run.log("evaluation/demonstrations", {**gold, "length": 20.0, "metrics": demonstrations})
        for k, at in enumerate(errors):
            owner = f"s{seed}" if k == 0 else f"{name}-s{seed}"
            role, cost = ("sft", 100.0) if k == 0 else (f"policy-{k}", 10.0)
            record = {
                "stage": "sft" if k == 0 else "best-of-n-sft",
                "stage_key": f"{owner}-{k}",
                "reused": False,
            }
            run.log(f"stage/{role}", {**record, "seconds": cost, "peak_rss_mib": 512.0})
            key = f"{owner}-{k}-t1"
            stage = Stage("evaluation", key, root / "store" / key, {}, {}, reused=False)
            run.link(Role.evaluation(k, 1.0), stage)
            if k:
                run.log(f"reward/{k - 1}", reward_record(0.70 + 0.05 * k))
            vitals = {"fresh": accuracy_record(0.6), "demonstration_logp": -30.0} if k else {}
            run.log(f"vitals/{k}", vitals)
            for temperature, value in zip((1.0, 0.0), at, strict=True):
                signs = {"kl": float(k), "entropy": 1.5, "truncated": 0.0}
                run.log(
                    f"evaluation/{k}/t{temperature:g}",
                    {
                        "policy": k,
                        "temperature": temperature,
                        **gold,
                        "length": 25.0,
                        **(signs if temperature == 1.0 else {}),
                        "metrics": {"slot_error_rate": value, "bleu": 40.0},
                    },
                )
        for key, record in (extra or {}).items():
            run.log(key, record)
        for file, rows in (samples or {}).items():
            atomic_write(folder / "samples" / f"{file}.jsonl", to_lines(rows))
        if finished:
            number = len(errors) - 1 if final is None else final
            run.finish({"policy_number": number, "ended": "1 iterations done", "seconds": 1.0})
    return folder


def accuracy_record(accuracy: float, **others: float | None) -> dict[str, Any]:
    """What `margin_report` gives of 100 pairs of 50 prompts with this accuracy."""
    interval = [max(0.0, accuracy - 0.1), min(1.0, accuracy + 0.1)]
    counts = {"pairs": 100, "prompts": 50}
    return {**counts, "accuracy": accuracy, "accuracy_interval": interval, "loss": 0.5, **others}


def audit_record(**shares: float) -> dict[str, Any]:
    """What `shortcut_audit` gives of 100 pairs of 50 prompts; other shares are 0.5."""
    names = ("length", "truncation", "logprob_sum", "logprob_mean")
    known = {**dict.fromkeys(names, 0.5), **shares}
    intervals = {name: [share - 0.1, share + 0.1] for name, share in known.items()}
    return {"pairs": 100, "prompts": 50, **known, "intervals": intervals}


def reward_record(accuracy: float) -> dict[str, Any]:
    """What measure_reward logs of an iteration's reward."""
    held = accuracy_record(accuracy, margin=1.0, calibration_error=0.02)
    audit = audit_record(length=0.55, logprob_sum=0.6, logprob_mean=0.58)
    return {"held_out": held, "older": {}, "audit": audit, "by_source": {}}


def trained_run(
    root: Path,
    seed: int,
    golds: Sequence[float | None],
    kls: Sequence[float] | None = None,
    bleus: Sequence[float] = (),
) -> RunView:
    """A run whose PPO had rollouts of this gold, and BLEU, at these KLs, 8 samples each."""
    recipe = synthetic_recipe("m", seed, policy_update={"kind": "ppo", "batch_size": 8})
    run = synthetic_run(root, "m", seed, [(0.3, 0.2), (0.2, 0.1)], recipe=recipe)
    stage = root / f"store/ppo-{seed}"
    stage.mkdir(parents=True)
    rows = [
        {"reward": 2.0 * kl, "kl": kl, "length": 9.0, "update": number}
        | {"episodes_done": 8 * number, "gold_slot_error_rate": gold}
        for number, (gold, kl) in enumerate(zip(golds, kls or [0.1] * len(golds), strict=True), 1)
    ]
    for row, bleu in zip(rows, bleus, strict=False):
        row["gold_bleu"] = bleu
    (stage / "metrics.jsonl").write_text(to_lines(rows), encoding="utf-8")
    stages = json.loads((run / "stages.json").read_text(encoding="utf-8"))
    stages["policy-1"] = {"name": "ppo", "key": str(seed), "path": f"../store/ppo-{seed}"}
    (run / "stages.json").write_text(json.dumps(stages), encoding="utf-8")
    return Run.load(run)
