"""vLLM in this process: current weights after every sync, samples, limits, and the learner."""

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.vllm_models import (
    CONTEXT,
    EOS,
    PAD,
    RANK,
    SETTINGS,
    VOCAB,
    adapter,
    build,
    ids,
    largest_gap,
    learner_logprobs,
    needs_vllm,
    ragged_prompts,
    save,
    sync,
)
from transformers import PreTrainedModel

from irl_align.config.generation import ServerOptions
from irl_align.config.model import LoraOptions
from irl_align.errors import UserError
from irl_align.models.generation.backends import LiveGenerator
from irl_align.models.generation.protocol import Sampling, generate
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.models.generation.vllm_backend import VLLMGenerator
from irl_align.models.generation.vllm_engine import VLLMEngine
from irl_align.models.lora import DEFAULT_ADAPTER, adapter_weights, add_adapter

pytestmark = [pytest.mark.vllm, needs_vllm]
TOLERANCE = 1e-4
OMP = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "WORLD_SIZE", "RANK")
Llama = tuple[VLLMGenerator, PreTrainedModel]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policies")


@pytest.fixture(scope="module")
def generator(folder: Path) -> Iterator[VLLMGenerator]:
    """The only vLLM of the module; a new shape starts it again."""
    generator = VLLMGenerator(SETTINGS, "vllm", ServerOptions(), folder / "log")
    yield generator
    generator.close()


@pytest.fixture(scope="module")
def llama(generator: VLLMGenerator, folder: Path) -> Llama:
    """vLLM with one policy, for all tests that only sample, and that policy."""
    model = build("llama", 0)
    sync(generator, save(model, folder / "shared"), "shared", model)
    return generator, model


def starts(generator: VLLMGenerator) -> int:
    return 0 if generator.engine is None else generator.engine.starts


# --- samples --------------------------------------------------------------------------------------


def test_a_sample_depends_on_seed_prompt_and_index_only(
    llama: Llama,
) -> None:
    sampler, _ = llama
    prompts = ragged_prompts(8)
    one = generate(sampler, prompts, Sampling(n=1, max_new_tokens=16, seed=7))
    many = generate(sampler, prompts, Sampling(n=70, max_new_tokens=16, seed=7))
    turned = generate(sampler, prompts[::-1], Sampling(n=1, max_new_tokens=16, seed=7))
    other = generate(sampler, prompts, Sampling(n=1, max_new_tokens=16, seed=8))
    assert ids(one) == [group[:1] for group in ids(many)]
    assert ids(one) == ids(turned)[::-1]
    assert ids(one) != ids(other)
    for group in ids(many):
        assert len(group) == 70
        assert len({tuple(sample) for sample in group}) > 60  # samples differ, also past the 64th


def test_the_same_call_gives_bit_identical_samples(
    llama: Llama,
) -> None:
    sampler, _ = llama
    prompts, sampling = ragged_prompts(40), Sampling(n=2, max_new_tokens=20)
    first, second = (generate(sampler, prompts, sampling) for _ in range(2))
    assert ids(first) == ids(second)
    for one, two in zip(first, second, strict=True):
        for a, b in zip(one, two, strict=True):
            assert a.logprobs.tobytes() == b.logprobs.tobytes()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.6, max_new_tokens=12),
        Sampling(top_p=0.7, max_new_tokens=12),
        Sampling(top_k=3, max_new_tokens=12),
        Sampling(temperature=1.5, top_k=20, top_p=0.8, max_new_tokens=12),
    ],
    ids=["temperature", "top_p", "top_k", "all"],
)
def test_logprobs_are_those_of_the_warped_distribution(llama: Llama, sampling: Sampling) -> None:
    """Warped by hand: temperature, then the k likeliest, then the least set reaching top_p."""
    sampler, model = llama
    prompts = ragged_prompts(6)
    for prompt, [sample] in zip(prompts, generate(sampler, prompts, sampling), strict=True):
        row = torch.tensor([[*prompt, *sample.token_ids]])
        with torch.inference_mode():
            logits = model(input_ids=row).logits[0, len(prompt) - 1 : -1].double()
        for step, (token, logprob) in enumerate(
            zip(sample.token_ids, sample.logprobs, strict=True)
        ):
            probs = (logits[step] / sampling.temperature).softmax(-1)
            order = probs.argsort(descending=True)[: sampling.top_k or VOCAB]
            kept = probs[order] / probs[order].sum()
            reached = kept.cumsum(0) - kept < sampling.top_p  # the mass before a token
            order, kept = order[reached], kept[reached] / kept[reached].sum()
            assert token in order.tolist()
            assert logprob == pytest.approx(float(kept[order == token].log()), abs=2e-4)


