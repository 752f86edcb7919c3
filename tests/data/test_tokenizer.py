"""Tokenizers: training, pad tokens, checks, decoding."""

from pathlib import Path

import pytest
from support.chat_templates import FAMILIES, chat_tokenizer
from support.tiny_tokenizers import FAMILIES as KINDS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from irl_align.config.data import DataOptions
from irl_align.data.cards import Card
from irl_align.data.tokenizer import (
    check_tokenizer,
    decode_batch,
    prepare_tokenizer,
    text_end,
    train_tokenizer,
)
from irl_align.errors import UserError

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


def test_train_tokenizer_does_not_depend_on_the_order() -> None:
    texts = [f"{word} {other}" for word in ["pub", "café", "cheap"] for other in ["near", "by"]]
    one, other = train_tokenizer(texts, 290), train_tokenizer(texts[::-1], 290)
    assert one.get_vocab() == other.get_vocab()
    assert one("cheap café").input_ids == other("cheap café").input_ids


def test_train_tokenizer_refuses_a_small_vocabulary() -> None:
    with pytest.raises(UserError, match=r"vocab_size: found 258, expected at least 259"):
        train_tokenizer(TEXTS, 258)
    assert len(train_tokenizer(TEXTS, 259)) == 259


def test_prepare_tokenizer_makes_pad_distinct_from_eos() -> None:
    spare = words("a", "<|reserved_special_token_1|>", "<|reserved_special_token_0|>")
    spare.pad_token = spare.eos_token
    with pytest.raises(UserError, match=r"has pad token '</s>', expected one that is not EOS"):
        check_tokenizer(spare, "{prompt}")
    size = len(spare)
    prepare_tokenizer(spare, "{prompt}")
    assert len(spare) == size
    assert spare.pad_token_id == 4  # the lower id of the two
    check_tokenizer(spare, "{prompt}")

    full = words("a")
    assert full.pad_token_id is None
    prepare_tokenizer(full, "{prompt}")
    assert len(full) == 5
    assert full.pad_token_id == 4 and full.pad_token not in (full.eos_token, None)
    prepare_tokenizer(full, "{prompt}")
    assert len(full) == 5  # now it has one
    check_tokenizer(full, "{prompt}")


def test_check_tokenizer_refuses_a_tokenizer_without_eos() -> None:
    tokenizer = words("a")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no EOS token"):
        check_tokenizer(tokenizer, "{prompt}")


def test_decode_batch_leaves_special_tokens_out(scratch: PreTrainedTokenizerFast) -> None:
    ids = [1, *scratch("Is it , a pub ?", add_special_tokens=False).input_ids, 2, 0, 0]
    assert decode_batch(scratch, [ids, []]) == ["Is it , a pub ?", ""]


# ---------------------------------------------------------------- where a text ends


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prepare_tokenizer_makes_the_end_of_a_turn_eos(
    family: str, kind: str, tmp_path: Path
) -> None:
    tokenizer, own = chat_tokenizer(family, kind), FAMILIES[family]
    before = text_end(tokenizer, "chat")
    assert before.token == own.end and before.id == tokenizer.convert_tokens_to_ids(own.end)
    prepare_tokenizer(tokenizer, "chat")
    assert tokenizer.eos_token == own.end and tokenizer.pad_token not in (None, own.end)
    check_tokenizer(tokenizer, "chat")
    assert text_end(tokenizer, "chat") == before._replace(after=own.after)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.eos_token_id == before.id
    assert text_end(again, "chat") == text_end(tokenizer, "chat")


def test_text_end_is_eos_without_a_chat_template() -> None:
    tokenizer = chat_tokenizer("gemma")
    assert text_end(tokenizer, "Q: {prompt}\nA:") == (tokenizer.eos_token_id, "<eos>", "")
    prepare_tokenizer(tokenizer, "Q: {prompt}\nA:")
    assert tokenizer.eos_token == "<eos>"


@pytest.mark.parametrize("written", ["", "\n\n", " END."])
def test_text_end_is_eos_where_a_chat_template_writes_no_token(written: str) -> None:
    tokenizer = chat_tokenizer("gemma")
    tokenizer.add_tokens(["\n\n"])  # as Gemma's vocabulary has them
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}" + written + "{% endfor %}"
    assert text_end(tokenizer, "chat") == (tokenizer.eos_token_id, "<eos>", "")


def test_prepare_tokenizer_makes_an_end_that_is_no_special_token_special() -> None:
    tokenizer = words("a", "b")
    tokenizer.add_tokens(["<turn_end>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} <turn_end>\n{% endfor %}"
    end = tokenizer.convert_tokens_to_ids("<turn_end>")
    assert decode_batch(tokenizer, [[3, end]]) == ["a <turn_end>"]
    prepare_tokenizer(tokenizer, "chat")
    assert tokenizer.eos_token_id == end and decode_batch(tokenizer, [[3, end]]) == ["a"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"model\.chat_template: the data card's template is chat and .* has none"),
        ("{{ messages[0].content }}", r"model\.chat_template: .* does not write the content of"),
        ("{{ raise_exception('never') }}", r"model\.chat_template: .* cannot render .*: never"),
    ],
)
def test_text_end_refuses_a_template_that_writes_no_answer(
    template: str | None, message: str
) -> None:
    tokenizer = chat_tokenizer("gemma")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        text_end(tokenizer, "chat")
