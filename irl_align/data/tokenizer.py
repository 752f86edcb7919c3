"""Tokenizers: train one, add a pad token, check one, decode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from irl_align.errors import UserError

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
BYTES = 256
# Tokens of published vocabularies that are for padding or unused, in order of preference.
_SPARE = (PAD, "<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|PAD_TOKEN|>", "<|vision_pad|>")
_SPARE_PREFIXES = ("<|reserved_special_token_", "<unused", "[unused", "<|dummy_", "<SPECIAL_")


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


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give the tokenizer a pad token that is not EOS: padding is masked, and EOS must be learnt.

    The pad token is an unused token of the vocabulary if there is one. Returns True if a token was
    added, so that the model's embeddings must be resized to len(tokenizer).
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return False
    vocabulary = tokenizer.get_vocab()
    taken = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    reserved = [token for token in vocabulary if token.startswith(_SPARE_PREFIXES)]
    reserved.sort(key=lambda token: vocabulary[token])
    for token in (*_SPARE, *reserved):
        if token in vocabulary and token not in taken:
            tokenizer.pad_token = token
            return False
    tokenizer.add_special_tokens({"pad_token": PAD})
    return True


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, needs_chat: bool) -> None:
    """Raise UserError unless EOS and pad exist and differ, and a needed chat template exists."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.path: the tokenizer of {tokenizer_name(tokenizer)} has no EOS token"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"model.path: the tokenizer of {tokenizer_name(tokenizer)} has pad token "
            f"{tokenizer.pad_token!r}, expected one that is not EOS"
        )
    if needs_chat and not tokenizer.chat_template:
        raise UserError(
            f"model.chat_template: the data card's template is chat and the tokenizer of "
            f"{tokenizer_name(tokenizer)} has none; expected a Jinja file with one"
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


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Where a tokenizer was loaded from, for messages."""
    return tokenizer.name_or_path or "the model"
