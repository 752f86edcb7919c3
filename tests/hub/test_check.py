"""Exported rewards read as texts by irl-align, transformers and its pipeline, with chat templates
and tokenizers of many models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from support.chat_templates import FAMILIES, chat_tokenizer
from support.tiny_tokenizers import tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from irl_align.config.model import LoraOptions, QuantizationOptions
from irl_align.data.rows import as_messages, prompt_text
from irl_align.data.tokenizer import prepare_tokenizer
from irl_align.errors import UserError
from irl_align.hub.check import RunScores, chat_texts, check_scores
from irl_align.hub.weights import edit_json, save_plain, scored_template
from irl_align.models.lora import quantization_config
from irl_align.reward.model import RewardModel
from irl_align.reward.settings import RewardSettings

PROMPTS = ["Where is The Punter?", "Name a pub.", "food = French, price = high"]
ANSWERS = ["It is near the river.", "the Punter", "Alimentum serves\nFrench food."]
TALK = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Which food?"},
]
TOOLS = [{"type": "function", "name": "find"}]
CHAT = RewardSettings(template="chat", mean=0.4)
TRL_TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "initializer_range": 0.3,
}


class Exported:
    """A random reward in a folder, as the export writes it, and scores before that."""

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerFast,
        settings: RewardSettings = CHAT,
        config: type[PreTrainedConfig] = LlamaConfig,
        lora: LoraOptions | None = None,
        dtype: torch.dtype = torch.float32,
        bits: int | None = None,
        talk: list[dict[str, Any]] = TALK,
        **options: object,
    ) -> None:
        prepare_tokenizer(tokenizer, settings.template)
        torch.manual_seed(0)
        pad = tokenizer.pad_token_id
        shape = config(**SIZES, **options, vocab_size=len(tokenizer), pad_token_id=pad)
        policy = AutoModelForCausalLM.from_config(shape).to(dtype)
        policy.save_pretrained(folder / "policy")
        quantized = (
            {}
            if bits is None
            else {"quantization_config": quantization_config(QuantizationOptions())}
        )
        reward = RewardModel.from_policy(
            folder / "policy", tokenizer, settings, seed=1, lora=lora, **quantized
        )
        for name, weight in reward.model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.1)
        self.prompts = [*PROMPTS[:2], talk if settings.template == "chat" else PROMPTS[2]]
        texts = {
            "prompt": [prompt_text(prompt) for prompt in self.prompts],
            "messages": ["" if isinstance(p, str) else json.dumps(p) for p in self.prompts],
            "completion": ANSWERS,
        }
        self.run = RunScores.of(reward, Dataset.from_dict(texts))
        self.folder = folder / "reward"
        save_plain(reward, self.folder)
        if lora is not None:
            base = str(folder / "policy")
            edit_json(self.folder / "adapter_config.json", base_model_name_or_path=base)

    def check(self) -> float | None:
        reward = RewardModel.from_pretrained(self.folder, merge=False)
        return check_scores(self.folder, reward, self.run)


# --- chat templates -------------------------------------------------------------------------------


@pytest.mark.parametrize("sentencepiece", [False, True], ids=["byte-level", "sentencepiece"])
@pytest.mark.parametrize("family", FAMILIES)
def test_check_scores_of_a_chat_reward_are_those_of_the_run(
    family: str, sentencepiece: bool, tmp_path: Path
) -> None:
    exported = Exported(tmp_path, chat_tokenizer(family, sentencepiece))
    difference = exported.check()
    assert difference is not None and difference < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    ids = chat_texts(tokenizer, exported.prompts, ANSWERS)
    assert ids == exported.run.ids
    talks = [
        [*as_messages(prompt), {"role": "assistant", "content": answer}]
        for prompt, answer in zip(exported.prompts, ANSWERS, strict=True)
    ]
    texts = [trl.apply_chat_template({"messages": talk}, tokenizer)["text"] for talk in talks]
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == exported.run.ids  # as in TRL
    end = tokenizer.convert_tokens_to_ids(FAMILIES[family].end)
    assert [row[-1] for row in ids] == [end] * 3


@pytest.mark.parametrize("family", ["chatml", "gemma", "phi", "zephyr"])
def test_check_scores_refuses_a_template_that_writes_after_the_end(
    family: str, tmp_path: Path
) -> None:
    exported = Exported(tmp_path, chat_tokenizer(family))
    (exported.folder / "chat_template.jinja").write_text(FAMILIES[family].template)
    with pytest.raises(UserError, match="through the text of its chat template, 3 of 3 held-out"):
        exported.check()


@pytest.mark.parametrize(
    "settings",
    [
        RewardSettings(template="chat", lowercase=True),
        RewardSettings(template="chat", echo=True),
        RewardSettings(template="chat", bound=2.0, mean=0.1),
        RewardSettings(template="Q: {prompt}\nA:\n", lowercase=True, echo=True),
    ],
    ids=str,
)
def test_check_scores_reads_a_reward_as_its_settings_say(
    settings: RewardSettings, tmp_path: Path
) -> None:
    exported = Exported(tmp_path, chat_tokenizer("chatml"), settings)
    difference = exported.check()
    assert difference is not None and difference < 1e-5


def test_check_scores_gives_tools_to_the_template(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{{ tools | tojson if tools }}" + str(tokenizer.chat_template)
    talk = [{**TALK[0], "tools": TOOLS}, *TALK[1:]]
    exported = Exported(tmp_path, tokenizer, talk=talk)
    difference = exported.check()
    assert difference is not None and difference < 1e-5
    assert ["find" in tokenizer.decode(row) for row in exported.run.ids] == [False, False, True]


def test_check_scores_gives_no_difference_where_transformers_lacks_a_term(tmp_path: Path) -> None:
    exported = Exported(tmp_path, chat_tokenizer("llama-3"), RewardSettings(lm_coef=0.5))
    assert exported.check() is None


# --- models that other tools load in another way --------------------------------------------------

CAPPED = {"config": Gemma2Config, "attn_logit_softcapping": 0.5}
LORA = LoraOptions(r=4)


def test_check_scores_of_a_model_with_capped_attention(tmp_path: Path) -> None:
    """Without a word in its config, Gemma 2 is loaded with an attention that has no cap."""
    difference = Exported(tmp_path, chat_tokenizer("gemma"), **CAPPED).check()
    assert difference is not None and difference < 1e-5


def test_check_scores_refuses_a_model_without_a_classifier_in_transformers(
    tmp_path: Path,
) -> None:
    exported = Exported(tmp_path, chat_tokenizer("llama-3"), config=GraniteConfig)
    with pytest.raises(UserError, match="transformers has no sequence classifier of a granite"):
        exported.check()


@pytest.mark.parametrize(
    ("options", "limit"),
    [({"dtype": torch.bfloat16}, 1e-5), (CAPPED, 1e-5), ({"bits": 4}, 1e-2)],
    ids=["bfloat16", "capped", "4-bit"],
)
def test_check_scores_of_an_adapter_on_such_a_base(
    options: dict[str, Any], limit: float, tmp_path: Path
) -> None:
    if "bits" in options:
        pytest.importorskip("bitsandbytes", reason="pip install 'irl-align[qlora]'")
    exported = Exported(tmp_path, chat_tokenizer("gemma"), lora=LORA, **options)
    difference = exported.check()
    assert difference is not None and difference < limit


# --- plain templates ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "prefix", "template", "agrees"),
    [
        ("byte-level", False, "Q: {prompt}\nA:\n", True),
        ("byte-level", False, "{prompt} ", False),  # a token spans the end of the prompt
        ("sentencepiece", False, "Q: {prompt}\nA:\n", True),
        ("sentencepiece", True, "Q: {prompt}\nA:\n", False),  # a space is put before each text
    ],
)
def test_check_scores_agree_or_the_export_is_refused(
    family: str, prefix: bool, template: str, agrees: bool, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer(family, (), eos="</s>", bos="<s>", pad="<pad>", prefix=prefix)
    exported = Exported(tmp_path, tokenizer, RewardSettings(template=template))
    assert (
        chat_texts(AutoTokenizer.from_pretrained(exported.folder), PROMPTS, ANSWERS)
        == exported.run.ids
    ) == agrees
    if agrees:
        difference = exported.check()
        assert difference is not None and difference < 1e-5
        return
    with pytest.raises(UserError, match="the tokenizer divides prompt and answer differently"):
        exported.check()


# --- every template that TRL ships ----------------------------------------------------------------

TALKS = [
    [("user", "hi there"), ("assistant", "Yes <ok>\nwell")],
    [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
]


@pytest.mark.parametrize("file", TRL_TEMPLATES, ids=lambda file: file.stem)
def test_scored_template_ends_at_the_end_of_the_answer(file: Path) -> None:
    own = tiny_tokenizer("byte-level", (), eos="<end>", bos="<s>", pad="<pad>")
    own.chat_template = file.read_text(encoding="utf-8")
    scored = tiny_tokenizer("byte-level", (), eos="<end>", bos="<s>", pad="<pad>")
    scored.chat_template = scored_template(CHAT, own)
    rendered = 0
    for talk in TALKS:
        turns = [{"role": role, "content": text} for role, text in talk]
        options = {"tokenize": False}
        try:
            whole = own.apply_chat_template(turns, **options)
            before = own.apply_chat_template(turns[:-1], add_generation_prompt=True, **options)
        except Exception:  # the template takes no system message, or no text
            continue
        begun = scored.apply_chat_template(turns[:-1], add_generation_prompt=True, **options)
        assert begun == before
        text = scored.apply_chat_template(turns, **options)
        answer = whole[len(before) :].split("<end>")[0]
        if whole.startswith(before):  # otherwise irl-align takes the template for no training
            assert text == before + answer + "<end>"
            rendered += 1
    assert rendered or file.stem.startswith(("deepseek", "nemotron", "llava", "idefics", "smolvlm"))
