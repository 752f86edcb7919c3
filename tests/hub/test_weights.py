"""The mean folded into a reward's weights, and chat templates of plain templates."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.rows import Ids, random_ids, save
from support.tiny_models import TINY_ARCHITECTURES
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from irl_align.hub.weights import chat_template, final_norm, fold_mean
from irl_align.reward.model import RewardModel
from irl_align.reward.settings import RewardSettings

MakeModel = Callable[[str], PreTrainedModel]
PROMPTS, COMPLETIONS = random_ids(6, 1, 9, seed=1), random_ids(6, 1, 12, seed=2)
LAYER_NORMS = {"gpt2", "gpt_neox"}


@torch.no_grad()
def one_by_one(model: PreTrainedModel, rows: Ids) -> torch.Tensor:
    """Logits of rows, each alone and unpadded."""
    return torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])


def joined() -> Ids:
    return [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_fold_mean_moves_it_into_a_norm_with_a_bias(
    arch: str, tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """LayerNorm takes the mean; RMSNorm has no bias, so the mean stays in the settings."""
    policy = save(tiny_model(arch), tiny_tokenizer, tmp_path / "policy")
    settings = RewardSettings(mean=1.7)
    reward = RewardModel.from_policy(policy, tiny_tokenizer, settings, seed=3)
    ours = reward.score_ids(PROMPTS, COMPLETIONS)
    fold_mean(reward)
    left = 0.0 if arch in LAYER_NORMS else 1.7
    assert reward.settings.mean == left
    reward.save_pretrained(tmp_path / "reward")

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    logits = one_by_one(plain, joined())
    torch.testing.assert_close(logits - left, ours, atol=1e-5, rtol=1e-6)
    again = RewardModel.from_pretrained(tmp_path / "reward").score_ids(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(again, ours, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{"lm_coef": 0.7}, {"bound": 1.5}, {"lm_coef": 0.7, "bound": 1.5}], ids=str
)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_fold_mean_keeps_bounded_and_mixed_scores(
    arch: str,
    options: dict[str, float],
    tiny_model: MakeModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    policy = save(tiny_model(arch), tiny_tokenizer, tmp_path / "policy")
    settings = RewardSettings(mean=-0.6, **options)
    reward = RewardModel.from_policy(policy, tiny_tokenizer, settings, seed=3)
    ours = reward.score_ids(PROMPTS, COMPLETIONS)
    fold_mean(reward)
    assert reward.settings == settings
    folded = reward.score_ids(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(folded, ours, atol=1e-5, rtol=1e-6)


def test_final_norm_is_a_last_norm_with_a_bias(tiny_model: MakeModel) -> None:
    gpt2, llama = tiny_model("gpt2"), tiny_model("llama")
    assert final_norm(gpt2) is gpt2.transformer.ln_f
    assert final_norm(llama) is None


@pytest.mark.parametrize(
    ("template", "lowercase", "expected"),
    [
        ("{prompt}\n", True, "food[Thé]\nServed.".lower() + "<eos>"),
        ("Q: {prompt}\nA:\n", False, "Q: food[Thé]\nA:\nServed.<eos>"),
        ('"é😀\\ {{x}} {prompt} {{% raw %}}', False, '"é😀\\ {x} food[Thé] {% raw %}Served.<eos>'),
    ],
)
def test_chat_template_writes_the_same_as_the_cards_template(
    template: str, lowercase: bool, expected: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = RewardSettings(template=template, lowercase=lowercase)
    tiny_tokenizer.chat_template = chat_template(settings, tiny_tokenizer)
    chat = [{"role": "user", "content": "food[Thé]"}, {"role": "assistant", "content": "Served."}]
    assert tiny_tokenizer.apply_chat_template(chat, tokenize=False) == expected
    begun = tiny_tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert begun == expected.removesuffix("served.<eos>" if lowercase else "Served.<eos>")


def test_chat_template_of_a_chat_card_is_none(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert chat_template(RewardSettings(template="chat"), tiny_tokenizer) is None


def test_chat_template_refuses_system_messages_and_further_turns(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tiny_tokenizer.chat_template = chat_template(RewardSettings(), tiny_tokenizer)
    turn = {"role": "user", "content": "a"}
    for chat in ([{"role": "system", "content": "b"}, turn], [turn, turn, turn]):
        with pytest.raises(Exception, match="one user turn"):
            tiny_tokenizer.apply_chat_template(chat, tokenize=False)
