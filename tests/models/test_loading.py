"""Models and tokenizers on disk: loaded as they were saved, and errors of one line."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.rows import same_weights, save
from support.tiny_models import TINY_ARCHITECTURES
from support.tiny_tokenizers import tiny_tokenizer as sentencepiece_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from irl_align.config.model import ScratchOptions
from irl_align.errors import UserError
from irl_align.models.loading import (
    check_classifier,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    require_embeddings,
    save_model,
    scratch_model,
    seeded,
    vocabulary_size,
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


def test_load_tokenizer_refuses_one_that_loses_spaces(tmp_path: Path) -> None:
    """transformers reads the files of a Qwen 2 model as byte-level BPE, whatever they hold."""
    tokenizer = sentencepiece_tokenizer("sentencepiece", [], eos="</s>", pad="<unk>")
    folder = save(small("qwen2"), tokenizer, tmp_path / "model")
    with pytest.raises(UserError, match="and then it loses the spaces of texts") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


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


# --- models, adapters and tokenizers of others ----------------------------------------------------

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.tensor([[5, 6, 7, 9]])


def small(kind: str, **options: object) -> PreTrainedModel:
    with seeded(0):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **{**SIZES, **options})
        ).eval()


@pytest.mark.parametrize("kind", ["granite", "cohere2", "llama4_text", "xglm"])
def test_check_classifier_gives_every_causal_model_a_head_on_its_backbone(
    kind: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = small(kind)
    check_classifier(model.config)
    folder = save(model, tiny_tokenizer, tmp_path / kind)
    policy = load_model(folder)
    options = {"fresh": ("score.weight",), "num_labels": 1}
    scorer = load_model(folder, "cpu", AutoModelForSequenceClassification, **options)
    assert policy.base_model is not policy
    torch.testing.assert_close(scorer.base_model(IDS)[0], policy.base_model(IDS)[0])
    again = load_model(
        save(scorer, tiny_tokenizer, tmp_path / "reward"), "cpu", AutoModelForSequenceClassification
    )
    torch.testing.assert_close(again(IDS).logits, scorer(IDS).logits)


def test_check_classifier_refuses_a_classifier_with_another_head() -> None:
    config = AutoConfig.for_model("ctrl", n_embd=32, n_layer=1, n_head=2, dff=32, vocab_size=320)
    with pytest.raises(UserError, match="classifier of a ctrl has none; expected"):
        check_classifier(config)


def peft_folder(
    model: PreTrainedModel, folder: Path, base: Path, **options: object
) -> torch.Tensor:
    """Write an adapter as peft does, without a config.json; returns the logits with it."""
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **options))
    with seeded(1), torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    assert not (folder / "config.json").exists()
    with torch.no_grad():
        logits: torch.Tensor = adapted.eval()(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_load_model_merges_an_adapter_that_peft_wrote(
    options: dict[str, object], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base = save(small("llama"), tiny_tokenizer, tmp_path / "base")
    want = peft_folder(small("llama"), tmp_path / "adapter", base, task_type="CAUSAL_LM", **options)
    model = load_model(tmp_path / "adapter")
    torch.testing.assert_close(model(input_ids=IDS).logits, want)
    assert load_config(tmp_path / "adapter").model_type == "llama"
    assert load_tokenizer(tmp_path / "adapter").get_vocab() == tiny_tokenizer.get_vocab()
    save_model(model, tiny_tokenizer, tmp_path / "whole")
    torch.testing.assert_close(load_model(tmp_path / "whole")(input_ids=IDS).logits, want)


def test_load_model_takes_a_reward_adapter_only_with_its_head(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base = save(small("llama"), tiny_tokenizer, tmp_path / "base")
    loader = AutoModelForSequenceClassification
    scorer = load_model(base, "cpu", loader, fresh=("score.weight",), num_labels=1)
    want = peft_folder(scorer, tmp_path / "reward", base, task_type="SEQ_CLS")
    torch.testing.assert_close(load_model(tmp_path / "reward", "cpu", loader)(IDS).logits, want)
    peft_folder(small("llama"), tmp_path / "policy", base, task_type="CAUSAL_LM")
    with pytest.raises(UserError, match=r"1 weights of .* are missing \(score\.weight\)"):
        load_model(tmp_path / "policy", "cpu", loader)


def test_load_model_refuses_adapters_that_are_damaged_or_of_another_model(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    other = save(small("llama", hidden_size=64), tiny_tokenizer, tmp_path / "other")
    peft_folder(small("llama"), tmp_path / "adapter", other, task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="the adapter does not fit its base model, found a Llama"):
        load_model(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: no complete adapter"):
        load_model(tmp_path / "adapter")


def test_save_model_writes_what_a_generation_config_that_is_invalid_leaves(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = save(small("llama"), tiny_tokenizer, tmp_path / "model")
    file = folder / "generation_config.json"
    settings = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": [2, 5]}
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    save_model(load_model(folder), tiny_tokenizer, tmp_path / "again")
    again = json.loads((tmp_path / "again/generation_config.json").read_text())
    assert again["eos_token_id"] == [2, 5]
    assert "temperature" not in again


def test_require_embeddings_names_tokens_without_a_row(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, tokenizer = small("llama"), copy.deepcopy(tiny_tokenizer)
    require_embeddings("m", model, tokenizer)
    tokenizer.add_tokens(["<tool>"])
    assert vocabulary_size(tokenizer) == 321
    with pytest.raises(UserError, match=r"m: the embeddings have 320 rows.*'<tool>'"):
        require_embeddings("m", model, tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model.safetensors").rename(f / "q4.gguf"), "found GGUF, the format of"),
        (lambda f: edit_config(f, pad_token_id=400), "pad_token_id has no row in the embeddings"),
        (lambda f: edit_config(f, hidden_act="none"), "cannot load|no usable model"),
    ],
)
def test_load_model_says_what_is_wrong_with_a_model_of_others(
    change: Callable[[Path], object],
    message: str,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    folder = save(small("llama"), tiny_tokenizer, tmp_path / "model")
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def edit_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
