"""The run folder: the recipe of a run, what the run measured, and links to its stages.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from irl_align.config.yaml import load_plain
from irl_align.errors import UserError
from irl_align.policy.roles import Role, is_evaluation, signs_in
from irl_align.utils.files import (
    atomic_write,
    explains_full_disk,
    locked,
    read_json,
    read_lines,
    to_json,
    to_lines,
)

if TYPE_CHECKING:
    from irl_align.training.store import Stage

T = TypeVar("T")
REBUILD = "delete this stage's folder and run the recipe again"
REPLACED = "replaced.json"
INPUTS = "inputs"
"""Record of what a run reads that its recipe does not name."""
RERUN = "delete this file and run the recipe again, which writes it from finished stages"


class Run:
    """A run folder that this process writes; made by ``Run.open``, read by ``Run.load``.

    It holds ``recipe.yaml`` (resolved), ``recipe.source.yaml`` (as written), ``metrics.jsonl``,
    ``samples/*.jsonl``, ``stages.json`` and, once finished, ``summary.json``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics = {record["key"]: record for record in _read_metrics(folder)}
        self._stages = _read_stages(folder)
        self._replaced = read_replaced(folder)

    @classmethod
    @contextmanager
    def open(
        cls,
        folder: Path,
        recipe_resolved: Mapping[str, Any],
        recipe_text: str,
        replace: bool = False,
        inputs: Mapping[str, str] | None = None,
    ) -> Iterator[Run]:
        """Lock ``folder`` for this process and write the recipe there.

        A finished run of another recipe is refused unless ``replace`` is set. An unfinished run
        may continue with a changed recipe. In both cases the old recipe is moved to
        ``recipe.previous.yaml`` and its results are deleted. Its stages stay in the store: they can
        be reused, and ``irl-align prune`` keeps them (``replaced.json``).

        inputs: what the run reads that its recipe does not name; it counts as part of the recipe.

        Raises:
            UserError: the folder has a finished run of another recipe, another process has the run,
            its files are damaged, or the disk is full.
        """

        def refuse(holder: str) -> None:
            raise UserError(f"run {folder} is in use by {holder}: wait for it, or stop it")

        with explains_full_disk(f"run {folder.name}", folder.parent):
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                if path.is_symlink():
                    raise UserError(
                        f"{path}: found a link, expected a file that a run writes; delete it"
                    )
            with locked(folder / ".lock", refuse):
                _write_recipe(folder, recipe_resolved, dict(inputs or {}), replace)
                atomic_write(folder / "recipe.source.yaml", recipe_text)
                run = cls(folder)
                if inputs:
                    run.log(INPUTS, inputs)
                yield run

    @staticmethod
    def load(folder: Path) -> RunView:
        """Read a run, finished or not.

        Raises:
            UserError: ``folder`` is not a run, or a file in it is damaged.
        """
        expected = "expected the folder of a run, which holds recipe.yaml"
        if not folder.is_dir():
            raise UserError(f"{folder}: found no such folder, {expected}")
        path = folder / "recipe.yaml"
        if not path.is_file():
            raise UserError(f"{folder}: found no recipe.yaml, {expected}")
        try:
            recipe = load_plain(path.read_text(encoding="utf-8"))
        except ValueError as error:  # UnicodeDecodeError among them
            raise UserError(f"{path}: found {error}, expected YAML; {RERUN}") from error
        if not isinstance(recipe, dict):
            raise UserError(f"{path}: found no mapping, expected a recipe; {RERUN}")
        summary = folder / "summary.json"
        return RunView(
            folder,
            _Resolved(path, recipe),
            _read_metrics(folder),
            read_json(summary, "a summary", RERUN) if summary.exists() else None,
            _read_stages(folder),
        )

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of ``metrics.jsonl`` so far."""
        return list(self._metrics.values())

    def log(self, key: str | Role, record: Mapping[str, Any]) -> None:
        """Set the line of ``key`` in ``metrics.jsonl``; a new key goes to the end.

        NaN and infinity become null.
        """
        if "key" in record:
            raise ValueError("the field 'key' is reserved for the key of the record")
        self._metrics[str(key)] = {"key": str(key), **record}
        self._write("metrics.jsonl", to_lines(self._metrics.values()))

    def save_answers(
        self, policy: int, temperature: float, rows: Iterable[Mapping[str, Any]]
    ) -> None:
        """Write the evaluation's samples of a policy, ``samples/policy-<k>-t<temperature>.jsonl``.

        One row is one line.
        """
        name = f"{Role.policy(policy)}-t{temperature:g}"
        self._write(f"samples/{name}.jsonl", to_lines(rows))

    def link(self, role: Role, stage: Stage) -> None:
        """Write to ``stages.json`` which stage has this role in the run.

        The stage that had the role before is added to ``replaced.json``.
        """
        path = Path(os.path.relpath(stage.path, self.folder)).as_posix()
        before = self._stages.get(str(role), {"path": path})["path"]
        if before != path and before not in self._replaced:
            self._replaced.append(before)
            self._write(REPLACED, to_json({"stages": self._replaced}, indent=2) + "\n")
        self._stages[str(role)] = {"name": stage.name, "key": stage.key, "path": path}
        self._write("stages.json", to_json(self._stages, indent=2) + "\n")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``: the run is complete."""
        self._write("summary.json", to_json(summary, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        atomic_write(self.folder / name, text)


class FollowedRun(Run):
    """A run folder that this process does not write: the main one does, or nobody."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics, self._stages, self._replaced = {}, {}, []

    def _write(self, name: str, text: str) -> None:
        pass


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, and no model's: an export holds the recipe that made it too."""
    return (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file()


@dataclass(frozen=True)
class RunView:
    """The contents of a run folder; ``summary`` is None until the run has finished."""

    folder: Path
    recipe: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None
    stages: dict[str, dict[str, str]]

    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """Rows of each ``samples/<name>.jsonl``, by name."""
        paths = sorted((self.folder / "samples").glob("[!.]*.jsonl"))
        return {path.stem: read_lines(path, RERUN) for path in paths}

    def answers(self, policy: int) -> dict[float, list[dict[str, Any]]]:
        """The evaluation's samples of policy k, by temperature in ascending order."""
        prefix = f"{Role.policy(policy)}-t"
        paths = (self.folder / "samples").glob(f"{prefix}*.jsonl")
        by_temperature = {float(path.stem.removeprefix(prefix)): path for path in paths}
        return {t: read_lines(by_temperature[t], RERUN) for t in sorted(by_temperature)}

    @cached_property
    def by_key(self) -> dict[str, dict[str, Any]]:
        """The records of ``metrics.jsonl`` by key."""
        return {record["key"]: record for record in self.metrics}

    def record(self, role: Role) -> dict[str, Any]:
        """The record of ``metrics.jsonl`` with this role as its key; empty if there is none."""
        return self.by_key.get(str(role), {})

    def records(self, kind: str) -> dict[int, dict[str, Any]]:
        """Number -> record, for all roles of one kind."""
        return _numbered(self.by_key, kind)

    def numbered_stages(self, kind: str) -> dict[int, dict[str, str]]:
        """Number -> stage, for all roles of one kind."""
        return _numbered(self.stages, kind)

    def evaluations(self) -> list[dict[str, Any]]:
        """Records of the evaluations of policies, of every temperature."""
        return [record for record in self.metrics if is_evaluation(record)]

    def signs(self) -> list[str]:
        """Warning signs of the run, one line each."""
        return [sign for record in self.metrics for sign in signs_in(record)]

    def require_finished(self) -> dict[str, Any]:
        """The summary. Raises UserError: the run is not finished."""
        if self.summary is None:
            raise UserError(
                f"{self.folder}: this run is not finished; run its recipe again to resume it"
            )
        return self.summary

    def ppo_records(self, file: str = "metrics.jsonl") -> dict[str, list[dict[str, Any]]]:
        """Role -> the lines that a PPO training wrote to a file of its stage.

        metrics.jsonl has a line per update, samples.jsonl a line per stored sample.
        """
        paths = {
            role: self.folder / stage["path"] / file
            for role, stage in self.stages.items()
            if stage["name"] == "ppo"
        }
        return {role: read_lines(path, REBUILD) for role, path in paths.items() if path.is_file()}


def _numbered(by_role: Mapping[str, T], kind: str) -> dict[int, T]:
    roles = {Role.parse(role): value for role, value in by_role.items()}
    return {r.number: v for r, v in roles.items() if r.kind == kind and r.number is not None}


@contextmanager
def records_checked(what: str) -> Iterator[None]:
    """Raise UserError if the block fails on records that no run wrote, such as edited ones."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{what}: found records that no run wrote ({cause}); run its recipe again, which "
            "writes them"
        ) from error


def _write_recipe(
    folder: Path, resolved: Mapping[str, Any], inputs: dict[str, str], replace: bool
) -> None:
    """Write ``recipe.yaml``; results of another recipe are deleted, or the run is refused."""
    path = folder / "recipe.yaml"
    recipe = yaml.safe_dump(dict(resolved), sort_keys=False, allow_unicode=True)
    if path.exists() and (differing := _differences(folder, recipe, inputs)):
        if (folder / "summary.json").exists() and not replace:
            named = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
            raise UserError(
                f"run {folder}: found a finished run with other settings ({named}); add name=... "
                "or --replace"
            )
        print(
            f"run {folder}: the recipe has changed; the old one is now recipe.previous.yaml",
            file=sys.stderr,
        )
        atomic_write(folder / "recipe.previous.yaml", path.read_bytes())
        linked = [stage["path"] for stage in _read_stages(folder).values()]
        replaced = list(dict.fromkeys([*read_replaced(folder), *linked]))
        atomic_write(folder / REPLACED, to_json({"stages": replaced}, indent=2) + "\n")
        for stale in ("metrics.jsonl", "stages.json", "summary.json"):
            (folder / stale).unlink(missing_ok=True)
        shutil.rmtree(folder / "samples", ignore_errors=True)
    atomic_write(path, recipe)


def _differences(folder: Path, recipe: str, inputs: dict[str, str]) -> list[str]:
    """Names of the options and inputs in which the folder's run differs from a new one."""
    content = (folder / "recipe.yaml").read_bytes()
    metrics = {record["key"]: record for record in _read_metrics(folder)}
    before = {name: v for name, v in metrics.get(INPUTS, {}).items() if name != "key"}
    # A run that stopped before it logged anything has no inputs to compare.
    other = sorted(name for name in {**before, **inputs} if before.get(name) != inputs.get(name))
    other = other if metrics else []
    if content == recipe.encode():
        return other
    try:
        old = dict(_leaves(load_plain(content.decode())))
    except ValueError:
        return ["recipe.yaml", *other]
    new = dict(_leaves(load_plain(recipe)))
    names = [name for name in {**old, **new} if old.get(name, _leaves) != new.get(name, _leaves)]
    return [*names, *other] or ["recipe.yaml"]


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every option of a recipe."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


class _Resolved(dict[str, Any]):
    """A run's recipe. Reading a missing group raises UserError: the file is damaged."""

    def __init__(self, path: Path, recipe: Mapping[str, Any]) -> None:
        super().__init__(recipe)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.path}: found no {key}, expected the whole recipe of a run; {RERUN}")


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    records = read_lines(path, RERUN) if path.exists() else []
    for number, record in enumerate(records, 1):
        if "key" not in record:
            raise UserError(f"{path}:{number}: found no field key, expected one; {RERUN}")
    return records


def _read_stages(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / "stages.json"
    stages = read_json(path, "the stages of a run", RERUN) if path.exists() else {}
    for role, stage in stages.items():
        fields = isinstance(stage, dict) and {"name", "key", "path"} <= stage.keys()
        if not fields or not all(isinstance(value, str) for value in stage.values()):
            raise UserError(f"{path}: {role!r}: found no stage's name, key and path; {RERUN}")
        # The check is on names, since the store itself may be a link to a larger disk.
        place = os.path.normpath(Path("run") / stage["path"])  # an absolute path stays one
        if Path(place).parts[0] in ("..", "/"):
            raise UserError(
                f"{path}: {role!r}: found {stage['path']!r}, expected a path next to it"
            )
    return stages


def read_replaced(folder: Path) -> list[str]:
    """Paths, relative to a run folder, of stages that the run no longer links."""
    path = folder / REPLACED
    fix = "delete this file, so that prune no longer keeps the stages of replaced runs"
    stages = read_json(path, "replaced stages", fix).get("stages", []) if path.exists() else []
    return [str(stage) for stage in stages]


def artefact_folder(path: Path, what: str) -> Path:
    """The folder of a run's final `policy` or last `reward`; a model's folder stays as it is."""
    if not is_run(path):
        return path
    summary = Run.load(path).require_finished()
    if summary[what] is None:
        raise no_explicit_reward(path, summary.get("log_ratio") is not None)
    folder = path.parent / str(summary[what])
    if not folder.is_dir():
        raise missing_artefact(path, what, folder)
    return folder


def missing_artefact(run: Path, what: str, folder: Path) -> UserError:
    """The error for a run whose policy or reward is not in its folder."""
    return UserError(
        f"{run}: its {what} should be in {folder}, which is missing; copy the folder store "
        "together with the run, or run its recipe again"
    )


def no_explicit_reward(run: Path, log_ratio: bool) -> UserError:
    """The error for a run without a reward model; log_ratio: it has a ratio of two models."""
    why = ": its reward is the log-ratio of two language models, no classifier" if log_ratio else ""
    return UserError(
        f"{run}: this run has no explicit reward{why}; expected one with reward.kind explicit"
    )
