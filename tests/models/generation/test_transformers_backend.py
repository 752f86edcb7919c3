"""Sampling: determinism, agreement with transformers, limits and errors."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from irl_align.errors import UserError
from irl_align.models.generation.protocol import Completion, Sampling, generate
from irl_align.models.generation.sampler import sample_tokens, warp
from irl_align.models.generation.transformers_backend import TransformersGenerator

VOCAB, PAD, EOS, CONTEXT = 40, 0, 1, 48


def build(family: str) -> PreTrainedModel:
    """A tiny float64 model with peaked, prompt-dependent distributions, in eval mode."""
    torch.manual_seed(7)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4}
    rope = {"num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": CONTEXT}
    grouped = {**sizes, **rope, "num_key_value_heads": 2}
    if family == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**grouped))
    elif family == "gpt2":
        gpt2 = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT)
        model = GPT2LMHeadModel(gpt2)
    elif family == "neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **rope))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**grouped, head_dim=8))
    else:
        model = MistralForCausalLM(MistralConfig(**grouped, sliding_window=6))
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(3 if weights.ndim > 1 else 1)
    return model.double().eval()


GPT2_FOR_PROPERTIES = build("gpt2")
FAMILIES = ["llama", "gpt2", "neox", "qwen3", "mistral"]


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {family: build(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def llama(models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return models["llama"]


def ragged_prompts(count: int, longest: int = 20, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, size=count)
    return [rng.integers(2, VOCAB, size=length).tolist() for length in lengths]


def sampler(model: PreTrainedModel, **limits: int) -> TransformersGenerator:
    return TransformersGenerator(model, [EOS], PAD, **limits)


def ids(completions: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in completions]


class FixedLogits(torch.nn.Module):
    """An output layer that gives the same logits everywhere, so probabilities are known."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits.to(hidden.dtype).expand(*hidden.shape[:-1], -1)


# 99.9% quantiles of the chi-square distribution by degrees of freedom, from printed tables.
CHI_SQUARE_999 = {2: 13.816, 3: 16.266, 8: 26.124, 15: 37.697}


def fits(observed: np.ndarray, expected: np.ndarray) -> bool:
    """Pearson's chi-square test of counts, at the 0.1% level."""
    statistic = ((observed - expected) ** 2 / expected).sum()
    return bool(statistic < CHI_SQUARE_999[len(observed) - 1])


def with_fixed_logits(logits: torch.Tensor) -> PreTrainedModel:
    model = build("llama")
    model.lm_head = FixedLogits(logits)
    return model


