"""Encoding: templates, token ids, length limits."""

import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_templates import FAMILIES, chat_tokenizer
from support.tiny_tokenizers import FAMILIES as KINDS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from irl_align.config.data import DataOptions
from irl_align.data.cards import Card
from irl_align.data.columns import prompts_of
from irl_align.data.encoding import (
    encode_completions,
    encode_demonstrations,
    encode_preferences,
    encode_prompts,
    training_texts,
)
from irl_align.data.parsing import learned_turns
from irl_align.data.prompt_keys import same_prompts
from irl_align.data.rows import prompt_key
from irl_align.data.tokenizer import (
    check_tokenizer,
    decode_batch,
    prepare_tokenizer,
    train_tokenizer,
)
from irl_align.errors import UserError
from irl_align.models.sft import conversation_columns

TEXTS = ["The Mill is a pub.", "name[The Mill], eatType[pub]", "Wo ist das Café?"]
OPTIONS = DataOptions(card="own")
ROWS = [
    {"prompt": "name[The Mill]", "completion": "The Mill"},
    {"prompt": "name[Cocum]", "completion": "Cocum."},
    {"prompt": "name[The Mill]", "completion": "A Mill."},
]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}"
)


def card(template: str = "{prompt}\n", lowercase: bool = False) -> Card:
    return Card(
        kind="demonstrations",
        splits={"train": {"files": "x"}},
        columns={"prompt": "p", "completion": "c"},
        template=template,
        lowercase=lowercase,
        name="own",
        folder=Path(),
        license="",
    )


@pytest.fixture(scope="module")
def scratch() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


