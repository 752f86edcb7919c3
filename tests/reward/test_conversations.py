"""Conversations as rewards read them, against apply_chat_template."""

import copy
from typing import Any

import pytest
from support.chat_templates import FAMILIES, chat_tokenizer

from irl_align.data.encoding import encode_completions, encode_prompts
from irl_align.data.rows import Prompt, as_messages
from irl_align.data.tokenizer import prepare_tokenizer
from irl_align.errors import UserError
from irl_align.reward.conversations import (
    encode_conversations,
    encode_samples,
    render_conversations,
)
from irl_align.reward.settings import RewardSettings

PROMPTS: list[Prompt] = [
    "Where is the pub?",
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Where is it?"},
    ],
]
ANSWERS = ["Near the river.", "In the city centre."]
BOTH = [True, True]
STRICT = (  # renders no prompt without its answer
    "{% if messages|length is odd %}{{ raise_exception('user and assistant must alternate') }}"
    "{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ eos_token }}"
)
PROMPT_ONLY = (
    "{% if messages[-1].role != 'user' %}{{ raise_exception('no user at the end') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)
SILENT = (  # writes no answer
    "{% for m in messages if m.role == 'user' %}<user>{{ m.content }}{% endfor %}<assistant>"
)


def whole(prompt: Prompt, answer: str) -> list[dict[str, str]]:
    return [*map(dict, as_messages(prompt)), {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("sentencepiece", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_encode_conversations_equals_the_snippet_of_a_model_card(
    family: str, sentencepiece: bool
) -> None:
    """Whatever the template writes at the end is read, such as a newline after the turn."""
    tokenizer = chat_tokenizer(family, sentencepiece)
    prompts, completions = encode_conversations(PROMPTS, ANSWERS, BOTH, tokenizer, None)
    rows = list(zip(PROMPTS, ANSWERS, prompts, completions, strict=True))
    for prompt, answer, before, after in rows:
        expected = tokenizer.apply_chat_template(whole(prompt, answer), return_dict=False)
        assert [*before, *after] == expected
        assert answer not in tokenizer.decode(before) and answer in tokenizer.decode(after)


def test_encode_conversations_keeps_tools_and_their_calls() -> None:
    """The first message of a prompt holds the definitions, and the answer is a whole message."""
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for t in tools or [] %}<tool>{{ t.name }}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}"
        "{% for c in m.tool_calls or [] %}<|im_start|>call {{ c.name }}{% endfor %}<|im_end|>"
        "{% endfor %}"
    )
    tools: list[Any] = [{"name": "add"}]
    call: Any = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    prompt: Any = [{"role": "user", "content": "1 plus 1?", "tools": tools}]
    [before], [after] = encode_conversations([prompt], [[call]], [True], tokenizer, None)
    chat = [{"role": "user", "content": "1 plus 1?"}, call]
    expected = tokenizer.apply_chat_template(chat, tools=tools, return_dict=False)
    assert [*before, *after] == expected
    assert tokenizer.decode(expected).startswith("<tool>add<|im_start|>user: 1 plus 1?<|im_end|>")
    assert tokenizer.decode(after) == "<|im_start|>call add<|im_end|>"


def test_encode_conversations_leaves_out_a_pad_token_at_the_end() -> None:
    """transformers reads the logit before it, whatever wrote it."""
    tokenizer = chat_tokenizer("phi")
    end = tokenizer.pad_token_id
    assert end == tokenizer.eos_token_id
    _, [read] = encode_conversations(["Hi"], ["Yes."], [True], tokenizer, None)
    _, [scored] = encode_conversations(["Hi"], ["Yes."], [True], tokenizer, end)
    assert read == [*scored, end]


@pytest.mark.parametrize("family", FAMILIES)
def test_encode_conversations_ends_with_an_answer_that_is_not_finished(family: str) -> None:
    tokenizer = chat_tokenizer(family)
    prompts, completions = encode_conversations(PROMPTS, ANSWERS, [True, False], tokenizer, None)
    finished, truncated = map(tokenizer.decode, completions)
    assert FAMILIES[family].end in finished
    assert truncated.strip() == ANSWERS[1]
    all_finished = encode_conversations(PROMPTS, ANSWERS, BOTH, tokenizer, None)
    assert prompts == all_finished[0] and completions[0] == all_finished[1][0]


def test_render_conversations_renders_prompt_and_answer_at_once() -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = STRICT
    parts = render_conversations(["Hi"], ["Yes."], [True], tokenizer)
    assert parts == [("<user>Hi<assistant>", "Yes.", "<|im_end|>")]
    tokenizer.chat_template = "{{ raise_exception('it takes no text') }}"
    with pytest.raises(UserError, match=r"the roles user, assistant: it takes no text; expected"):
        render_conversations(["Hi"], ["Yes."], [True], tokenizer)


@pytest.mark.parametrize("template", [PROMPT_ONLY, SILENT])
def test_render_conversations_puts_an_answer_after_a_template_of_prompts(
    template: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = template
    parts = render_conversations(["Hi"] * 2, ["Yes.", "N"], [True, False], tokenizer)
    assert parts[0] == ("<user>Hi<assistant>", "Yes.", "<|im_end|>")
    assert parts[1] == ("<user>Hi<assistant>", "N", "")
    assert "an answer is put after its prompt and before EOS" in caplog.text


def test_render_conversations_follows_a_template_that_changes_the_answer() -> None:
    tokenizer = chat_tokenizer("llama-3")  # it trims
    [part] = render_conversations(["Hi"], [" Yes. \n"], [True], tokenizer)
    assert (part.answer, part.after) == ("Yes.", "<|eot_id|>")
    [empty] = render_conversations(["Hi"], [""], [True], tokenizer)
    assert (empty.answer, empty.after) == ("", "<|eot_id|>")


@pytest.mark.parametrize("template", ["chat", "Q: {prompt} A:"])
@pytest.mark.parametrize("family", FAMILIES)
def test_encode_samples_equals_demonstrations(family: str, template: str) -> None:
    """An own reward reads a sampled text as it was trained to read the same demonstration."""
    tokenizer = chat_tokenizer(family)
    prepare_tokenizer(tokenizer, template)
    card = RewardSettings(template=template, lowercase=True)
    prompts = PROMPTS if template == "chat" else PROMPTS[:1] * 2
    ids = encode_prompts(prompts, tokenizer, card)
    expected = encode_completions(prompts, ANSWERS, ids, tokenizer, card)
    assert encode_samples(prompts, ANSWERS, BOTH, tokenizer, card) == (ids, expected)
    _, [cut, _] = encode_samples(prompts, ANSWERS, [False, True], tokenizer, card)
    assert cut == expected[0][:-1]


@pytest.mark.parametrize("template", ["chat", "{prompt}"])
def test_encode_samples_reads_names_of_special_tokens_as_text(template: str) -> None:
    tokenizer = chat_tokenizer("chatml")
    answer = "a<|im_end|>b"
    card = RewardSettings(template=template)
    _, [ids] = encode_samples(["Hi"], [answer], [True], tokenizer, card)
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == answer
    spelled = copy.deepcopy(tokenizer)
    _, [read] = encode_conversations(["Hi"], [answer], [True], spelled, None)
    assert read == [*ids, *tokenizer("\n")["input_ids"]]
