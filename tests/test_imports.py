"""Imports run one way between rooms, and need neither a network nor vLLM."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "irl_align"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(source: str, module: str, is_package: bool) -> set[str]:
    """Dotted names that ``source`` imports anywhere, in functions too; relative ones resolved.

    ``from a import b`` gives both ``a`` and ``a.b``, since b may be a module.
    """
    names: set[str] = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - 1 if is_package else node.level
                parts = module.split(".")
                base = ".".join([*parts[: len(parts) - up], *([base] if base else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


IMPORTS = {
    name: imports_of(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
    for name, path in MODULES.items()
}


def importers(target: str) -> set[str]:
    """Modules outside ``target`` that import it or anything inside it."""
    return {
        name
        for name, imported in IMPORTS.items()
        if not within(name, target) and any(within(other, target) for other in imported)
    }


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


# A module imports from its own room and from those to the right of it; type-only imports count.
ROOMS = [
    "cli",
    "hub",
    "evaluation",
    "training",
    "policy",
    "reward",
    "models",
    "data",
    "tasks",
    "config",
    "utils",
]


def room(name: str) -> str:
    """First name below irl_align."""
    return name.split(".")[1] if "." in name else ""


def test_the_package_has_eleven_rooms() -> None:
    there = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert there == {*ROOMS, "__init__.py", "__main__.py", "errors.py", "py.typed"}


def test_imports_run_one_way() -> None:
    upward = {
        (name, other)
        for name, imported in IMPORTS.items()
        for other in imported & set(MODULES)
        if room(name) in ROOMS and room(other) in ROOMS
        if ROOMS.index(room(other)) < ROOMS.index(room(name))
    }
    assert upward == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Packages count as the modules that they re-export."""
    graph = {name: (imported & set(MODULES)) - {name} for name, imported in IMPORTS.items()}
    while leaves := {name for name, imported in graph.items() if not imported & set(graph)}:
        graph = {name: imported for name, imported in graph.items() if name not in leaves}
    assert graph == {}


def test_nothing_imports_the_command_line() -> None:
    assert importers("irl_align.cli.main") == {"irl_align.__main__"}


def test_only_train_and_plan_import_the_loop() -> None:
    users = {"irl_align.training.train", "irl_align.training.plan.walk"}
    assert importers("irl_align.training.loop") == users


PURE = (
    "models.logprobs",
    "policy.ppo.advantages",
    "policy.ppo.losses",
    "reward.losses",
)


@pytest.mark.parametrize("name", PURE)
def test_maths_imports_torch_and_the_standard_library_only(name: str) -> None:
    allowed = {"torch", *sys.stdlib_module_names}
    pure = [f"irl_align.{other}" for other in PURE]
    strangers = {
        other
        for other in IMPORTS[f"irl_align.{name}"]
        if other.split(".")[0] not in allowed and not any(within(other, one) for one in pure)
    }
    assert strangers <= {"irl_align.models"}


def update_of(name: str) -> str:
    """The policy update that a module is part of: a file of policy, or a package of files."""
    return ".".join(name.split(".")[:3])


def test_no_update_of_policy_imports_another() -> None:
    shared = {"irl_align.policy.roles"}
    files = {name for name in MODULES if name.startswith("irl_align.policy.")} - shared
    crossing = {
        (name, other)
        for name in files
        for other in files
        if update_of(name) != update_of(other)
        if any(within(imported, other) for imported in IMPORTS[name])
    }
    assert crossing == set()
    assert update_of("irl_align.policy.ppo.learner") == "irl_align.policy.ppo" in files


def run_python(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# None in sys.modules is what a package that is not installed looks like, to find_spec as well.
BLOCK = """
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("importing touched the network")

sys.modules.update(dict.fromkeys({blocked}))
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def test_every_module_imports_without_network_and_vllm() -> None:
    imports = "\n".join(f"import {name}" for name in MODULES if name != "irl_align.__main__")
    run_python(BLOCK.format(blocked=["vllm"]) + imports)


LIGHT = (
    "",
    ".cli.main",
    ".config.recipe",
    ".data.sources",
    ".training.store",
    *sorted(
        name.removeprefix("irl_align")
        for name in MODULES
        if within(name, "irl_align.evaluation.compare")
        or within(name, "irl_align.evaluation.report")
    ),
)


def test_light_modules_import_without_torch() -> None:
    imports = "\n".join(f"import irl_align{name}" for name in LIGHT)
    run_python(BLOCK.format(blocked=["torch", "transformers", "vllm"]) + imports)