def words(*vocabulary: str, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per word, an independent stand-in whose ids can be counted by hand."""
    names = ["<unk>", "<s>", "</s>", *vocabulary]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


# ---------------------------------------------------------------- plain templates


def test_encode_demonstrations_with_a_plain_template_equals_a_hand_count() -> None:
    tokenizer = words("ask:", "say:", "a", "b", "c")  # ids 3 to 7
    rows = [{"prompt": "a b", "completion": "c"}, {"prompt": "b", "completion": "a c"}]
    encoded, dropped = encode_demonstrations(rows, tokenizer, card("ask: {prompt} say:"), OPTIONS)
    assert dropped == 0
    assert encoded["prompt_ids"][:] == [[3, 5, 6, 4], [3, 6, 4]]
    assert encoded["completion_ids"][:] == [[7, 2], [5, 7, 2]]
    assert encoded["prompt"][:] == ["a b", "b"] and encoded["completion"][:] == ["c", "a c"]
    assert encoded["prompt_key"][:] == [prompt_key("a b"), prompt_key("b")]


def test_encode_prompts_adds_bos_once_if_the_tokenizer_does() -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    for bos, template, expected in (
        (True, "{prompt}", [1, 3]),
        (True, "<s> {prompt}", [1, 3]),  # the template writes it itself
        (False, "{prompt}", [3]),
        (False, "<s> {prompt}", [1, 3]),
    ):
        encoded = encode_demonstrations(
            rows, words("a", "b", bos=bos), card(template), OPTIONS
        ).rows
        assert encoded["prompt_ids"][0] == expected
        assert encoded["completion_ids"][0] == [4, 2]


def test_encode_prompts_does_not_format_the_prompt() -> None:
    """Braces in a prompt are text, and literal braces of the template are written twice."""
    tokenizer = words("{prompt}", "{x}", "a")
    encoded = encode_prompts(["{prompt}", "{x}"], tokenizer, card("{{x}} {prompt}"))
    assert encoded == [[4, 3], [4, 4]]


def test_lowercase_changes_ids_and_completions(scratch: PreTrainedTokenizerFast) -> None:
    encoded = encode_demonstrations(ROWS, scratch, card(lowercase=True), OPTIONS).rows
    assert encoded["prompt"][0] == "name[The Mill]"  # as gold metrics and edits read it
    assert encoded["completion"][0] == "the mill"
    ids = [encoded["prompt_ids"][0], encoded["completion_ids"][0]]
    assert decode_batch(scratch, ids) == ["name[the mill]\n", "the mill"]


@pytest.mark.parametrize("text", ["a </s> b", "</s>", "a <PAD> b"])
def test_encode_demonstrations_refuses_special_tokens_in_a_completion(text: str) -> None:
    tokenizer = words("a", "b")
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    rows = [{"prompt": "a", "completion": "a"}, {"prompt": "a", "completion": text}]
    with pytest.raises(UserError, match=r"data\.card own, row 1: completion holds '<"):
        encode_demonstrations(rows, tokenizer, card(), OPTIONS)


def test_encode_preferences_equals_a_hand_count() -> None:
    tokenizer = words("a", "b", "c", bos=True)
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c b", "subset": "s", "margin": 2.0},
        {"prompt": "a", "chosen": "c", "rejected": "b", "subset": "", "margin": None},
    ]
    encoded, dropped = encode_preferences(rows, tokenizer, card(), OPTIONS)
    assert dropped == 0
    assert encoded["prompt_ids"][:] == [[1, 3], [1, 3]]
    assert encoded["chosen_ids"][:] == [[4, 2], [5, 2]]
    assert encoded["rejected_ids"][:] == [[5, 4, 2], [4, 2]]
    assert encoded["margin"][:] == [2.0, None] and encoded["subset"][:] == ["s", ""]


# ---------------------------------------------------------------- limits

LONG = [
    {"prompt": "a", "completion": "b"},  # 1 and, with EOS, 2 tokens
    {"prompt": "a a a", "completion": "b"},  # 3 and 2
    {"prompt": "a", "completion": "b b b"},  # 1 and 4
]


@pytest.mark.parametrize(
    ("limits", "context", "kept"),
    [
        ({}, None, [0, 1, 2]),
        ({"max_prompt_tokens": 3, "max_completion_tokens": 4}, 5, [0, 1, 2]),
        ({"max_prompt_tokens": 2}, None, [0, 2]),
        ({"max_completion_tokens": 3}, None, [0, 1]),
        ({}, 4, [0]),
    ],
)
def test_encode_demonstrations_drops_rows_over_the_limits(
    limits: dict[str, int], context: int | None, kept: list[int]
) -> None:
    tokenizer = words("a", "b")
    drop = DataOptions(card="own", overlong="drop", **limits)
    encoded, dropped = encode_demonstrations(LONG, tokenizer, card(), drop, context)
    assert encoded["completion"][:] == [LONG[row]["completion"] for row in kept]
    assert dropped == 3 - len(kept)
    stop = DataOptions(card="own", **limits)
    if dropped:
        first = min({0, 1, 2} - set(kept))
        with pytest.raises(UserError, match=f"data.card own, row {first}: prompt of .* tokens and"):
            encode_demonstrations(LONG, tokenizer, card(), stop, context)
    else:
        assert len(encode_demonstrations(LONG, tokenizer, card(), stop, context).rows) == 3


def test_encode_demonstrations_refuses_to_drop_every_row() -> None:
    drop = DataOptions(card="own", overlong="drop", max_completion_tokens=1)
    with pytest.raises(UserError, match=r"row 0: prompt of 1 tokens and completion of 2; expected"):
        encode_demonstrations(LONG, words("a", "b"), card(), drop)


# ---------------------------------------------------------------- chat templates


@pytest.fixture
def chat(scratch: PreTrainedTokenizerFast, tmp_path: Path) -> PreTrainedTokenizerFast:
    scratch.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = CHAT
    return tokenizer


TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


def test_same_prompts_merges_what_the_template_or_lowercase_makes_equal(
    chat: PreTrainedTokenizerFast,
) -> None:
    texts = ["Hi there", "hi there", " hi there\n", "else"]
    keys = [prompt_key(text) for text in texts]
    assert same_prompts(texts, chat, card("chat")) == {}
    chat.chat_template = CHAT.replace("m.content", "(m.content | trim)")
    smallest = min(keys[1:3])
    assert same_prompts(texts, chat, card("chat")) == {
        key: smallest for key in keys[1:3] if key != smallest
    }
    smallest = min(keys[:2])
    for tokenizer in (chat, None):  # no tokenizer is one that is trained on the data
        assert same_prompts(texts, tokenizer, card(lowercase=True)) == {
            key: smallest for key in keys[:2] if key != smallest
        }


def test_encode_demonstrations_gives_prompts_of_the_same_ids_one_key(
    scratch: PreTrainedTokenizerFast,
) -> None:
    rows = [{"prompt": prompt, "completion": "y"} for prompt in ("Ab", "c", "aB", "ab")]
    encoded = encode_demonstrations(
        rows, scratch, card(lowercase=True), DataOptions(card="own")
    ).rows
    first, other, *same = encoded["prompt_key"]
    assert same == [first, first] != [other, other] and other == prompt_key("c")
    assert first == min(map(prompt_key, ("Ab", "aB", "ab")))


def test_chat_prompts_equal_the_template_by_hand(chat: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "Hi", "completion": "Hello"}, {"prompt": TALK, "completion": "Goodbye"}]
    encoded = encode_demonstrations(rows, chat, card("chat"), OPTIONS).rows
    texts = [
        "<|user|>\nHi\n<|assistant|>\n",
        "<|user|>\nHi\n<|assistant|>\nHello<|eos|>\n<|user|>\nBye\n<|assistant|>\n",
    ]
    # Without BOS: the template writes none. After the first EOS nothing follows.
    assert [chat.decode(ids) for ids in encoded["prompt_ids"]] == texts
    assert [chat.decode(ids) for ids in encoded["completion_ids"]] == [
        "Hello<|eos|>",
        "Goodbye<|eos|>",
    ]
    assert encoded["prompt"][:] == ["Hi", "user: Hi\nassistant: Hello\nuser: Bye"]
    assert prompts_of(encoded) == ["Hi", TALK]


def test_encode_prompts_takes_a_conversation_of_one_turn_as_text(
    scratch: PreTrainedTokenizerFast,
) -> None:
    assert encode_prompts([TALK[:1], "Hi"], scratch, card("Q {prompt}")) == (
        encode_prompts(["Hi", "Hi"], scratch, card("Q {prompt}"))
    )
    with pytest.raises(UserError, match="a conversation needs template: chat"):
        encode_prompts([TALK], scratch, card("Q {prompt}"))


def test_chat_ids_equal_those_of_the_whole_conversation(chat: PreTrainedTokenizerFast) -> None:
    row = {"prompt": TALK, "completion": "The Mill is a pub."}
    encoded = encode_demonstrations([row], chat, card("chat"), OPTIONS).rows[0]
    turns = [*TALK, {"role": "assistant", "content": row["completion"]}]
    whole = chat.apply_chat_template(turns, tokenize=True, return_dict=False)
    newline = chat("\n", add_special_tokens=False).input_ids  # what follows the last EOS
    assert encoded["prompt_ids"] + encoded["completion_ids"] + newline == whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_encode_demonstrations_ends_each_completion_with_its_only_end_of_turn(
    family: str, kind: str
) -> None:
    tokenizer, own = chat_tokenizer(family, kind), FAMILIES[family]
    prepare_tokenizer(tokenizer, "chat")
    rows = [{"prompt": TALK, "completion": "Good bye."}, {"prompt": "Hi", "completion": "Hello"}]
    encoded = encode_demonstrations(rows, tokenizer, card("chat"), OPTIONS).rows
    assert len(encoded) == 2
    for row, ids in zip(rows, encoded["completion_ids"], strict=True):
        assert ids[-1] == tokenizer.convert_tokens_to_ids(own.end) and ids.count(ids[-1]) == 1
        assert decode_batch(tokenizer, [ids])[0].strip() == row["completion"]
    turns = [*TALK, {"role": "assistant", "content": "Good bye."}]
    written = tokenizer.apply_chat_template(turns, tokenize=False)
    whole = tokenizer(written, add_special_tokens=False).input_ids
    ids = encoded["prompt_ids"][0] + encoded["completion_ids"][0]
    assert ids == whole[: len(ids)]


def test_encode_prompts_adds_no_second_bos_to_a_chat_template(
    chat: PreTrainedTokenizerFast,
) -> None:
    chat.chat_template = "{{ bos_token }}" + CHAT
    (ids,) = encode_prompts(["Hi"], chat, card("chat"))
    assert ids[0] == chat.bos_token_id and ids.count(chat.bos_token_id) == 1


def test_encode_completions_adds_eos_that_a_chat_template_lacks(
    chat: PreTrainedTokenizerFast,
) -> None:
    chat.chat_template = CHAT.replace("{{ eos_token }}", "")
    encoded = encode_demonstrations(
        [{"prompt": "Hi", "completion": "Hello"}], chat, card("chat"), OPTIONS
    ).rows
    assert chat.decode(encoded["completion_ids"][0]) == "Hello\n<|eos|>"


def test_encode_completions_splits_a_token_over_the_end_of_the_prompt(
    chat: PreTrainedTokenizerFast,
) -> None:
    """The policy is given the prompt's ids, so a token that joins prompt and answer cannot be."""
    tokenizer = words("ask", "ask:b", "ask:", "b")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}ask:"
        "{% else %}{{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    prepare_tokenizer(tokenizer, "{prompt}")
    assert tokenizer("ask:b").input_ids == [4]
    encoded = encode_demonstrations(
        [{"prompt": "x", "completion": "b"}], tokenizer, card("chat"), OPTIONS
    ).rows
    assert encoded["prompt_ids"][0] == [5] and encoded["completion_ids"][0] == [6, 2]


