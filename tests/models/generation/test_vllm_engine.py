"""vLLM in this process, for real: seeds, distributions, ends, limits."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.vllm_models import (
    CONTEXT,
    EOS,
    PAD,
    SETTINGS,
    VOCAB,
    build,
    ids,
    largest_gap,
    needs_vllm,
    ragged_prompts,
    save,
    sync,
)
from transformers import PreTrainedModel

from irl_align.errors import UserError
from irl_align.models.generation.protocol import Sampling, generate
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.models.generation.vllm_backend import VLLMGenerator
from irl_align.models.generation.vllm_engine import VLLMEngine

pytestmark = [pytest.mark.vllm, needs_vllm]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policies")


@pytest.fixture(scope="module")
def llama(folder: Path) -> Iterator[tuple[VLLMGenerator, PreTrainedModel]]:
    """One engine with one policy for all tests that only sample."""
    model = build("llama", 0)
    sampler = VLLMGenerator(VLLMEngine(SETTINGS), "float32", CONTEXT)
    sync(sampler, save(model, folder / "shared"), "shared", model)
    yield sampler, model
    sampler.close()


def test_same_key_is_not_synced_again(
    llama: tuple[VLLMGenerator, PreTrainedModel], folder: Path
) -> None:
    sampler, model = llama
    syncs = sampler.syncs

    def refuse(*_: object) -> list[np.ndarray]:
        raise AssertionError("nothing has changed, so nothing is compared")

    sampler.sync(folder / "no such folder", "shared", [EOS], VOCAB, refuse)
    assert sampler.syncs == syncs
    prompts = ragged_prompts(3)
    found = generate(sampler, prompts, Sampling(max_new_tokens=8))
    assert largest_gap(model, prompts, found) < TOLERANCE


# Samples


def test_seed_prompt_and_index_decide_a_sample(
    llama: tuple[VLLMGenerator, PreTrainedModel],
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


def test_the_same_call_gives_the_same_bits(
    llama: tuple[VLLMGenerator, PreTrainedModel],
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
def test_log_probs_are_of_the_distribution_sampled_from(
    llama: tuple[VLLMGenerator, PreTrainedModel], sampling: Sampling
) -> None:
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


def test_greedy_is_that_of_the_transformers_backend(
    llama: tuple[VLLMGenerator, PreTrainedModel],
) -> None:
    sampler, model = llama
    prompts, sampling = ragged_prompts(20), Sampling(n=2, temperature=0, max_new_tokens=24)
    ours = generate(TransformersGenerator(model, [EOS], PAD), prompts, sampling)
    theirs = generate(sampler, prompts, sampling)
    assert ids(ours) == ids(theirs)
    assert largest_gap(model, prompts, theirs) < TOLERANCE  # the model's own, untempered


def test_samples_end_at_eos_or_are_marked(llama: tuple[VLLMGenerator, PreTrainedModel]) -> None:
    sampler, _ = llama
    found = generate(sampler, ragged_prompts(60), Sampling(n=4, max_new_tokens=30))
    flat = [completion for group in found for completion in group]
    for completion in flat:
        assert EOS not in completion.token_ids[:-1]
        assert completion.truncated == (completion.token_ids[-1] != EOS)
        assert not completion.truncated or len(completion.token_ids) == 30
    assert 0 < sum(c.truncated for c in flat) < len(flat)


def test_frequencies_are_the_models_probabilities(
    llama: tuple[VLLMGenerator, PreTrainedModel],
) -> None:
    """Pearson's chi-square over the likeliest tokens and the rest, at the 0.1% level."""
    sampler, model = llama
    prompt, count, bins = [5, 9, 33], 4000, 7
    [found] = generate(sampler, [prompt], Sampling(n=count, max_new_tokens=1))
    with torch.inference_mode():
        probs = model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    likeliest = probs.argsort(descending=True)[:bins].tolist()
    drawn = np.bincount([c.token_ids[0] for c in found], minlength=VOCAB)
    observed = np.array([*drawn[likeliest], count - drawn[likeliest].sum()])
    expected = np.array([*probs[likeliest], 1 - probs[likeliest].sum()]) * count
    assert expected.min() > 5
    assert ((observed - expected) ** 2 / expected).sum() < 24.322  # 7 degrees of freedom


# Limits


def test_prompts_of_one_token_and_of_the_whole_context(
    llama: tuple[VLLMGenerator, PreTrainedModel],
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
def test_bad_prompts_are_named(
    llama: tuple[VLLMGenerator, PreTrainedModel], prompt: list[int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(llama[0], [[5], prompt], Sampling())


def test_two_thousand_prompts(llama: tuple[VLLMGenerator, PreTrainedModel]) -> None:
    """More than fit into vLLM's cache and batch at once; each is answered, and as by itself."""
    sampler, model = llama
    prompts = ragged_prompts(2000, longest=20, seed=4)
    found = generate(sampler, prompts, Sampling(max_new_tokens=6))
    assert len(found) == 2000
    some = slice(0, 2000, 199)
    assert largest_gap(model, prompts[some], found[some]) < TOLERANCE
    assert ids(generate(sampler, prompts[some], Sampling(max_new_tokens=6))) == ids(found[some])


def test_a_consumer_that_goes_away_leaves_nothing_behind(
    llama: tuple[VLLMGenerator, PreTrainedModel],
) -> None:
    sampler, _ = llama
    prompts = ragged_prompts(30)
    stream = sampler.stream(prompts, Sampling(max_new_tokens=20))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    before = generate(sampler, prompts[:4], Sampling(max_new_tokens=8))
    assert ids(before) == ids(generate(sampler, prompts[:4], Sampling(max_new_tokens=8)))


def test_memory_of_many_samples_is_bounded(llama: tuple[VLLMGenerator, PreTrainedModel]) -> None:
    """Few samples are with vLLM at a time, however many are asked for of each prompt."""
    sampler, _ = llama
    inner = sampler.engine._llm.llm_engine  # type: ignore[attr-defined]
    most = 0
    for _ in sampler.stream(ragged_prompts(40), Sampling(n=64, max_new_tokens=3)):
        most = max(most, inner.get_num_unfinished_requests())
    assert 64 <= most <= 512
