"""Small full loops as commands in forked processes, which inherit the imports.

A forked process runs the command line as its entry point does, in its own process group, and prints
to a file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from support.tiny_runs import BEST, RECIPE, SPIN

from irl_align.errors import UserError
from irl_align.training.run_folder import Run
from irl_align.training.store import verify_stage
from irl_align.utils.files import files_of

NAME = "tiny-seed0"
TIMEOUT = 900.0  # seconds; a command that takes longer hangs
SHORT = (
    "data.task={size: 120, noise: 0.0}",
    "sft.args={num_train_epochs: 4, per_device_train_batch_size: 16, learning_rate: 2.0e-2, "
    "save_steps: 5}",
    "generation.max_new_tokens=48",
    "evaluation={prompts: 6, held_out_prompts: 6, temperatures: [1.0]}",
)
PPO = (
    "policy_update={kind: ppo, batch_size: 16, episodes: 96, learning_rate: 0.001}",
    "policy_update.credit=red",
    "policy_update.checkpoint_every=2",
    "policy_update.evaluate_every=3",
    "policy_update.held_out_prompts=4",
)
LOOPS: dict[str, tuple[str, ...]] = {
    "best-of-n": (*SHORT, *BEST, "policy_update.prompts=12"),
    "ppo": (*SHORT, *PPO),
    "spin": (*SHORT, *SPIN),
}


@dataclass
class Attempt:
    """A command under way."""

    pids: list[int]
    """Process ids; several processes are one rank each."""
    log: Path
    started: float = field(default_factory=time.monotonic)

    def cpu_seconds(self) -> float:
        """Processor time that the first process has used; infinite once it has ended."""
        try:
            process = psutil.Process(self.pids[0])
            if process.status() == psutil.STATUS_ZOMBIE:
                return float("inf")
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            return float("inf")
        return float(times.user + times.system)

    def kill(self, pid: int) -> None:
        """End one of its processes as a crash of the machine does."""
        os.kill(pid, signal.SIGKILL)

    def wait(self) -> Ended:
        """Wait for the end of the command; kill it after TIMEOUT."""
        pid = self.pids[0]
        while True:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() - self.started > TIMEOUT:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        seconds = time.monotonic() - self.started
        said = self.log.read_text(encoding="utf-8", errors="replace")
        code = os.waitstatus_to_exitcode(status)
        return Ended(code, said, usage.ru_utime + usage.ru_stime, seconds)


@dataclass(frozen=True)
class Ended:
    """How a command ended, its output, and its costs."""

    status: int
    said: str
    cpu: float
    seconds: float

    @property
    def message(self) -> str:
        """The error line of the command, or an empty text."""
        lines = [line for line in self.said.splitlines() if line.startswith("irl-align: ")]
        return lines[-1] if lines else ""


def start(folder: Path, loop: Sequence[str], arm: Callable[[], None] | None = None) -> Attempt:
    """`irl-align train` on the tiny recipe with its runs below the folder; ``arm`` is called first
    in the new process."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    log = folder / f"attempt-{len(list(folder.glob('attempt-*')))}.log"
    log.touch()
    pid = os.fork()
    if pid == 0:
        _be_the_command([str(recipe), f"output_dir={folder / 'runs'}", *loop], log, arm)
    return Attempt([pid], log)


def _be_the_command(arguments: list[str], log: Path, arm: Callable[[], None] | None) -> None:
    """Run the command line and leave; never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["irl-align", "train", *arguments]
        if arm is not None:
            arm()
        from irl_align.cli.main import main

        main()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def results(folder: Path) -> dict[str, bytes]:
    """Weights of the final policy and, if there is one, of the reward of a finished run."""
    summary = json.loads((folder / "runs" / NAME / "summary.json").read_text(encoding="utf-8"))
    return {
        name: (folder / "runs" / summary[name] / "model.safetensors").read_bytes()
        for name in ("policy", "reward")
        if summary[name] is not None
    }


def metrics(folder: Path) -> dict[str, Any]:
    """Metrics of a finished run without times, memory and reuse of stages."""
    clocks = ("seconds", "peak", "resumed", "reused", "environment")
    records = Run.load(folder / "runs" / NAME).metrics
    kept = [{k: v for k, v in r.items() if not k.startswith(clocks)} for r in records]
    return {r["key"]: _timeless(r) for r in kept if not r["key"].startswith(("stage/", "env"))}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        drop = ("seconds", "runtime", "per_second", "start")
        return {k: _timeless(v) for k, v in value.items() if not any(d in k for d in drop)}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def half_written(folder: Path) -> list[str]:
    """Incomplete files and stages of a finished run and its store, with what is wrong."""
    runs = folder / "runs"
    faults = [str(path.relative_to(runs)) for path in files_of(runs) if ".partial" in path.name]
    faults += [str(path.relative_to(runs)) for path in runs.rglob("*.writing*")]
    for stage in sorted((runs / "store").glob("[!.]*")):
        try:
            verify_stage(stage)
        except UserError as error:
            faults.append(str(error))
    work = runs / "store/.work"
    left = [path.name for path in work.iterdir() if path.is_dir()]
    faults += [f"unfinished: {name}" for name in left if not name.endswith(".damaged")]
    try:
        view = Run.load(runs / NAME)
        view.samples()
    except UserError as error:
        faults.append(str(error))
    return faults
