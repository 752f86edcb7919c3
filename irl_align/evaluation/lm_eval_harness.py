"""Benchmarks by lm-eval (EleutherAI's harness) on a run's policy or a model's folder.

The result of each task is saved in a file of its own, so that a rerun does the missing tasks only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from irl_align.errors import UserError
from irl_align.evaluation.tables import LEADERBOARD
from irl_align.models.loading import load_model, load_tokenizer, pick_device
from irl_align.models.packing import context_length
from irl_align.utils.files import atomic_write, file_checksum, read_json, to_json

PRESET = "open-llm-leaderboard"


@dataclass(frozen=True)
class Benchmark:
    """A task of lm-eval with its number of examples; None is the task's own number."""

    task: str
    shots: int | None

    @property
    def name(self) -> str:
        """TASK or TASK@SHOTS."""
        return self.task if self.shots is None else f"{self.task}@{self.shots}"


def benchmarks(text: str) -> list[Benchmark]:
    """Tasks of a list `TASK[@SHOTS],...`; the preset's name stands for all of its tasks.

    The default shots of a task on the leaderboard are the leaderboard's. Raises UserError: an item
    of another form.
    """
    tasks: list[Benchmark] = []
    for item in text.split(","):
        task, at, shots = item.strip().partition("@")
        if task == PRESET and not at:
            tasks += [Benchmark(name, number) for name, (number, _) in LEADERBOARD.items()]
        elif task in ("", PRESET) or (at and not shots.isdecimal()):
            raise UserError(
                f"--lm-eval: found {item.strip()!r}, expected TASK or TASK@SHOTS, or {PRESET}"
            )
        else:
            usual = LEADERBOARD[task][0] if task in LEADERBOARD else None
            tasks.append(Benchmark(task, int(shots) if at else usual))
    return list(dict.fromkeys(tasks))


def run_benchmarks(
    policy: Path,
    requested: Sequence[Benchmark],
    results_folder: Path,
    device: str = "auto",
    *,
    tasks_folder: Path | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Results of the language model in a folder on tasks, one after another.

    results_folder: where results are saved. tasks_folder: the user's own task files. limit: rows
    per task, to try things out. Raises UserError: lm-eval is not installed, has no such task, or
    fails, for example because a task's data cannot be loaded.
    """
    if find_spec("lm_eval") is None:
        raise UserError("--lm-eval: lm-eval is not installed; install irl-align[eval]")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks_folder) if tasks_folder else None)
    for benchmark in requested:
        if benchmark.task not in manager.all_tasks:
            raise UserError(
                f"--lm-eval: found {benchmark.task!r}, which is no task of lm-eval "
                f"{version('lm_eval')}; expected one of its tasks (`lm-eval ls tasks`)"
            )
    harness = {"lm_eval": version("lm_eval"), "limit": limit}
    identity = {**harness, "model": file_checksum(policy)}
    if tasks_folder is not None:
        identity["tasks"] = file_checksum(tasks_folder)
    model: Any = None
    results = []
    for benchmark in requested:
        key = hashlib.sha256(json.dumps([identity, benchmark.name]).encode()).hexdigest()[:16]
        path = results_folder / f"{benchmark.task.replace('/', '-')}-{key}.json"
        if not path.is_file():
            model = model or _harness_model(policy, device)
            result = _result(benchmark, model, manager, limit)
            atomic_write(path, to_json(result, indent=2) + "\n")
        fix = "delete it and run irl-align evaluate again"
        results.append({**read_json(path, "a result of lm-eval", fix), **harness})
    return results


def _harness_model(policy: Path, device: str) -> Any:
    """The policy as a model of lm-eval."""
    from lm_eval.models.huggingface import HFLM

    where = pick_device(device)
    model, tokenizer = load_model(policy, where), load_tokenizer(policy)
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        max_length=context_length(model),
        device=str(where),
        batch_size="auto" if where.type == "cuda" else 8,
    )


def _result(benchmark: Benchmark, model: Any, manager: Any, limit: int | None) -> dict[str, Any]:
    """Metrics of one task, as plain data; the standard error of `acc,none` is `acc_stderr,none`."""
    from lm_eval import simple_evaluate

    try:
        output = simple_evaluate(
            model=model,
            tasks=[benchmark.task],
            num_fewshot=benchmark.shots,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    except Exception as error:  # datasets, the Hub and every task raise their own types
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"--lm-eval: {benchmark.task} failed: {cause} (finished tasks are saved; the same "
            "command resumes)"
        ) from error
    assert output is not None
    scores = output["results"][benchmark.task]
    shots = output["n-shot"].get(benchmark.task, benchmark.shots)
    return {
        "task": benchmark.task,
        "shots": shots,
        "version": output["versions"].get(benchmark.task),
        "rows": output["n-samples"].get(benchmark.task, {}).get("effective"),
        "metrics": {
            name: {
                "value": float(value),
                "stderr": error if isinstance(error, int | float) else None,
            }
            for name, value in scores.items()
            if "," in name and "_stderr" not in name and isinstance(value, int | float)
            for error in [scores.get(name.replace(",", "_stderr,", 1))]
        },
    }
