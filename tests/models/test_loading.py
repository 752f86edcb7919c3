"""Models on disk and in memory: log-probabilities against a full forward, and plain errors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.rows import plain_logps, random_ids, same_weights, save
from support.tiny_models import TINY_ARCHITECTURES
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    GraniteConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from irl_align.config.model import ScratchOptions
from irl_align.errors import UserError
from irl_align.models import loading
from irl_align.models.loading import (
    completion_logprobs,
    has_plain_logits,
    load_model,
    load_tokenizer,
    pick_device,
    scratch_model,
    seeded,
)
from irl_align.models.packing import context_length

MakeModel = Callable[[str], PreTrainedModel]
PROMPTS = random_ids(6, 1, 9, seed=1)
COMPLETIONS = random_ids(6, 1, 12, seed=2)
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
TRANSFORMED = {
    "gemma2": Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=2.0),
    "cohere2": Cohere2Config(**SIZES, logit_scale=0.25),
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0),
}


# --- log-probabilities ----------------------------------------------------------------------------


def check_logprobs(model: PreTrainedModel, max_batch_tokens: int) -> None:
    got = completion_logprobs(model, PROMPTS, COMPLETIONS, max_batch_tokens)
    for row, values in enumerate(got):
        assert (values.dtype, values.shape) == (np.float32, (len(COMPLETIONS[row]),))
        with torch.no_grad():
            expected = plain_logps(model, PROMPTS[row], COMPLETIONS[row])
        np.testing.assert_allclose(values, expected.numpy(), atol=2e-5)


@pytest.mark.parametrize("max_batch_tokens", [1, 30, 4096])
@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_completion_logprobs_are_a_full_forwards(
    arch: str, max_batch_tokens: int, tiny_model: MakeModel
) -> None:
    assert has_plain_logits(tiny_model(arch))
    check_logprobs(tiny_model(arch), max_batch_tokens)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_completion_logprobs_where_logits_are_scaled_or_capped(name: str) -> None:
    config: PreTrainedConfig = TRANSFORMED[name]
    with seeded(0):
        model = AutoModelForCausalLM.from_config(config).eval()
    assert not has_plain_logits(model)
    ids = torch.tensor([PROMPTS[0] + COMPLETIONS[0]])
    with torch.no_grad():  # the transform matters: without it the logits are others
        raw = model.get_output_embeddings()(model.base_model(input_ids=ids)[0])
        assert (raw - model(input_ids=ids).logits).abs().max() > 0.1
    check_logprobs(model, 4096)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_large_vocabulary_is_taken_in_pieces(
    name: str, tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "llama":
        model = tiny_model(name)
    else:
        with seeded(0):
            model = AutoModelForCausalLM.from_config(TRANSFORMED[name]).eval()
    monkeypatch.setattr(loading, "LOGITS_AT_ONCE", 320 * 5)
    sizes = []
    plain = loading.chosen_logprobs

    def watched(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        sizes.append(logits.shape[0])
        return plain(logits, ids)

    monkeypatch.setattr(loading, "chosen_logprobs", watched)
    check_logprobs(model, 4096)
    assert sum(sizes) == sum(map(len, COMPLETIONS))
    assert len(sizes) > 1
    assert name == "gemma2" or max(sizes) == 5


def test_no_rows_and_empty_completions(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    assert completion_logprobs(model, [], []) == []
    empty, one = completion_logprobs(model, [[5], [6, 7]], [[], [8]])
    assert empty.shape == (0,)
    assert one.tolist() == pytest.approx(plain_logps(model, [6, 7], [8]).tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="zip"):
        completion_logprobs(model, [[5]], [])


def test_completion_logprobs_hold_no_gradient_and_do_not_change_the_model(
    tiny_model: MakeModel,
) -> None:
    model = tiny_model("gpt2")
    completion_logprobs(model, PROMPTS, COMPLETIONS)
    assert same_weights(model, tiny_model("gpt2"))
    assert all(weight.grad is None for weight in model.parameters())


# --- loading --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    return save(tiny_model("gpt2"), tiny_tokenizer, tmp_path / "model")


def test_capped_attention_is_kept(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = Gemma2Config(**SIZES, head_dim=16, attn_logit_softcapping=0.5)
    with seeded(0):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    loaded = load_model(save(model, tiny_tokenizer, tmp_path / "gemma"))
    ids = torch.tensor([PROMPTS[0] + COMPLETIONS[0]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
        try:
            loaded.set_attn_implementation("sdpa")  # the cap matters here
        except ValueError:  # transformers 5.24 refuses it for such models
            return
        assert (loaded(input_ids=ids).logits - expected).abs().max() > 1e-2


def test_a_model_loads_in_float32_and_eval(folder: Path, tiny_model: MakeModel) -> None:
    model = load_model(folder)
    assert same_weights(model, tiny_model("gpt2"))
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    half = load_model(folder, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert len(load_tokenizer(folder)) == 320


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    for what, load in (("model", load_model), ("tokenizer", load_tokenizer)):
        with pytest.raises(UserError, match=f"nowhere: no such folder, expected one with a {what}"):
            load(tmp_path / "nowhere")
        with pytest.raises(UserError, match=f"neither a folder nor a {what} that the Hub gave"):
            load("no/such-model")
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match=r"in this folder \(it holds nothing\)"):
            load(tmp_path)


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"no usable model in this folder \(it holds config\.json"):
        load_model(folder)


def test_weights_that_lack_a_tensor(folder: Path) -> None:
    # transformers would start it at random with no more than a warning.
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("h.1.ln_1.weight"))
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights of GPT2LMHeadModel are missing .*h\.1\.ln_1"):
        load_model(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        load_model(folder)


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_a_folder_without_a_tokenizer(arch: str, tiny_model: MakeModel, tmp_path: Path) -> None:
    # Of config.json alone transformers makes some families a tokenizer without a vocabulary.
    tiny_model(arch).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="no usable tokenizer in this folder"):
        load_tokenizer(tmp_path / "model")


def test_errors_are_one_line(folder: Path) -> None:
    (folder / "config.json").write_text("{\n not json\n")
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


# --- making ---------------------------------------------------------------------------------------

SMALL = ScratchOptions(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_scratch_models_are_of_their_seed(
    architecture: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    options = SMALL.model_copy(update={"architecture": architecture})
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    model = scratch_model(options, tiny_tokenizer, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert same_weights(scratch_model(options, tiny_tokenizer, seed=5), model)
    assert not same_weights(scratch_model(options, tiny_tokenizer, seed=6), model)
    config = model.config
    assert config.model_type == architecture
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (320, 32, 1)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert context_length(model) == 512


def test_scratch_models_take_key_value_heads(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    grouped = SMALL.model_copy(update={"num_key_value_heads": 2})
    assert scratch_model(grouped, tiny_tokenizer, 0).config.num_key_value_heads == 2
    assert scratch_model(SMALL, tiny_tokenizer, 0).config.num_key_value_heads == 4


def test_pick_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device: cuda, but torch sees no CUDA device"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**63 - 1))
def test_seeded_gives_its_own_numbers_and_leaves_the_others(seed: int) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = torch.rand(2)
    with seeded(seed):
        inside = torch.rand(2)
    assert torch.equal(torch.cat([first, torch.rand(2)]), expected)
    assert torch.equal(inside, torch.rand(2, generator=torch.Generator().manual_seed(seed)))
