"""Tokenizers: train one, set its end of text and its pad token, check one, decode."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from irl_align.data.rows import Message, template_input
from irl_align.errors import UserError

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
BYTES = 256
# Tokens of published vocabularies that are for padding or unused, in order of preference.
_SPARE = (PAD, "<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|PAD_TOKEN|>", "<|vision_pad|>")
_SPARE_PREFIXES = ("<|reserved_special_token_", "<unused", "[unused", "<|dummy_", "<SPECIAL_")


_ANSWER = "xyzzy"  # an answer whose place in a rendered conversation is unmistakable


class TextEnd(NamedTuple):
    """How finished texts end: demonstrations, samples and what a reward reads."""

    id: int
    """Last token id of every finished completion, and at no other place in it."""
    token: str
    """The token of this id."""
    after: str
    """What the chat template writes after the token; it is no part of the completion."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most vocab_size tokens, including the special ones.

    Any text has ids. Pad, BOS and EOS are distinct. Encoding with special tokens adds one BOS and
    no EOS. The order of the texts does not matter. Raises UserError: vocab_size is too small.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if vocab_size < BYTES + 3:
        raise UserError(
            f"model.from_scratch.vocab_size: found {vocab_size}, expected at least {BYTES + 3}: "
            "256 bytes and 3 special tokens"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def text_end(tokenizer: PreTrainedTokenizerBase, template: str) -> TextEnd:
    """Where a text ends, the only definition of it: by the template of a data card or of a reward.

    With template `chat` it is the first added token that the chat template writes after the last
    answer, such as <|eot_id|>, <|im_end|> or <end_of_turn>. If there is none, and with any other
    template, it is the tokenizer's EOS. Raises UserError: the chat template is missing or does not
    write the answer, or there is no EOS.
    """
    if template == "chat":
        written = _after_answer(tokenizer)
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        # Some vocabularies list runs of newlines as added tokens; they end no turn.
        names = sorted(filter(str.strip, added), key=len, reverse=True)
        first = re.search("|".join(map(re.escape, names)) or "$^", written)
        if first is not None:
            return TextEnd(added[first[0]], first[0], written[first.end() :])
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.path: the tokenizer of {tokenizer_name(tokenizer)} has no EOS token"
        )
    return TextEnd(int(tokenizer.eos_token_id), str(tokenizer.eos_token), "")


def _after_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes after the last answer of a conversation."""
    if not tokenizer.chat_template:
        raise UserError(
            f"model.chat_template: the data card's template is chat and the tokenizer of "
            f"{tokenizer_name(tokenizer)} has none; expected a Jinja file with one"
        )
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _ANSWER}]
    try:
        written = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # a template may raise anything that Python may
        raise UserError(
            f"model.chat_template: the template of {tokenizer_name(tokenizer)} cannot render a "
            f"user's turn and an answer: {' '.join(str(error).split())}"
        ) from error
    _, answer, after = written.rpartition(_ANSWER)
    if not answer:
        raise UserError(
            f"model.chat_template: the template of {tokenizer_name(tokenizer)} does not write the "
            "content of an assistant's turn; expected it as it is"
        )
    return after


def set_text_end(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Make the end of texts the tokenizer's EOS, so that every tool that reads EOS agrees.

    Raises UserError: as text_end does.
    """
    end = text_end(tokenizer, template)
    if end.id == tokenizer.eos_token_id:
        return
    given = tokenizer.added_tokens_decoder[end.id]
    if given.special:
        tokenizer.eos_token = end.token
        return
    sides: dict[str, Any] = {"lstrip": given.lstrip, "rstrip": given.rstrip}
    special = AddedToken(end.token, special=True, normalized=given.normalized, **sides)
    tokenizer.add_special_tokens({"eos_token": special})  # decoding leaves out special tokens only


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Set EOS to the end of texts with this template, and pad to a token that is not EOS.

    Padding is masked, and EOS must be learnt. The pad token is an unused token of the vocabulary if
    there is one, else a new one. Raises UserError: as text_end does.
    """
    set_text_end(tokenizer, template)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    taken = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    reserved = [token for token in vocabulary if token.startswith(_SPARE_PREFIXES)]
    reserved.sort(key=lambda token: vocabulary[token])
    for token in (*_SPARE, *reserved):
        if token in vocabulary and token not in taken:
            tokenizer.pad_token = token
            return
    tokenizer.add_special_tokens({"pad_token": PAD})


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Raise UserError unless texts with this template have an end, and pad is another token."""
    end = text_end(tokenizer, template)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == end.id:
        raise UserError(
            f"model.path: the tokenizer of {tokenizer_name(tokenizer)} has pad token "
            f"{tokenizer.pad_token!r}, expected one that is not EOS"
        )


def decode_batch(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """Texts of B rows of token ids: special tokens are left out, nothing else is changed."""
    return list(
        tokenizer.batch_decode(
            [list(row) for row in rows],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
    )


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
) -> str:
    """Messages in the tokenizer's chat template, with the definitions of tools in the first one.

    The template may raise any error.
    """
    conversation, tools = template_input(messages)
    text = tokenizer.apply_chat_template(
        conversation,
        tools=tools,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    return str(text)


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Where a tokenizer was loaded from, for messages."""
    return tokenizer.name_or_path or "the model"