def test_greedy_samples_equal_the_transformers_backends(
    llama: Llama,
) -> None:
    sampler, model = llama
    prompts, sampling = ragged_prompts(20), Sampling(n=2, temperature=0, max_new_tokens=24)
    ours = generate(TransformersGenerator(model, [EOS], PAD), prompts, sampling)
    theirs = generate(sampler, prompts, sampling)
    assert ids(ours) == ids(theirs)
    assert largest_gap(model, prompts, theirs) < TOLERANCE  # the model's own, untempered


def test_samples_end_at_eos_or_are_truncated(llama: Llama) -> None:
    sampler, _ = llama
    samples = generate(sampler, ragged_prompts(60), Sampling(n=4, max_new_tokens=30))
    flat = [completion for group in samples for completion in group]
    for completion in flat:
        assert EOS not in completion.token_ids[:-1]
        assert completion.truncated == (completion.token_ids[-1] != EOS)
        assert not completion.truncated or len(completion.token_ids) == 30
    assert 0 < sum(c.truncated for c in flat) < len(flat)


def test_samples_stop_at_every_stop_id_and_end_in_the_first(llama: Llama) -> None:
    sampler, model = llama
    stops = [EOS, *range(VOCAB - 8, VOCAB)]
    sampler.sync(Path("unread"), "shared", stops, lambda: model)  # the same weights
    prompts = ragged_prompts(20)
    samples = generate(sampler, prompts, Sampling(n=4, max_new_tokens=30))
    sampler.sync(Path("unread"), "shared", [EOS], lambda: model)
    rows = [(p, c) for p, group in zip(prompts, samples, strict=True) for c in group]
    assert {c.stop is None for _, c in rows} == {True, False}
    for prompt, completion in rows:
        assert completion.truncated == (completion.token_ids[-1] != EOS)
        assert not set(completion.token_ids[:-1]) & set(stops)
        [own] = learner_logprobs(model, [prompt], [completion.sampled_ids])
        assert np.abs(own - completion.logprobs).max() < TOLERANCE


def test_sample_frequencies_match_the_models_probabilities(
    llama: Llama,
) -> None:
    """Pearson's chi-square over the likeliest tokens and the rest, at the 0.1% level."""
    sampler, model = llama
    prompt, count, bins = [5, 9, 33], 4000, 7
    [samples] = generate(sampler, [prompt], Sampling(n=count, max_new_tokens=1))
    with torch.inference_mode():
        probs = model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    likeliest = probs.argsort(descending=True)[:bins].tolist()
    drawn = np.bincount([c.token_ids[0] for c in samples], minlength=VOCAB)
    observed = np.array([*drawn[likeliest], count - drawn[likeliest].sum()])
    expected = np.array([*probs[likeliest], 1 - probs[likeliest].sum()]) * count
    assert expected.min() > 5
    assert ((observed - expected) ** 2 / expected).sum() < 24.322  # 7 degrees of freedom


# --- limits ---------------------------------------------------------------------------------------