def test_encode_completions_refuses_a_template_that_changes_the_prompt(
    chat: PreTrainedTokenizerFast,
) -> None:
    chat.chat_template = "{{ messages | length }}" + CHAT
    with pytest.raises(
        UserError, match=r"row 0: model\.chat_template: .* renders the prompt of a row diff"
    ):
        encode_demonstrations(ROWS, chat, card("chat"), OPTIONS)


def test_encode_prompts_reports_a_template_that_refuses_a_role(
    chat: PreTrainedTokenizerFast,
) -> None:
    refusal = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    )
    chat.chat_template = refusal + CHAT
    rows = [{"prompt": [{"role": "system", "content": "x"}, *TALK], "completion": "y"}]
    with pytest.raises(UserError, match=r"roles system, user, assistant, user: no system turn"):
        encode_demonstrations(rows, chat, card("chat"), OPTIONS)


def test_encode_prompts_names_a_missing_chat_template(scratch: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"model\.chat_template: .*expected a Jinja file"):
        encode_demonstrations(ROWS, scratch, card("chat"), OPTIONS)
    with pytest.raises(UserError, match=r"data\.card own, row 0: .*chat"):
        encode_demonstrations([{"prompt": TALK, "completion": "x"}], scratch, card(), OPTIONS)


@pytest.mark.parametrize("template", ["{prompt}\n", "chat"])
def test_encode_completions_equals_encode_demonstrations(
    chat: PreTrainedTokenizerFast, template: str
) -> None:
    encoded = encode_demonstrations(ROWS, chat, card(template, lowercase=True), OPTIONS).rows
    prompts, texts = [row["prompt"] for row in ROWS], [row["completion"] for row in ROWS]
    ids = encode_prompts(prompts, chat, card(template, lowercase=True))
    assert ids == encoded["prompt_ids"][:]
    completions = encode_completions(prompts, texts, ids, chat, card(template, lowercase=True))
    assert completions == encoded["completion_ids"][:]


