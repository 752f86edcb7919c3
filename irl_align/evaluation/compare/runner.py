"""`irl-align compare`: runs the recipes of several methods with several seeds, each run in its own
process.

The store shares stages, so what methods have in common is built once per seed. A finished run costs
nothing, and the same command resumes a stopped comparison.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from irl_align.config.recipe import load_recipe, to_dict
from irl_align.config.schema import Recipe
from irl_align.errors import UserError
from irl_align.evaluation.compare.aggregate import (
    FILE,
    AnalysisOptions,
    analyse,
    compare_runs,
)
from irl_align.evaluation.compare.memory_guard import GIB, MemoryGuard, gpu_in_use
from irl_align.evaluation.compare.sweep import Sweep, named, parse_sweeps, settings
from irl_align.evaluation.compare.tables import to_csv, to_markdown
from irl_align.evaluation.tables import evaluated_runs
from irl_align.training.run_folder import Run, RunView
from irl_align.utils.files import atomic_write, to_json

logger = logging.getLogger(__name__)
POLL = 0.2  # seconds between looks at the running processes


@dataclass(frozen=True)
class Job:
    """One run: a recipe, its overrides, and its folder."""

    path: Path
    overrides: tuple[str, ...]
    recipe: Recipe
    swept: dict[str, str] | None = None
    """A swept recipe's place on a curve: `family` names the curve (the recipe's name and the values
    of all sweeps but the last), and `value` is the last sweep's value."""

    @property
    def folder(self) -> Path:
        """Folder of the run, as `train` names it."""
        return Path(self.recipe.output_dir) / f"{self.recipe.name}-seed{self.recipe.seed}"

    def finished(self) -> RunView | None:
        """The run, if it exists, has finished and has this recipe."""
        if not (self.folder / "summary.json").is_file():
            return None
        view = Run.load(self.folder)
        return view if dict(view.recipe) == to_dict(self.recipe) else None


def plan(arguments: Sequence[str], seeds: Sequence[int], swept: Sequence[str] = ()) -> list[Job]:
    """The runs of all recipes with all seeds. Arguments are recipes, `key=value` for all of them,
    and `NAME:key=value` for the recipe of that name or file.

    swept: `[NAME:]key=value,value,...` gives a recipe one run for every value. Raises UserError: no
    recipe, two with the same name, an override of an unknown recipe, runs in several folders, or
    two runs in one.
    """
    sweeps = parse_sweeps(swept)
    overrides = [a for a in arguments if "=" in a and not Path(a).is_file()]
    paths = [Path(a) for a in arguments if a not in overrides]
    if not paths:
        raise UserError("compare: found no recipe, expected at least one YAML file or run folder")
    jobs = [job for path in paths for job in _jobs_of(path, overrides, seeds, sweeps)]
    names: dict[str, Path] = {}
    for job in jobs:
        other = names.setdefault(job.recipe.name, job.path)
        if other != job.path or paths.count(job.path) > 1:
            raise UserError(
                f"{job.path}: name: found {job.recipe.name!r}, which {other} also has; expected "
                "a different name"
            )
    _check_folders(jobs)
    own = [load_recipe(path).name for path in paths]
    for override, target in [
        *((override, _target(override)[0]) for override in overrides),
        *((sweep.text, sweep.target) for sweep in sweeps),
    ]:
        if target not in (None, *own, *(path.stem for path in paths)):
            expected = ", ".join(own)
            raise UserError(f"{override}: found no recipe {target!r}, expected one of {expected}")
    folders = sorted({job.recipe.output_dir for job in jobs})
    if len(folders) > 1:
        raise UserError(
            f"output_dir: found {' and '.join(folders)}, expected the same in all recipes, so that "
            "they share stages"
        )
    return jobs


def _check_folders(jobs: Sequence[Job]) -> None:
    """Raise UserError if values of a sweep differ only in characters that names cannot have."""
    seen: dict[tuple[str, int], Job] = {}
    for job in jobs:
        other = seen.setdefault((job.recipe.name, job.recipe.seed), job)
        if other is job:
            continue
        pairs = zip(other.overrides, job.overrides, strict=True)
        differing = [pair for pair in pairs if pair[0] != pair[1]]
        if not differing:
            raise UserError(f"seeds: found {job.recipe.seed} twice, expected each once")
        one, two = map(", ".join, zip(*differing, strict=True))
        raise UserError(
            f"--sweep: found {one} and {two}, whose runs would both be {job.folder}; expected "
            "values that differ in letters, digits, '.', '_' or '-'"
        )


