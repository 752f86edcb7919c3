"""Rewards of other projects, against transformers on the text that their model cards score."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_templates import FAMILIES, chat_tokenizer
from support.classifiers import card_score, one_label_classifier, tiny_llama
from support.other_tokenizers import wordpiece, words
from support.rows import save
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from irl_align.data.decoding import TokenFormat
from irl_align.data.encoding import encode_completions, encode_prompts
from irl_align.data.rows import Prompt, as_messages
from irl_align.data.tokenizer import prepare_tokenizer
from irl_align.errors import UserError
from irl_align.evaluation.inference import PromptFormat
from irl_align.reward.alignment import AlignedReward
from irl_align.reward.foreign import PairClassifier, load_reward, load_text_reward
from irl_align.reward.model import RewardModel
from irl_align.reward.protocol import ScoreRequest
from irl_align.reward.scoring import score_tokens
from irl_align.reward.settings import RewardSettings

MakeModel = Callable[[str], PreTrainedModel]
PROMPTS: list[Prompt] = [
    "Where is the pub?",
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Where is it?"},
    ],
]
ANSWERS = ["Near the river.", "In the city centre."]


def form(tokenizer: PreTrainedTokenizerFast, template: str = "{prompt}") -> TokenFormat:
    """The format of a policy that knows PROMPTS."""
    card = PromptFormat(template=template)
    known = PROMPTS if template == "chat" else PROMPTS[:1]
    ids = encode_prompts(known, tokenizer, card)
    return TokenFormat(tokenizer, card, dict(zip(map(tuple, ids), known, strict=True)))


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def card_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, answers: list[str] = ANSWERS
) -> list[float]:
    rows = zip(PROMPTS, answers, strict=True)
    return [card_score(model, tokenizer, prompt, answer) for prompt, answer in rows]


# --- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_load_text_reward_scores_as_the_model_card(family: str, tmp_path: Path) -> None:
    """Texts, messages and whole conversations have the score of the same conversation."""
    tokenizer = chat_tokenizer(family)
    plain = one_label_classifier(tokenizer)
    reward = load_text_reward(save(plain, tokenizer, tmp_path / "reward"))
    expected = pytest.approx(card_scores(plain, tokenizer), abs=1e-5)
    assert reward.score(PROMPTS, ANSWERS).tolist() == expected
    turns: list[Any] = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
    assert reward.score(PROMPTS, turns).tolist() == expected
    chats: list[Any] = [[*as_messages(p), *turn] for p, turn in zip(PROMPTS, turns, strict=True)]
    assert reward.score(chats).tolist() == expected
    assert reward.score(PROMPTS, chats).tolist() == expected
    with pytest.raises(UserError, match=r"^row 1: found a conversation of the roles"):
        reward.score(["Hi", PROMPTS[1]], ["x", []])


def test_load_text_reward_takes_another_template(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("chatml")
    plain = one_label_classifier(tokenizer)
    folder = save(plain, tokenizer, tmp_path / "reward")
    [score] = load_text_reward(folder, template="Q: {prompt} A:").score(PROMPTS[:1], ANSWERS[:1])
    text = f"Q: {PROMPTS[0]} A:{ANSWERS[0]}<|im_end|>"
    with torch.no_grad():
        expected = plain(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits
    assert float(score) == pytest.approx(float(expected), abs=1e-5)
    with pytest.raises(UserError, match=r"reward: template: found 'x': give text with \{prompt\}"):
        load_text_reward(folder, template="x")
    tokenizer.chat_template = None
    without = save(plain, tokenizer, tmp_path / "without")
    with pytest.raises(UserError, match=r"without: template: found chat, but its tokenizer has no"):
        load_text_reward(without, template="chat")
    with pytest.raises(UserError, match=r"a conversation needs template: chat"):
        load_text_reward(without).score(PROMPTS, ANSWERS)


def test_load_text_reward_keeps_the_template_of_an_own_reward(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base = save(tiny_model("llama"), tiny_tokenizer, tmp_path / "base")
    settings = RewardSettings(template="Q {prompt} A ")
    own = RewardModel.from_policy(base, tiny_tokenizer, settings, seed=1)
    own.save_pretrained(tmp_path / "reward")
    reward = load_text_reward(tmp_path / "reward")
    one_turn: list[Any] = [[{"role": "user", "content": "near"}]]
    assert reward.score(one_turn, ["pub"]).tolist() == own.score(["near"], ["pub"]).tolist()
    with pytest.raises(UserError, match=r"made with the template 'Q \{prompt\} A ', which it"):
        load_text_reward(tmp_path / "reward", template="{prompt}")


# --- token ids of a policy ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_load_reward_reads_its_own_chat_template(
    family: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A policy of another template, tokenizer and end: the reward's text is that of its card."""
    theirs = chat_tokenizer(family)
    plain = one_label_classifier(theirs)
    own = chat_tokenizer("gemma" if family != "gemma" else "zephyr")
    prepare_tokenizer(own, "chat")
    policy = form(own, "chat")
    reward = load_reward(save(plain, theirs, tmp_path / "reward"), policy)
    assert isinstance(reward, AlignedReward)
    prompts = encode_prompts(PROMPTS, own, policy.card)
    completions = encode_completions(PROMPTS, ANSWERS, prompts, own, policy.card)
    expected = card_scores(plain, theirs)
    assert reward.score_ids(prompts, completions).tolist() == pytest.approx(expected, abs=1e-5)
    scores = score_tokens(reward, ScoreRequest(prompts, completions, prefixes=True))
    assert scores.prefixes is not None
    for row, completion in enumerate(completions):
        prefixes = scores.prefixes[row, : len(completion) + 1]
        assert float(prefixes[-1]) == pytest.approx(expected[row], abs=1e-5)
        assert len(set(prefixes.tolist())) > 3  # boundaries within the answer
    # Without its end of turn a sample has no end for the reward either.
    cut = [row[:-1] for row in completions]
    unfinished = reward.score_ids(prompts, cut)
    for row in range(2):
        assert float(scores.prefixes[row, len(cut[row])]) == pytest.approx(
            float(unfinished[row]), abs=1e-5
        )
        assert abs(float(unfinished[row]) - expected[row]) > 1e-4