# Agreement with transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_model_generate(models: dict[str, PreTrainedModel], family: str) -> None:
    model, prompts = models[family], ragged_prompts(9)
    # Few rows, so that rows leave, the cache is compacted and others join.
    ours = generate(
        sampler(model, max_batch_rows=4), prompts, Sampling(temperature=0, max_new_tokens=24)
    )
    for prompt, [completion] in zip(prompts, ours, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )[0, len(prompt) :].tolist()
        assert completion.token_ids == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(n=3, max_new_tokens=24),
        Sampling(n=3, temperature=1.7, top_k=9, top_p=0.8, max_new_tokens=24),
        Sampling(temperature=0, max_new_tokens=24),
    ],
    ids=["plain", "warped", "greedy"],
)
def test_logprobs_equal_a_fresh_forward(
    models: dict[str, PreTrainedModel], family: str, sampling: Sampling
) -> None:
    model, prompts = models[family], ragged_prompts(7)
    warpers = []
    if sampling.temperature not in (0, 1):
        warpers = [
            TemperatureLogitsWarper(sampling.temperature),
            TopKLogitsWarper(sampling.top_k),
            TopPLogitsWarper(sampling.top_p),
        ]
    for prompt, group in zip(
        prompts, generate(sampler(model, max_batch_rows=8), prompts, sampling), strict=True
    ):
        for completion in group:
            whole = torch.tensor([prompt + completion.token_ids])
            with torch.no_grad():
                logits = model(whole).logits[0, len(prompt) - 1 : -1].float()
            for warper in warpers:
                logits = warper(whole, logits)
            expected = logits.log_softmax(-1).gather(1, whole[0, len(prompt) :, None])[:, 0]
            assert completion.logprobs.dtype == np.float32
            np.testing.assert_allclose(completion.logprobs, expected, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("top_k", [0, 1, 7, 5000])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
def test_warp_equals_the_warpers_of_transformers(
    temperature: float, top_k: int, top_p: float
) -> None:
    logits = torch.randn(16, 600, generator=torch.Generator().manual_seed(3)) * 4
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    warped = warp(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    torch.testing.assert_close(warped, expected, rtol=0, atol=0)


def test_warp_keeps_all_ties_at_the_limit() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    kept = warp(logits, Sampling(top_p=0.6)).isfinite()
    assert kept.tolist() == [[True, True, True, False]]
    assert warp(logits, Sampling(top_k=2)).isfinite().tolist() == [[True, True, True, False]]


# Random numbers


def test_sample_tokens_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).log().expand(5, -1)
    uniforms = torch.tensor([[0.0], [0.2499], [0.2501], [0.7501], [1 - 2**-53]])
    uniforms = uniforms.double()
    uniforms[-1] = 1 - 2**-53
    tokens, logprobs = sample_tokens(logits, uniforms, Sampling())
    assert tokens.tolist() == [0, 0, 2, 3, 3]
    np.testing.assert_allclose(logprobs.exp(), [0.25, 0.25, 0.5, 0.25, 0.25], rtol=1e-6)


def test_sample_tokens_never_draws_a_token_of_probability_zero() -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, 100:900] = torch.randn(800, generator=torch.Generator().manual_seed(0))
    highest = torch.tensor([[1 - 2**-53]], dtype=torch.float64)
    tokens, logprobs = sample_tokens(logits, highest, Sampling())
    assert tokens.item() == 899
    assert logprobs.isfinite().all()
    tokens, _ = sample_tokens(logits, torch.zeros(1, 1, dtype=torch.float64), Sampling())
    assert tokens.item() == 100


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(n=4000, max_new_tokens=2, seed=5), [2, 3, 4, 5]),
        (Sampling(n=4000, max_new_tokens=2, seed=6, temperature=0.5), [2, 3, 4, 5]),
        (Sampling(n=4000, max_new_tokens=2, seed=7, top_k=3), [2, 3, 4]),
        (Sampling(n=4000, max_new_tokens=2, seed=8, top_p=0.75), [2, 3, 4]),
    ],
)
def test_sample_frequencies_match_the_distribution(sampling: Sampling, allowed: list[int]) -> None:
    weights = {2: 0.4, 3: 0.3, 4: 0.2, 5: 0.1}
    logits = torch.full((VOCAB,), -torch.inf)
    for token, weight in weights.items():
        logits[token] = float(np.log(weight))
    [group] = generate(sampler(with_fixed_logits(logits)), [[3, 4]], sampling)
    drawn = np.array([completion.token_ids for completion in group])
    powers = np.array([weights[token] ** (1 / sampling.temperature) for token in allowed])
    expected = powers / powers.sum()
    for step in range(2):
        counts = np.array([(drawn[:, step] == token).sum() for token in allowed])
        assert counts.sum() == sampling.n
        assert fits(counts, expected * sampling.n)
    pairs = np.array([[((drawn == [a, b]).all(1)).sum() for b in allowed] for a in allowed])
    independent = np.outer(expected, expected) * sampling.n
    assert fits(pairs.ravel(), independent.ravel())