def test_prompts_of_one_token_and_of_the_whole_context(
    llama: Llama,
) -> None:
    sampler, model = llama
    rng = np.random.default_rng(3)
    prompts = [[17], rng.integers(2, VOCAB, size=CONTEXT - 1).tolist()]
    [[short], [long]] = generate(sampler, prompts, Sampling(max_new_tokens=40))
    assert 1 <= len(short.token_ids) <= 40
    assert len(long.token_ids) == 1
    assert long.truncated == (long.token_ids != [EOS])
    assert largest_gap(model, prompts, [[short], [long]]) < TOLERANCE


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 1: found no tokens"),
        ([3, VOCAB], "prompt 1: found token ids 3 to 90"),
        ([2] * CONTEXT, "prompt 1: found 96 tokens, expected at most 95"),
    ],
)
def test_generate_refuses_bad_prompts(llama: Llama, prompt: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(llama[0], [[5], prompt], Sampling())


def test_generate_answers_two_thousand_prompts(llama: Llama) -> None:
    """More than fit into vLLM's cache and batch at once; each is sampled as it is by itself."""
    sampler, model = llama
    prompts = ragged_prompts(2000, longest=20, seed=4)
    samples = generate(sampler, prompts, Sampling(max_new_tokens=6))
    assert len(samples) == 2000
    few = slice(0, 2000, 199)
    assert largest_gap(model, prompts[few], samples[few]) < TOLERANCE
    assert ids(generate(sampler, prompts[few], Sampling(max_new_tokens=6))) == ids(samples[few])


def test_a_stream_that_is_closed_early_leaves_no_requests(
    llama: Llama,
) -> None:
    sampler, _ = llama
    prompts = ragged_prompts(30)
    stream = sampler.stream(prompts, Sampling(max_new_tokens=20))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    before = generate(sampler, prompts[:4], Sampling(max_new_tokens=8))
    assert ids(before) == ids(generate(sampler, prompts[:4], Sampling(max_new_tokens=8)))


def test_few_requests_are_with_vllm_at_a_time(llama: Llama) -> None:
    """So memory does not grow with the number of samples."""
    sampler, _ = llama
    assert isinstance(sampler.engine, VLLMEngine)
    inner = sampler.engine.llm.llm_engine
    most = 0
    for _ in sampler.stream(ragged_prompts(40), Sampling(n=64, max_new_tokens=3)):
        most = max(most, inner.get_num_unfinished_requests())
    assert 64 <= most <= 512


# --- weights --------------------------------------------------------------------------------------


def test_sync_with_the_last_key_does_nothing(llama: Llama, folder: Path) -> None:
    generator, model = llama
    syncs = len(generator.sync_seconds)

    def refuse() -> PreTrainedModel:
        raise AssertionError("the weights are the same, so nothing is compared")

    generator.sync(folder / "no such folder", "shared", [EOS], refuse)
    assert len(generator.sync_seconds) == syncs
    prompts = ragged_prompts(3)
    assert largest_gap(model, prompts, generate(generator, prompts, Sampling())) < TOLERANCE


def test_sync_restarts_vllm_once_at_other_log_probs_and_leaves_the_learners_process_alone(
    generator: VLLMGenerator, folder: Path
) -> None:
    """Random numbers, threads and environment are the same after a start and an end of vLLM."""

    def state() -> list[object]:
        return [
            random.getstate(),
            np.random.get_state()[1].tobytes(),
            torch.get_rng_state().numpy().tobytes(),
            torch.get_num_threads(),
            torch.set_num_threads,
            {name: os.environ.get(name) for name in ("LD_PRELOAD", "LOCAL_WORLD_SIZE", *OMP)},
        ]

    stale, current = build("llama", 1), build("llama", 2)
    path = save(current, folder / "current")
    learners = [stale, current]
    before, process = starts(generator), state()
    generator.sync(path, "a", [EOS], lambda: learners.pop(0))
    assert not learners and starts(generator) == before + 1
    generate(generator, ragged_prompts(5), Sampling(max_new_tokens=10))
    assert state() == process

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(UserError, match=r"differ from transformers' by .*backend to transformers"),
    ):
        patch.setattr(generator.engine, "close", lambda: None)  # a restart, but without its time
        generator.sync(path, "b", [EOS], lambda: stale)
    assert generator.key is None


def test_sync_with_a_lora_policy_samples_it_without_merging(
    generator: VLLMGenerator, folder: Path
) -> None:
    base, prompts, gaps = build("llama", 5), ragged_prompts(6), []
    where, before = save(base, folder / "base"), starts(generator)
    for seed in range(2):
        policy = adapter(where, build("llama", 5), seed, folder / f"adapter-{seed}")
        sync(generator, folder / f"adapter-{seed}", f"adapter {seed}", policy)
        completions = generate(generator, prompts, Sampling(max_new_tokens=20))
        assert largest_gap(policy, prompts, completions) < TOLERANCE
        gaps.append(largest_gap(base, prompts, completions))
    assert min(gaps) > 0.1  # the adapter changes the distribution
    assert starts(generator) == before + 1  # the first adapter needs a vLLM that takes adapters