def _jobs_of(
    path: Path, overrides: Sequence[str], seeds: Sequence[int], sweeps: Sequence[Sweep]
) -> list[Job]:
    """The runs of one recipe: every combination of its sweeps' values with every seed."""
    name = load_recipe(path).name
    matching = (None, path.stem, name)
    own = tuple(option for target, option in map(_target, overrides) if target in matching)
    jobs = []
    for chosen in settings([sweep for sweep in sweeps if sweep.target in matching]):
        for seed in seeds:
            options = (*own, *chosen, f"seed={seed}")
            recipe = load_recipe(path, options)
            swept = None
            if chosen:
                swept = {"family": named(recipe.name, chosen[:-1]), "value": chosen[-1]}
                options = (*options, f"name={named(recipe.name, chosen)}")
                recipe = load_recipe(path, options)
            jobs.append(Job(path, options, recipe, swept))
    return jobs


def _target(override: str) -> tuple[str | None, str]:
    """(recipe that an override is for, or None for all recipes; the override itself)."""
    key, _, value = override.partition("=")
    target, colon, rest = key.partition(":")
    return (target, f"{rest}={value}") if colon else (None, override)


def run_jobs(
    jobs: Sequence[Job], parallel: int, logs: Path, replace_runs: bool = False
) -> list[str]:
    """Run the jobs that are not finished, at most `parallel` at a time and as many as memory holds.

    Each run is `irl-align train` in a process with its share of the threads; its output goes to
    logs/RUN.log. Runs of different seeds, which share few stages, run at the same time first.
    replace_runs: finished runs of the same names with other settings are replaced.
    Returns one message for each run that failed.
    """
    waiting, finished = [], []
    for job in jobs:
        view = job.finished()
        if view is None:
            waiting.append(job)
        else:
            finished.append(view)
            logger.info("%s: finished before", job.folder.name)
    at_a_time = max(1, min(parallel, len(waiting)))
    guard = MemoryGuard(finished, gpu_in_use(at_a_time))
    environment = job_environment(at_a_time)
    options = ["--replace"] if replace_runs else []
    running: dict[subprocess.Popen[bytes], tuple[Job, float]] = {}
    failed: list[str] = []
    # Only Python's main thread may set a signal handler.
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGTERM, _stop) if is_main else None
    try:
        while waiting or running:
            while waiting and len(running) < parallel and _has_room(guard, running):
                job = next_job(waiting, {job.recipe.seed for job, _ in running.values()})
                waiting.remove(job)
                logger.info("%s: started", job.folder.name)
                running[_start(job, logs, environment, options)] = (job, time.monotonic())
            for process in [p for p in running if p.poll() is not None]:
                job, start = running.pop(process)
                took = time.monotonic() - start
                if process.returncode == 0:
                    logger.info("%s: finished in %.0f s", job.folder.name, took)
                    if (view := job.finished()) is not None:
                        guard.note(view)
                else:
                    failed.append(f"{job.folder.name}: {_last_line(_log(logs, job))}")
                    logger.warning("%s: failed after %.0f s", job.folder.name, took)
            time.sleep(POLL if running else 0)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        if is_main:
            signal.signal(signal.SIGTERM, handler)
    return failed


def _stop(number: int, frame: Any) -> None:
    """End by an exception, so that the running processes are ended too."""
    raise SystemExit(128 + number)


def _has_room(guard: MemoryGuard, running: Collection[subprocess.Popen[bytes]]) -> bool:
    """Whether memory has room for another run; if not, log it once per number of running runs."""
    if guard.fits([process.pid for process in running]):
        return True
    if guard.logged_at != len(running):
        guard.logged_at = len(running)
        on_gpu = f" and {guard.need_cuda / GIB:.1f} GiB of GPU memory" if guard.need_cuda else ""
        logger.warning(
            "another run waits for memory: %d are running, and one needs about %.1f GiB%s",
            len(running),
            guard.need / GIB,
            on_gpu,
        )
    return False


def next_job(waiting: Sequence[Job], busy: set[int]) -> Job:
    """The job to start next: the first whose seed is not busy, else the first."""
    return next((job for job in waiting if job.recipe.seed not in busy), waiting[0])


