"""Models and tokenizers on disk: loaded as they were saved, and errors of one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.rows import same_weights, save
from support.tiny_models import TINY_ARCHITECTURES
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from irl_align.config.model import ScratchOptions
from irl_align.errors import UserError
from irl_align.models.loading import (
    load_model,
    load_tokenizer,
    pick_device,
    save_model,
    scratch_model,
    seeded,
)
from irl_align.models.packing import context_length

MakeModel = Callable[[str], PreTrainedModel]


# --- loading --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    return save(tiny_model("gpt2"), tiny_tokenizer, tmp_path / "model")


def test_load_model_keeps_capped_attention(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = Gemma2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        initializer_range=0.2,
        attn_logit_softcapping=0.5,
    )
    with seeded(0):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    loaded = load_model(save(model, tiny_tokenizer, tmp_path / "gemma"))
    ids = torch.tensor([[5, 40, 7, 211, 90, 18, 3, 64]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
        try:
            loaded.set_attn_implementation("sdpa")  # the cap matters here
        except ValueError:  # transformers 5.24 refuses it for such models
            return
        assert (loaded(input_ids=ids).logits - expected).abs().max() > 1e-2


def test_load_model_gives_float32_weights_in_eval_mode(folder: Path, tiny_model: MakeModel) -> None:
    model = load_model(folder)
    assert same_weights(model, tiny_model("gpt2"))
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    half = load_model(folder, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert len(load_tokenizer(folder)) == 320


def test_loading_refuses_missing_and_empty_folders(tmp_path: Path) -> None:
    for what, load in (("model", load_model), ("tokenizer", load_tokenizer)):
        with pytest.raises(UserError, match=f"nowhere: no such folder, expected one with a {what}"):
            load(tmp_path / "nowhere")
        with pytest.raises(UserError, match=f"neither a folder nor a {what} that the Hub gave"):
            load("no/such-model")
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match=r"in this folder \(it holds nothing\)"):
            load(tmp_path)


def test_load_model_refuses_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"no usable model in this folder \(it holds config\.json"):
        load_model(folder)


def test_load_model_refuses_weights_that_lack_a_tensor(folder: Path) -> None:
    # transformers would start it at random with no more than a warning.
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("h.1.ln_1.weight"))
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights of GPT2LMHeadModel are missing .*h\.1\.ln_1"):
        load_model(folder)


def test_load_model_refuses_pickled_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        load_model(folder)


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_load_tokenizer_refuses_a_folder_without_one(
    arch: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    # From only config.json transformers makes some families a tokenizer without a vocabulary.
    tiny_model(arch).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="no usable tokenizer in this folder"):
        load_tokenizer(tmp_path / "model")


def test_load_model_errors_are_one_line(folder: Path) -> None:
    (folder / "config.json").write_text("{\n not json\n")
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_save_model_writes_safetensors_config_and_tokenizer(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_model(tiny_model("gpt_neox"), tiny_tokenizer, tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith(".bin") for name in names)


# --- making ---------------------------------------------------------------------------------------

SMALL = ScratchOptions(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_scratch_model_depends_on_its_seed_only(
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


def test_scratch_model_takes_key_value_heads(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    grouped = SMALL.model_copy(update={"num_key_value_heads": 2})
    assert scratch_model(grouped, tiny_tokenizer, 0).config.num_key_value_heads == 2
    assert scratch_model(SMALL, tiny_tokenizer, 0).config.num_key_value_heads == 4


def test_pick_device_auto_is_cuda_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device: cuda, but torch sees no CUDA device"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**63 - 1))
def test_seeded_restores_the_random_state_after_the_block(seed: int) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = torch.rand(2)
    with seeded(seed):
        inside = torch.rand(2)
    assert torch.equal(torch.cat([first, torch.rand(2)]), expected)
    assert torch.equal(inside, torch.rand(2, generator=torch.Generator().manual_seed(seed)))