def test_live_generator_sends_only_the_adapter_of_a_lora_policy(
    generator: VLLMGenerator, tmp_path: Path
) -> None:
    where = save(build("llama", 1), tmp_path / "base")
    policy = build("llama", 1)
    targets = ["q_proj", "v_proj", "down_proj"]
    add_adapter(policy, LoraOptions(r=RANK, target_modules=targets), str(where))
    live = LiveGenerator(generator, policy, [EOS])
    prompts, gaps, before = ragged_prompts(6), [], starts(generator)
    for seed in range(3):
        completions = generate(live, prompts, Sampling(max_new_tokens=12))
        assert largest_gap(policy, prompts, completions) < TOLERANCE
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            for weights in adapter_weights(policy, DEFAULT_ADAPTER).values():
                weights.add_(0.2 * torch.randn_like(weights))
        gaps.append(largest_gap(policy, prompts, completions))
    assert min(gaps) > 0.01
    sent = {path.name for path in (Path(live.folder.name) / "policy").iterdir()}
    assert "adapter_model.safetensors" in sent and "model.safetensors" not in sent
    assert starts(generator) == before


def test_sync_with_a_broken_folder_keeps_the_engine(generator: VLLMGenerator, folder: Path) -> None:
    model = build("llama", 0)
    sync(generator, save(model, folder / "right"), "right", model)
    before = starts(generator)
    empty = folder / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((folder / "right" / "config.json").read_text())
    with pytest.raises(UserError, match=r"vLLM cannot load it: no \*\.safetensors there"):
        sync(generator, empty, "empty", model)
    with torch.no_grad():
        model.lm_head.weight[4] = torch.nan
    with pytest.raises(UserError, match="the policy's logits are NaN or infinite"):
        sync(generator, save(model, folder / "nan"), "nan", model)
    sync(generator, folder / "right", "right again", build("llama", 0))
    assert starts(generator) == before


def test_sync_refuses_heads_that_vllm_has_no_kernel_for(folder: Path) -> None:
    model = build("llama", 0)
    path = save(model, folder / "heads")
    config = path / "config.json"
    config.write_text(config.read_text().replace('"head_dim": 32', '"head_dim": 16'))
    generator = VLLMGenerator(SETTINGS, "vllm-server", ServerOptions(), folder / "log")
    with pytest.raises(UserError, match=r"attention heads of 16; vLLM on a CPU has 32, 64"):
        sync(generator, path, "heads", model)


@pytest.mark.parametrize("architecture", ["gpt2", "mistral", "qwen3"])
def test_sync_gives_the_learners_logprobs_every_time(
    generator: VLLMGenerator, folder: Path, architecture: str
) -> None:
    """A new shape starts vLLM, new weights do not.

    qwen3 and gpt2 tie their embeddings: vLLM's own reload keeps the old output layer.
    """
    prompts, sampling, before = (
        ragged_prompts(12),
        Sampling(n=2, max_new_tokens=24),
        starts(generator),
    )
    for seed in range(2):
        model = build(architecture, seed)
        path = save(model, folder / f"{architecture}-{seed}")
        sync(generator, path, f"{architecture} {seed}", model)
        assert largest_gap(model, prompts, generate(generator, prompts, sampling)) < TOLERANCE
    assert starts(generator) == before + 1


def test_live_generator_samples_a_model_in_training_as_it_is(generator: VLLMGenerator) -> None:
    """What PPO does: sample, step, sample; tied embeddings, dropout on, no stage in between."""
    model = build("qwen3", 0).train()
    live = LiveGenerator(generator, model, [EOS])
    prompts, sampling = ragged_prompts(6), Sampling(max_new_tokens=12)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gaps, before = [], len(generator.sync_seconds)
    for step in range(3):
        completions = generate(live, prompts, sampling)
        assert largest_gap(model, prompts, completions) < TOLERANCE
        assert model.training
        generate(live, prompts, replace(sampling, seed=step + 1))  # the same weights: no sync
        assert live.saves == step + 1
        loss = model(input_ids=torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[5, 6, 7, 8]]))
        optimiser.zero_grad()
        loss.loss.backward()
        optimiser.step()
        gaps.append(largest_gap(model, prompts, completions))
    assert np.min(gaps) > 0.01  # a step changes the distribution
    assert len(generator.sync_seconds) == before + 3
