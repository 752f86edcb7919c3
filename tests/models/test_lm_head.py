"""Log-probabilities of completions against a full forward of the model."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.rows import plain_logps, random_ids, same_weights
from support.tiny_models import TINY_ARCHITECTURES
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    GraniteConfig,
    ModernBertDecoderConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from irl_align.models import lm_head
from irl_align.models.lm_head import completion_logprobs, has_plain_logits
from irl_align.models.loading import seeded

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
    "modernbert-decoder": ModernBertDecoderConfig(  # a layer before the output layer
        **{**SIZES, "initializer_range": 1.0},
        global_attn_every_n_layers=1,
        **dict.fromkeys(("bos_token_id", "cls_token_id"), 1),
        **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
    ),
}


def check_logprobs(model: PreTrainedModel, max_batch_tokens: int) -> None:
    got = completion_logprobs(model, PROMPTS, COMPLETIONS, max_batch_tokens)
    for row, values in enumerate(got):
        assert (values.dtype, values.shape) == (np.float32, (len(COMPLETIONS[row]),))
        with torch.no_grad():
            expected = plain_logps(model, PROMPTS[row], COMPLETIONS[row])
        np.testing.assert_allclose(values, expected.numpy(), atol=2e-5)
    both = completion_logprobs(model, PROMPTS, COMPLETIONS, max_batch_tokens, values=True)
    for row, (logps, array) in enumerate(zip(got, both, strict=True)):
        np.testing.assert_array_equal(array[:, 0], logps)
        ids = torch.tensor([[*PROMPTS[row], *COMPLETIONS[row]]])
        with torch.no_grad():
            sums = model(ids).logits[0, len(PROMPTS[row]) - 1 : -1].double().logsumexp(-1)
        np.testing.assert_allclose(array[:, 1], sums.numpy(), atol=2e-5)


@pytest.mark.parametrize("max_batch_tokens", [1, 30, 4096])
@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_completion_logprobs_equal_a_full_forward(
    arch: str, max_batch_tokens: int, tiny_model: MakeModel
) -> None:
    assert has_plain_logits(tiny_model(arch))
    check_logprobs(tiny_model(arch), max_batch_tokens)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_completion_logprobs_follow_scaled_and_capped_logits(name: str) -> None:
    config: PreTrainedConfig = TRANSFORMED[name]
    with seeded(0):
        model = AutoModelForCausalLM.from_config(config).eval()
    assert not has_plain_logits(model)
    ids = torch.tensor([PROMPTS[0] + COMPLETIONS[0]])
    with torch.no_grad():  # the transform matters: without it the logits are others
        raw = model.get_output_embeddings()(model.base_model(input_ids=ids)[0])
        assert (raw - model(input_ids=ids).logits).abs().max() > 0.1
    check_logprobs(model, 4096)


def test_has_plain_logits_sees_a_cap_far_above_the_logits() -> None:
    with seeded(0):
        model = AutoModelForCausalLM.from_config(
            Gemma2Config(**{**SIZES, "initializer_range": 1e-3}, head_dim=16)
        )
    assert model.config.final_logit_softcapping == 30.0
    assert not has_plain_logits(model.train())
    assert model.training
    assert not model.get_output_embeddings()._forward_hooks


def test_has_plain_logits_goes_by_the_numbers_not_by_names() -> None:
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 2}
    with seeded(0):
        opt = OPTConfig(vocab_size=320, num_hidden_layers=1, **sizes)
        assert has_plain_logits(AutoModelForCausalLM.from_config(opt))
        granite = GraniteConfig(**SIZES, logits_scaling=1.0)
        assert has_plain_logits(AutoModelForCausalLM.from_config(granite))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_completion_logprobs_take_a_large_vocabulary_in_pieces(
    name: str, tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "llama":
        model = tiny_model(name)
    else:
        with seeded(0):
            model = AutoModelForCausalLM.from_config(TRANSFORMED[name]).eval()
    monkeypatch.setattr(lm_head, "LOGITS_AT_ONCE", 320 * 5)
    sizes = []
    plain = lm_head.chosen_logprobs

    def watched(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        sizes.append(logits.shape[0])
        return plain(logits, ids)

    monkeypatch.setattr(lm_head, "chosen_logprobs", watched)
    check_logprobs(model, 4096)
    assert sum(sizes) == sum(map(len, COMPLETIONS))
    assert len(sizes) > 1
    assert name == "gemma2" or max(sizes) == 5


def test_completion_logprobs_of_no_rows_and_empty_completions(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    assert completion_logprobs(model, [], []) == []
    empty, one = completion_logprobs(model, [[5], [6, 7]], [[], [8]])
    assert empty.shape == (0,)
    assert one.tolist() == pytest.approx(plain_logps(model, [6, 7], [8]).tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="zip"):
        completion_logprobs(model, [[5]], [])


def test_completion_logprobs_compute_no_gradient_and_leave_the_model_unchanged(
    tiny_model: MakeModel,
) -> None:
    model = tiny_model("gpt2")
    completion_logprobs(model, PROMPTS, COMPLETIONS)
    assert same_weights(model, tiny_model("gpt2"))
    assert all(weight.grad is None for weight in model.parameters())