def job_environment(parallel: int) -> dict[str, str]:
    """Environment variables of a run that has its share of the threads."""
    if parallel == 1:
        return dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdigit() else cores or 1
    return {**os.environ, "OMP_NUM_THREADS": str(max(1, threads // parallel))}


def _start(
    job: Job, logs: Path, environment: dict[str, str], options: Sequence[str]
) -> subprocess.Popen[bytes]:
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "irl_align", "train", str(job.path), *job.overrides, *options]
    with _log(logs, job).open("wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )


def _log(logs: Path, job: Job) -> Path:
    return logs / f"{job.folder.name}.log"


def _last_line(log: Path) -> str:
    lines = [
        line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line
    ]
    return lines[-1].removeprefix("irl-align: ") if lines else f"no output; see {log}"


@dataclass(frozen=True)
class CompareOptions:
    """Options of `irl-align compare` besides the recipes."""

    seeds: tuple[int, ...]
    output: Path | None = None
    parallel: int = 1
    only_finished: bool = False
    iterations: bool = False
    force: bool = False
    replace: bool = False
    """Replace finished runs of the same names with other settings."""
    sweeps: tuple[str, ...] = ()
    analysis: AnalysisOptions = field(default_factory=AnalysisOptions)


@dataclass(frozen=True)
class Compared:
    """What a comparison left behind."""

    analysis: dict[str, Any]
    """As in comparison.json."""
    folder: Path
    failed: list[str]
    """One message for each run that failed."""


def compare(arguments: Sequence[str], options: CompareOptions) -> Compared:
    """Run what is missing, then write comparison.json, .csv and .md.

    Arguments are recipes and overrides (see `plan`), or folders of runs, which are compared as they
    are. Raises UserError.
    """
    for level in options.analysis.levels:
        if not math.isfinite(level):
            raise UserError(f"--gold-level: found {level}, expected a finite number")
    for kl in options.analysis.kls:
        if not (math.isfinite(kl) and kl > 0.0):
            raise UserError(f"--at-kl: found {kl}, expected a finite number above 0")
    folders = [Path(a) for a in arguments if Path(a).is_dir()]
    failed: list[str] = []
    swept: dict[str, dict[str, str]] = {}
    if folders:
        if len(folders) < len(arguments):
            extra = next(a for a in arguments if not Path(a).is_dir())
            raise UserError(
                f"compare: found runs and {extra!r}, expected only runs or only recipes"
            )
        if options.sweeps:
            raise UserError("--sweep: found runs, expected recipes: runs are compared as they are")
        runs = [Run.load(folder) for folder in folders]
        views = [view for view in runs if view.summary is not None]
        missing = [f"{view.folder}: not finished" for view in runs if view.summary is None]
        output = options.output or folders[0].parent / "comparison"
    else:
        jobs = plan(arguments, options.seeds, options.sweeps)
        swept = {job.recipe.name: job.swept for job in jobs if job.swept is not None}
        output = options.output or Path(jobs[0].recipe.output_dir) / "comparison"
        if not options.only_finished:
            failed = run_jobs(jobs, options.parallel, output / "logs", options.replace)
        finished = [(job, job.finished()) for job in jobs]
        views = [view for _, view in finished if view is not None]
        missing = [f"{job.folder}: no finished run of this recipe" for job, v in finished if not v]
    if failed and not views:
        raise UserError("\n".join(failed))
    evaluated = evaluated_runs(views)
    comparison = compare_runs(views, options.iterations, options.force, missing, evaluated)
    analysis = analyse(comparison, replace(options.analysis, swept=swept))
    return Compared(_write(output, analysis, comparison.runs), output, failed)


def _write(output: Path, analysis: dict[str, Any], views: Sequence[RunView]) -> dict[str, Any]:
    """Write a comparison's files; the paths of run folders in them are relative."""
    runs = [
        {
            "method": view.recipe["name"],
            "seed": view.recipe["seed"],
            "path": Path(os.path.relpath(view.folder, output)).as_posix(),
        }
        for view in views
    ]
    analysis = {**analysis, "runs": runs}
    atomic_write(output / "comparison.csv", to_csv(analysis))
    atomic_write(output / "comparison.md", to_markdown(analysis))
    atomic_write(output / FILE, to_json(analysis, indent=2) + "\n")
    return analysis