@pytest.mark.parametrize(
    ("theirs", "policy", "direct"),
    [
        ("chat", "chat", True),  # llama-3 writes nothing after its end of turn
        ("chat", "{prompt}\n", False),
        (None, "{prompt}\n", True),  # a reward without a template reads the policy's
        (None, "chat", False),
        ("Q: {prompt}", "Q: {prompt}", True),
        ("Q: {prompt}", "{prompt}", False),
    ],
)
def test_load_reward_reads_the_policys_ids_if_its_texts_have_the_same(
    theirs: str | None, policy: str, direct: bool, tmp_path: Path
) -> None:
    tokenizer = chat_tokenizer("llama-3")
    prepare_tokenizer(tokenizer, "chat")
    folder = save(one_label_classifier(tokenizer), tokenizer, tmp_path / "reward")
    if theirs is None:
        (folder / "chat_template.jinja").unlink()
    policy_form = form(tokenizer, policy)
    single = TokenFormat(tokenizer, policy_form.card, dict(list(policy_form.prompts.items())[:1]))
    given = theirs if theirs not in (None, "chat") else None
    reward = load_reward(folder, single, template=given)
    assert isinstance(reward, RewardModel if direct else AlignedReward)


def test_load_reward_of_chatml_reads_the_newline_after_the_end(tmp_path: Path) -> None:
    """The policy's ids end before it, so that they are not what the reward's card scores."""
    tokenizer = chat_tokenizer("chatml")
    plain = one_label_classifier(tokenizer)
    policy = form(tokenizer, "chat")
    reward = load_reward(save(plain, tokenizer, tmp_path / "reward"), policy)
    prompts = encode_prompts(PROMPTS, tokenizer, policy.card)
    completions = encode_completions(PROMPTS, ANSWERS, prompts, tokenizer, policy.card)
    scores = reward.score_ids(prompts, completions).tolist()
    assert scores == pytest.approx(card_scores(plain, tokenizer), abs=1e-5)


def test_load_reward_of_an_own_chat_reward_ends_texts_as_it_was_fitted(
    tiny_model: MakeModel, tmp_path: Path
) -> None:
    """At its template's end of turn, and not at the tokenizer's EOS or after a newline."""
    theirs, own = chat_tokenizer("gemma"), chat_tokenizer("chatml")
    for tokenizer in (theirs, own):
        prepare_tokenizer(tokenizer, "chat")
    base = LlamaForCausalLM(tiny_llama(theirs))
    settings = RewardSettings(template="chat", name="own")
    fitted = RewardModel.from_policy(
        save(base, theirs, tmp_path / "base"), theirs, settings, seed=1
    )
    fitted.save_pretrained(tmp_path / "reward")
    policy = form(own, "chat")
    prompts = encode_prompts(PROMPTS, own, policy.card)
    completions = encode_completions(PROMPTS, ANSWERS, prompts, own, policy.card)
    reward = load_reward(tmp_path / "reward", policy)
    assert isinstance(reward, AlignedReward)
    expected = pytest.approx(fitted.score(PROMPTS, ANSWERS).tolist(), abs=1e-5)
    assert reward.score_ids(prompts, completions).tolist() == expected
    ids = encode_prompts(PROMPTS, theirs, settings)
    finished = encode_completions(PROMPTS, ANSWERS, ids, theirs, settings)
    unfinished = fitted.score_ids(ids, [row[:-1] for row in finished], None).tolist()
    cut = reward.score_ids(prompts, [row[:-1] for row in completions]).tolist()
    assert cut == pytest.approx(unfinished, abs=1e-5)
    wanted = ScoreRequest(prompts, completions, prefixes=True, eos_prefixes=True)
    assert score_tokens(reward, wanted).rewards.tolist() == expected


