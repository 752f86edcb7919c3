"""Imports point one way, and importing needs neither a network nor vLLM."""

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

    ``from a import b`` gives both ``a`` and ``a.b``, since b may be a module. What is imported for
    type checkers alone does not count: nothing depends on it when it runs.
    """
    found: set[str] = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - 1 if is_package else node.level
                parts = module.split(".")
                base = ".".join([*parts[: len(parts) - up], *([base] if base else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


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


def test_imports_of_resolves_every_form() -> None:
    source = textwrap.dedent(
        """
        import torch.nn as nn
        from . import ppo
        from ..maths.losses import pair_loss
        def late():
            from irl_align import cli
        """
    )
    expected = {
        "torch.nn",
        "irl_align.policy",
        "irl_align.policy.ppo",
        "irl_align.maths.losses",
        "irl_align.maths.losses.pair_loss",
        "irl_align",
        "irl_align.cli",
    }
    assert imports_of(source, "irl_align.policy.sft", is_package=False) == expected
    from_init = imports_of("from .ppo import PPO", "irl_align.policy", is_package=True)
    assert from_init == {"irl_align.policy.ppo", "irl_align.policy.ppo.PPO"}


# From the bottom up: a module imports from layers below its own only. A package is one entry.
LAYERS = (
    "hygiene watch",
    "errors maths memory options resources rewardbench sdpa statistics",
    "batch_shares batches chat_endpoint columns leaderboard lora_options ranks sweep",
    "policy_options",
    "grid short_attention terminal",
    "config files machine neighbours recipe_yaml tasks tokenizer",
    "adapters plan_hardware",
    "generate sharded",
    "reward_health run_folder",
    "cards loop_trackers model_shapes models recipe_args samples stages trainers",
    "costs evaluate memory_guard prune recipe sources tables",
    "data comparison",
    "cost_tables frontier learning_speed noise",
    "comparison_tables preference_report same_kl",
    "evaluation_tables",
    "evaluation_measures pairs tokens",
    "contrast preference_sets reward",
    "backends ranking",
    "policy",
    "lab",
    "extra_prompts preference_rival",
    "plan_data prepare saved_sampler",
    "pair_step plan_costs policy_step",
    "reward_step",
    "measure",
    "loop",
    "api best_of_curve compare plan_store preference_eval report serve smoke_data",
    "data_report harness hub plan smoke standalone",
    "disk policy_eval",
    "endpoint_judge",
    "evaluate_run",
    "comparison_cli hub_cli plan_cli prune_cli vllm_cli",
    "cli",
)
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names.split()}


def top(name: str) -> str:
    """First name below irl_align: the package or module that has a layer."""
    return name.split(".")[1] if "." in name else ""


def test_every_module_has_a_layer() -> None:
    assert {top(name) for name in MODULES} - {"", "__main__"} <= set(LAYER)


def test_imports_go_down_the_layers() -> None:
    upward = {
        (name, other)
        for name, imported in IMPORTS.items()
        if top(name) in LAYER
        for other in imported & set(MODULES)
        if top(other) not in ("", top(name)) and LAYER[top(other)] >= LAYER[top(name)]
    }
    assert upward == set()


def test_nothing_imports_the_command_line() -> None:
    assert importers("irl_align.cli") == {"irl_align.__main__"}


def test_only_the_programming_interface_imports_the_loop() -> None:
    assert importers("irl_align.loop") == {"irl_align.api"}


def test_maths_imports_torch_and_the_standard_library_only() -> None:
    allowed = {"torch", *sys.stdlib_module_names}
    strangers = {
        (name, other)
        for name, imported in IMPORTS.items()
        if within(name, "irl_align.maths")
        for other in imported
        if other.split(".")[0] not in allowed and not within(other, "irl_align.maths")
    }
    assert strangers == set()


def update_of(name: str) -> str:
    """The policy update that a module is part of: a file of policy, or a package of files."""
    return ".".join(name.split(".")[:3])


def test_no_update_of_policy_imports_another() -> None:
    files = {name for name in MODULES if name.startswith("irl_align.policy.")}
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


LIGHT = ("", ".cli", ".recipe", ".report", ".resources", ".sources", ".stages", ".tables")


@pytest.mark.parametrize("name", [f"irl_align{name}" for name in LIGHT])
def test_light_modules_import_without_torch(name: str) -> None:
    if name not in MODULES:
        pytest.skip(f"{name} is not there yet")
    run_python(BLOCK.format(blocked=["torch", "transformers", "vllm"]) + f"import {name}")
