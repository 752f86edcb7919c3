"""Token ids of a policy as prompts of the data and as answers without their template."""

import pytest
from support.chat_templates import FAMILIES, chat_tokenizer
from transformers import PreTrainedTokenizerFast

from irl_align.data.decoding import TokenFormat, decode_answers
from irl_align.data.encoding import encode_completions, encode_prompts
from irl_align.data.rows import Prompt
from irl_align.data.tokenizer import prepare_tokenizer
from irl_align.errors import UserError
from irl_align.evaluation.inference import PromptFormat

CHAT = PromptFormat(template="chat")
PROMPTS: list[Prompt] = [
    "Where is the pub?",
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Where is it?"},
    ],
]
ANSWERS = ["Near the river.", "In the city centre, I think."]
THINK = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}<|im_start|>assistant\n"
    "<think>\n\n</think>\n\n{{ m.content }}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(family: str, sentencepiece: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a run: `think` writes an empty think block before the last answer, `spelled`
    knows no token for the end of a turn."""
    made = chat_tokenizer("chatml" if family in ("think", "spelled") else family, sentencepiece)
    if family == "think":
        made.chat_template = THINK
    if family == "spelled":
        made = chat_tokenizer("zephyr", sentencepiece)
        made.chat_template = FAMILIES["chatml"].template
    prepare_tokenizer(made, "chat")
    return made


@pytest.mark.parametrize("sentencepiece", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "think", "spelled"])
def test_decode_answers_leaves_out_what_the_template_writes(
    family: str, sentencepiece: bool
) -> None:
    own = tokenizer(family, sentencepiece)
    prompt_ids = encode_prompts(PROMPTS, own, CHAT)
    ids = encode_completions(PROMPTS, ANSWERS, prompt_ids, own, CHAT)
    assert [a.text for a in decode_answers(PROMPTS, ids, own, CHAT)] == ANSWERS
    known = dict(zip(map(tuple, prompt_ids), PROMPTS, strict=True))
    form = TokenFormat(own, CHAT, known)
    assert [form.prompt(row) for row in prompt_ids] == PROMPTS
    assert [a.text for a in form.answers(prompt_ids, ids)] == ANSWERS


def test_decode_answers_leaves_out_nothing_else() -> None:
    """A sample with reasoning of its own, one that was truncated, and a text without a template."""
    own = tokenizer("think")
    texts = ["<think>\nI see.\n</think>\n\nNear.", "<think>\n\n</think>\n\nNear <th", "<think>\n"]
    ids = own(texts, add_special_tokens=False)["input_ids"]
    answers = decode_answers([PROMPTS[0]] * 3, ids, own, CHAT)
    assert [answer.text for answer in answers] == [texts[0], "Near <th", texts[2]]
    assert [answer.whole for answer in answers] == texts
    [plain] = decode_answers(["x"], own(["Near\n"])["input_ids"], own, PromptFormat())
    assert plain.text == "Near\n"


@pytest.mark.parametrize("template", ["chat", "Q: {prompt} A:"])
def test_prompt_of_an_edited_prompt_is_decoded(template: str) -> None:
    """Its last turn differs from a prompt of the data."""
    own, card = tokenizer("llama-3"), PromptFormat(template=template)
    form = TokenFormat(own, card)
    [ids] = encode_prompts(["Where is the café?"], own, card)
    assert form.prompt(ids) == "Where is the café?"
    if template == "chat":
        edited = [*PROMPTS[1][:-1], {"role": "user", "content": "Why?"}]
        [ids] = encode_prompts([edited], own, card)
        assert form.prompt(ids, PROMPTS[1]) == edited
        with pytest.raises(UserError, match=r"^a prompt holds '<\|.*', a special token of"):
            form.prompt(ids)