def test_load_reward_refuses_eos_prefixes_of_a_text_that_ends_otherwise(tmp_path: Path) -> None:
    theirs, own = chat_tokenizer("chatml"), chat_tokenizer("gemma")
    prepare_tokenizer(own, "chat")
    policy = form(own, "chat")
    folder = save(one_label_classifier(theirs), theirs, tmp_path / "reward")
    reward = load_reward(folder, policy)
    prompts = encode_prompts(PROMPTS, own, policy.card)
    wanted = ScoreRequest(prompts, [[5], [6]], prefixes=True, eos_prefixes=True)
    with pytest.raises(UserError, match=r"this reward's texts end with '<\|im_end\|>\\n' and not"):
        score_tokens(reward, wanted)


def test_load_reward_loads_a_causal_classifier(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """transformers' own, with nothing of ours in its config."""
    config = copy.deepcopy(tiny_model("gpt2").config)
    config.num_labels = 1
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_config(config).eval()
    folder = save(plain, tiny_tokenizer, tmp_path / "reward")
    reward = load_reward(folder, form(tiny_tokenizer))
    assert isinstance(reward, RewardModel)
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, 0]
    assert float(reward.score_ids([[5, 6]], [[7, 8]], None)) == pytest.approx(
        float(expected), abs=1e-6
    )
    other = load_reward(folder, form(words()), template="Q {prompt}")
    assert isinstance(other, AlignedReward) and other.reward.settings.template == "Q {prompt}"


def test_pair_classifier_reads_a_conversation_by_its_chat_template(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=60, intermediate_size=32, num_labels=1, **sizes)
    plain = AutoModelForSequenceClassification.from_config(config).eval()
    tokenizer = wordpiece(tmp_path)
    reward = load_text_reward(save(plain, tokenizer, tmp_path / "without"))
    assert isinstance(reward, PairClassifier)
    with pytest.raises(UserError, match=r"reads a prompt as one text, and a prompt of the data is"):
        reward.score(PROMPTS, ANSWERS)
    tokenizer.chat_template = FAMILIES["chatml"].template
    chat = load_text_reward(save(plain, tokenizer, tmp_path / "chat"))
    assert chat.score(PROMPTS, ANSWERS).tolist() == pytest.approx(
        card_scores(plain, tokenizer), abs=1e-5
    )


def test_load_reward_loads_a_pair_classifier(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=60, intermediate_size=32, num_labels=1, **sizes)
    plain = AutoModelForSequenceClassification.from_config(config).eval()
    tokenizer = wordpiece(tmp_path)
    reward = load_reward(save(plain, tokenizer, tmp_path / "reward"), form(tiny_tokenizer))
    assert isinstance(reward, PairClassifier)
    end = tiny_tokenizer.eos_token_id
    prompts = [ids(tiny_tokenizer, "near"), ids(tiny_tokenizer, "a cheap one")]
    completions = [[*ids(tiny_tokenizer, "the pub is here."), end], ids(tiny_tokenizer, "no")]
    with torch.no_grad():
        expected = [
            float(plain(**tokenizer(p, c, return_tensors="pt")).logits)
            for p, c in (("near", "the pub is here."), ("a cheap one", "no"))
        ]
    scores = score_tokens(reward, ScoreRequest(prompts, completions))
    assert scores.rewards.tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match=r"BertForSequenceClassification \(bert\) reads later tok"):
        score_tokens(reward, ScoreRequest(prompts, completions, prefixes=True))
    with pytest.raises(UserError, match=r"no attention to split by"):
        score_tokens(reward, ScoreRequest(prompts, completions, attention=True))
    longest = [[*ids(tiny_tokenizer, "the pub is here. " * 60), end]]
    context = r"completion 0, with its prompt, has 787 tokens, expected at most the 512"
    with pytest.raises(UserError, match=context):
        score_tokens(reward, ScoreRequest(prompts[:1], longest))


def test_load_reward_refuses_other_models(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = copy.deepcopy(tiny_model("llama").config)
    config.num_labels = 3
    three = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(UserError, match=r"num_labels is 3; expected a reward model with one label"):
        load_reward(save(three, tiny_tokenizer, tmp_path / "three"), form(tiny_tokenizer))
    policy = save(tiny_model("llama"), tiny_tokenizer, tmp_path / "policy")
    with pytest.raises(UserError, match=r"one label|score.weight"):
        load_reward(policy, form(tiny_tokenizer))
    with pytest.raises(UserError, match=r"not a reward model"):
        load_reward(tmp_path / "nothing", form(tiny_tokenizer))
    shutil.copytree(policy, tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match=r"not a reward model"):
        load_reward(tmp_path / "broken", form(tiny_tokenizer))