@pytest.mark.parametrize("family", FAMILIES)
def test_order_and_batch_limits_do_not_change_samples(
    models: dict[str, PreTrainedModel], family: str
) -> None:
    prompts, sampling = ragged_prompts(12), Sampling(n=4, max_new_tokens=20, seed=3)
    model = models[family]
    everything = ids(generate(sampler(model), prompts, sampling))
    assert len({tuple(sample) for group in everything for sample in group}) > 40
    backwards = generate(sampler(model, max_batch_tokens=200), prompts[::-1], sampling)
    assert ids(backwards)[::-1] == everything
    single = generate(
        sampler(model, max_batch_rows=3), prompts, Sampling(max_new_tokens=20, seed=3)
    )
    assert ids(single) == [group[:1] for group in everything]
    longer = generate(sampler(model), prompts, Sampling(n=4, max_new_tokens=25, seed=3))
    assert [[sample[:20] for sample in group] for group in ids(longer)] == everything
    other_seed = ids(generate(sampler(model), prompts, Sampling(n=4, max_new_tokens=20, seed=4)))
    assert other_seed != everything


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(
        st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=30), min_size=1, max_size=6
    ),
    n=st.integers(1, 5),
    rows=st.integers(1, 7),
    max_new_tokens=st.integers(1, 25),
    seed=st.integers(0, 2**31),
)
def test_batching_and_padding_change_nothing(
    prompts: list[list[int]], n: int, rows: int, max_new_tokens: int, seed: int
) -> None:
    model = GPT2_FOR_PROPERTIES
    sampling = Sampling(n=n, max_new_tokens=max_new_tokens, seed=seed)
    together = generate(sampler(model, max_batch_rows=rows), prompts, sampling)
    for prompt, group in zip(prompts, together, strict=True):
        [alone] = generate(sampler(model), [prompt], sampling)
        assert ids([group]) == ids([alone])
        for completion in group:
            tokens = completion.token_ids
            limit = min(max_new_tokens, CONTEXT - len(prompt))
            assert EOS not in tokens[:-1]
            assert completion.truncated == (tokens[-1] != EOS)
            assert len(tokens) == limit if completion.truncated else len(tokens) <= limit


# Limits


