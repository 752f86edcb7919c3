"""vLLM in this process: current weights after every sync, and the learner left alone."""

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.vllm_models import (
    CONTEXT,
    EOS,
    SETTINGS,
    VOCAB,
    adapter,
    build,
    largest_gap,
    learner_logprobs,
    needs_vllm,
    ragged_prompts,
    save,
    sync,
)
from transformers import PreTrainedModel

from irl_align.errors import UserError
from irl_align.models.generation.protocol import Sampling, generate
from irl_align.models.generation.vllm_backend import VLLMGenerator
from irl_align.models.generation.vllm_engine import VLLMEngine

pytestmark = [pytest.mark.vllm, needs_vllm]
TOLERANCE = 1e-4
OMP = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "WORLD_SIZE", "RANK")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policies")


@pytest.fixture
def engine() -> Iterator[VLLMGenerator]:
    """An engine of its own, ended with the test."""
    sampler = VLLMGenerator(VLLMEngine(SETTINGS), "float32", CONTEXT)
    yield sampler
    sampler.close()


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "mistral"])
def test_logprobs_are_the_learners_after_every_sync(
    engine: VLLMGenerator, folder: Path, architecture: str
) -> None:
    """qwen3 and gpt2 tie their embeddings: vLLM's reload alone keeps the old output layer."""
    prompts, sampling = ragged_prompts(12), Sampling(n=2, max_new_tokens=24)
    for seed in range(3):
        model = build(architecture, seed)
        sync(engine, save(model, folder / f"{architecture}-{seed}"), f"weights {seed}", model)
        found = generate(engine, prompts, sampling)
        assert largest_gap(model, prompts, found) < TOLERANCE
    assert engine.engine.starts == 1  # type: ignore[attr-defined]
    assert engine.syncs == 3


def test_a_lora_policy_is_sampled_without_merging(engine: VLLMGenerator, folder: Path) -> None:
    base = build("llama", 5)
    where = save(base, folder / "base")
    prompts = ragged_prompts(6)
    gaps = []
    for seed in range(3):
        policy = adapter(where, build("llama", 5), seed, folder / f"adapter-{seed}")
        sync(engine, folder / f"adapter-{seed}", f"adapter {seed}", policy)
        found = generate(engine, prompts, Sampling(max_new_tokens=20))
        assert largest_gap(policy, prompts, found) < TOLERANCE
        gaps.append(largest_gap(base, prompts, found))
    assert min(gaps) > 0.1  # the adapter says something
    assert engine.engine.starts == 1  # type: ignore[attr-defined]


def test_other_log_probs_start_the_engine_anew_then_stop(
    engine: VLLMGenerator, folder: Path
) -> None:
    stale, current = build("llama", 1), build("llama", 2)
    path = save(current, folder / "current")
    answers: list[PreTrainedModel] = [stale, current]

    def logprobs(
        prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        return learner_logprobs(answers.pop(0), prompts, completions)

    engine.sync(path, "a", [EOS], VOCAB, logprobs)
    assert not answers and engine.engine.starts == 2  # type: ignore[attr-defined]
    answers += [stale, stale]
    with pytest.raises(UserError, match=r"differ from transformers' by .*backend to transformers"):
        engine.sync(path, "b", [EOS], VOCAB, logprobs)
    assert engine.key is None


def test_a_folder_of_another_shape_starts_an_engine_of_that_shape(
    engine: VLLMGenerator, folder: Path
) -> None:
    for name in ("llama", "llama_tied"):
        model = build(name, 0)
        sync(engine, save(model, folder / f"shape-{name}"), name, model)
    assert engine.engine.starts == 2  # type: ignore[attr-defined]


def test_the_learners_process_is_as_before(engine: VLLMGenerator, folder: Path) -> None:
    """Random numbers, threads and environment; and a model trains to the same bits."""
    model = build("llama", 3)
    path = save(model, folder / "beside")

    def state() -> list[object]:
        return [
            random.getstate(),
            np.random.get_state()[1].tobytes(),
            torch.get_rng_state().numpy().tobytes(),
            torch.get_num_threads(),
            torch.set_num_threads,
            {name: os.environ.get(name) for name in ("LD_PRELOAD", "LOCAL_WORLD_SIZE", *OMP)},
        ]

    before = state()
    sync(engine, path, "beside", model)
    assert state() == before
    generate(engine, ragged_prompts(5), Sampling(max_new_tokens=10))
    assert state() == before
    engine.close()
    assert state() == before


def test_not_finite_log_probs_are_told(engine: VLLMGenerator, folder: Path) -> None:
    model = build("llama", 0)
    with torch.no_grad():
        model.lm_head.weight[4] = torch.nan
    with pytest.raises(UserError, match=r"the policy's logits are NaN or infinite"):
        sync(engine, save(model, folder / "nan"), "nan", model)


def test_heads_that_vllm_has_no_kernel_for(engine: VLLMGenerator, folder: Path) -> None:
    model = build("llama", 0)
    path = save(model, folder / "heads")
    config = path / "config.json"
    config.write_text(config.read_text().replace('"head_dim": 32', '"head_dim": 16'))
    with pytest.raises(UserError, match=r"attention heads of 16; vLLM on a CPU has 32, 64"):
        sync(engine, path, "heads", model)


def test_wrong_weights_in_the_right_shape_do_not_end_the_engine(
    engine: VLLMGenerator, folder: Path
) -> None:
    model = build("llama", 0)
    sync(engine, save(model, folder / "right"), "right", model)
    empty = folder / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((folder / "right" / "config.json").read_text())
    with pytest.raises(UserError, match=r"vLLM cannot load it: no \*\.safetensors there"):
        sync(engine, empty, "empty", model)
    sync(engine, folder / "right", "right again", model)
    assert engine.engine.starts == 1  # type: ignore[attr-defined]