def test_train_tokenizer_has_distinct_special_tokens(
    scratch: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    assert (scratch.pad_token_id, scratch.bos_token_id, scratch.eos_token_id) == (0, 1, 2)
    assert 259 <= len(scratch) <= 300
    check_tokenizer(scratch, "{prompt}")
    ids = scratch("The Mill").input_ids
    assert ids[0] == 1 and ids.count(1) == 1 and 2 not in ids
    scratch.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("The Mill").input_ids == ids
    encoded = encode_demonstrations(ROWS, scratch, card(), OPTIONS).rows.to_dict()
    assert encode_demonstrations(ROWS, again, card(), OPTIONS).rows.to_dict() == encoded
    assert all(row[0] == 1 and row.count(1) == 1 for row in encoded["prompt_ids"])
    assert all(row[-1] == 2 and row.count(2) == 1 for row in encoded["completion_ids"])


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_decode_batch_inverts_encoding_of_any_text(text: str) -> None:
    tokenizer = train_tokenizer(TEXTS, 270)
    rows = [{"prompt": "x", "completion": text}]
    try:
        encoded = encode_demonstrations(rows, tokenizer, card(), DataOptions(card="own")).rows
    except UserError:
        assert "<|eos|>" in text or "<|pad|>" in text or len(text.encode()) > 511
        return
    assert decode_batch(tokenizer, encoded["completion_ids"]) == [text]


def test_training_texts_are_distinct_and_rendered() -> None:
    assert training_texts(ROWS, card("<{prompt}>", lowercase=True)) == [
        "<name[the mill]>",
        "the mill",
        "<name[cocum]>",
        "cocum.",
        "a mill.",
    ]
    with pytest.raises(UserError, match="expected a card with a plain template"):
        training_texts(ROWS, card("chat"))


def test_encode_prompts_neither_cuts_nor_warns_about_long_texts(
    scratch: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    scratch.model_max_length = 4
    with caplog.at_level(logging.WARNING):
        (ids,) = encode_prompts(["The Mill is a pub."], scratch, card())
    assert (
        len(ids) > 4 and not caplog.records
    )  # neither cut nor warned of: the recipe's limits rule


def turns(*messages: tuple[str, str], **more: object) -> list[dict[str, object]]:
    """Messages by role and content; `more` belongs to the last one."""
    talk: list[dict[str, object]] = [{"role": role, "content": text} for role, text in messages]
    talk[-1] |= more
    return talk


IGNORES_SYSTEM = CHAT.replace(
    "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
)
WITHOUT_THOUGHTS = CHAT.replace("m.content", "m.content.split('</think>')[-1]")
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


@pytest.mark.parametrize(
    ("template", "prompt", "completion", "message"),
    [
        (
            CHAT,
            turns(("user", "a")),
            turns(("assistant", "b"), tool_calls=CALLS),
            "not write tool_c",
        ),
        (CHAT, turns(("user", "a"), tools=CALLS), "b", "does not write tools"),
        (
            CHAT,
            turns(("user", "a"), ("assistant", "b"), reasoning_content="c"),
            "d",
            "reasoning_con",
        ),
        (
            IGNORES_SYSTEM,
            turns(("system", "a"), ("user", "b")),
            "c",
            "leaves out the turn of the role s",
        ),
        (WITHOUT_THOUGHTS, "a", "<think>b</think>c", "leaves out a part of the completion"),
        (CHAT, "a <|eos|> b", "c", r"prompt holds '<\|eos\|>', a special token"),
        (CHAT, turns(("user", "a"), ("assistant", "<|bos|>"), ("user", "b")), "c", "prompt holds"),
        (CHAT, "a", "b <|bos|> c", r"completion holds '<\|bos\|>'"),
    ],
)
def test_encode_demonstrations_refuses_or_drops_rows_that_lose_something(
    chat: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    template: str,
    prompt: Any,
    completion: Any,
    message: str,
) -> None:
    chat.chat_template = template
    odd: Any = {"prompt": prompt, "completion": completion, "place": "demos.jsonl, line 7"}
    with pytest.raises(UserError, match=rf"^demos\.jsonl, line 7: .*{message}"):
        encode_demonstrations([*ROWS, odd], chat, card("chat"), OPTIONS)
    drops = card("chat").model_copy(update={"faulty": "drop"})
    assert len(encode_demonstrations([*ROWS, odd], chat, drops, OPTIONS).rows) == len(ROWS)
    assert "1 faulty rows dropped; the first: demos.jsonl, line 7" in caplog.text
    with pytest.raises(UserError, match="all 1 rows are faulty"):
        encode_demonstrations([odd], chat, drops, OPTIONS)


def test_encode_demonstrations_writes_tools_calls_and_their_results(
    chat: PreTrainedTokenizerFast,
) -> None:
    chat.chat_template = "{% if tools %}{{ tools[0].function.name }};{% endif %}" + CHAT.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for call in m.tool_calls %}"
        "{{ call.function.arguments | tojson }}{% endfor %}",
    )
    talk: Any = turns(("system", ""), ("user", "1+1?"), ("assistant", ""), tool_calls=CALLS)
    talk += turns(("tool", "2"))
    talk[0]["tools"] = CALLS
    row: Any = {"prompt": talk, "completion": "two"}
    call: Any = {"prompt": talk[:2], "completion": talk[2:3]}
    encoded = encode_demonstrations([row, call], chat, card("chat"), OPTIONS).rows
    prompt, answer = (chat.decode(encoded[name][0]) for name in ("prompt_ids", "completion_ids"))
    assert prompt.startswith("add;") and '{"a": 1}' in prompt and "<|tool|>" in prompt
    assert answer.startswith("two") and answer.endswith("<|eos|>")
    assert chat.decode(encoded["completion_ids"][1]).startswith('{"a": 1}')


def test_learned_turns_encode_to_the_conversation_with_a_loss_on_each_answer(
    chat: PreTrainedTokenizerFast,
) -> None:
    talk: Any = turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    row: Any = {"prompt": [*talk, *turns(("user", "e"))], "completion": "f", "earlier": [1, 3]}
    rows = learned_turns([row, {"prompt": "g", "completion": "h"}])
    encoded = encode_demonstrations(rows, chat, card("chat"), OPTIONS).rows
    columns = conversation_columns(encoded["prompt_ids"][:], encoded["completion_ids"][:])
    assert len(columns["input_ids"]) == 2 and columns["length"] == [*map(len, columns["labels"])]
    conversation = [*row["prompt"], {"role": "assistant", "content": "f"}]
    whole = chat.apply_chat_template(conversation, tokenize=False)
    assert whole.startswith(chat.decode(columns["input_ids"][0]))
    learned = [i for i in columns["labels"][0] if i != -100]
    assert learned == [i for ids in encoded["completion_ids"][:3] for i in ids]
    assert chat.decode(learned) == "".join(map(chat.decode, encoded["completion_ids"][:3]))