def test_samples_of_a_prompt_share_one_prefill(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefilled, shapes = 0, []
    forward = TransformersGenerator.forward

    def counted(self: TransformersGenerator, tokens: torch.Tensor, *rest: object) -> torch.Tensor:
        nonlocal prefilled
        if rest[2].get_seq_length() == 0:  # type: ignore[attr-defined]
            prefilled += len(tokens)
        shapes.append(rest[0].shape)  # type: ignore[attr-defined]
        return forward(self, tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(TransformersGenerator, "forward", counted)
    prompts = ragged_prompts(5, longest=10)
    generate(sampler(llama, max_batch_tokens=300), prompts, Sampling(n=11, max_new_tokens=20))
    assert prefilled == 5
    assert max(rows * columns for rows, columns in shapes) <= 300


def test_completions_end_at_the_context(models: dict[str, PreTrainedModel]) -> None:
    never_eos = torch.zeros(VOCAB)
    never_eos[EOS] = -torch.inf
    model = build("gpt2")
    model.lm_head = FixedLogits(never_eos)
    prompts = [[5] * (CONTEXT - 1), [5] * (CONTEXT - 30), [5]]
    groups = generate(sampler(model), prompts, Sampling(n=2, max_new_tokens=40))
    assert [[len(c.token_ids) for c in group] for group in groups] == [[1, 1], [30, 30], [40, 40]]
    assert all(c.truncated for group in groups for c in group)
    # One row of eight is done after 3 tokens; it must not leave GPT-2's table of positions.
    groups = generate(
        sampler(model), [[5] * (CONTEXT - 3), *[[5]] * 7], Sampling(max_new_tokens=30)
    )
    assert [len(completion.token_ids) for [completion] in groups] == [3] + [30] * 7


def test_every_stop_id_ends_a_completion_and_becomes_the_end_of_text() -> None:
    logits = torch.full((VOCAB,), -torch.inf)
    logits[[EOS, 9, 12]] = torch.tensor([0.2, 0.2, 0.6]).log()
    generator = TransformersGenerator(with_fixed_logits(logits), [9, EOS], PAD)
    [group] = generate(generator, [[4, 4]], Sampling(n=200, max_new_tokens=3))
    for completion in group:
        *before, last = completion.token_ids
        assert set(before) <= {12}
        assert completion.truncated == (last != 9)
        assert not completion.truncated or len(completion.token_ids) == 3
        assert completion.sampled_ids[:-1] == before
        expected = [logits[number].item() for number in completion.sampled_ids]
        assert completion.logprobs.tolist() == pytest.approx(expected, abs=1e-6)
    assert {completion.token_ids[-1] for completion in group} == {9, 12}
    assert {completion.sampled_ids[-1] for completion in group} == {EOS, 9, 12}
    assert {completion.stop for completion in group} == {EOS, None}


def test_stream_yields_each_prompt_once_before_all_are_done(llama: PreTrainedModel) -> None:
    prompts = ragged_prompts(20)
    stream = sampler(llama, max_batch_rows=4).stream(prompts, Sampling(n=2, max_new_tokens=10))
    first = next(stream)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    rest = list(stream)
    assert sorted([first[0], *(index for index, _ in rest)]) == list(range(20))
    assert all(len(group) == 2 for _, group in [first, *rest])


def test_no_prompts_give_no_completions(llama: PreTrainedModel) -> None:
    assert generate(sampler(llama), [], Sampling()) == []


def test_training_flags_are_restored(llama: PreTrainedModel) -> None:
    model = build("gpt2")  # it has dropout, so training mode would change greedy tokens
    prompts, sampling = ragged_prompts(4), Sampling(temperature=0, max_new_tokens=12)
    expected = ids(generate(sampler(model), prompts, sampling))
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    assert ids(generate(sampler(model), prompts, sampling)) == expected
    assert [module.training for module in model.modules()] == before
    assert True in before and False in before


def test_progress_shows_rates(llama: PreTrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    generate(sampler(llama), ragged_prompts(3), Sampling(n=2, max_new_tokens=5), progress=True)
    shown = capsys.readouterr().err
    assert "6/6" in shown and "tokens/s" in shown and "samples/s" in shown


# Errors


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "prompt 1: found no tokens"),
        ([3] * CONTEXT, f"prompt 1: found {CONTEXT} tokens, expected at most {CONTEXT - 1}"),
        ([3, VOCAB], f"prompt 1: found token ids 3 to {VOCAB}, expected 0 to {VOCAB - 1}"),
    ],
)
def test_generate_refuses_bad_prompts(
    llama: PreTrainedModel, prompt: list[int], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        generate(sampler(llama), [[3], prompt], Sampling())


def test_generate_refuses_a_budget_too_small_for_one_sample(llama: PreTrainedModel) -> None:
    with pytest.raises(UserError, match=r"max_batch_tokens: found 20, expected at least 31"):
        generate(sampler(llama, max_batch_tokens=20), [[3] * 5], Sampling(max_new_tokens=10))


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_refuses_logits_that_are_not_finite(fault: float, temperature: float) -> None:
    model = with_fixed_logits(torch.zeros(VOCAB))
    model.lm_head.logits[7] = fault
    model.train()
    with pytest.raises(UserError, match=r"prompt 0: the policy's logits are NaN or infinite"):
        generate(sampler(model), [[3]], Sampling(temperature=temperature))
    assert model.training


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("temperature", -1.0),
        ("temperature", 1e-4),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("max_new_tokens", 0),
    ],
)
def test_sampling_refuses_values_out_of_range(field: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"sampling\.{field}: found {value}"):
        Sampling(**{field: value})  # type: ignore[arg-type]


def test_generator_refuses_a_model_without_an_attention_cache() -> None:
    tiny = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(UserError, match=r"model mamba: .*vLLM"):
        sampler(MambaForCausalLM(tiny))
