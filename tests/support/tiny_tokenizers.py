"""Tiny tokenizers of the two usual families, built as published ones are, without a network."""

import json
from collections.abc import Sequence
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

FAMILIES = ("byte-level", "sentencepiece")
TEXT = "red green blue cat dog bird sits runs sleeps on under the a mat tree house happy"
_SPACE = "▁"  # what SentencePiece writes for a space


def tiny_tokenizer(
    family: str,
    special: Sequence[str],
    *,
    eos: str,
    pad: str | None = None,
    bos: str | None = None,
    template: str | None = None,
    prefix: bool = True,
) -> PreTrainedTokenizerFast:
    """A tokenizer of one of FAMILIES; any text has ids.

    byte-level: the special tokens follow the vocabulary, as in Llama 3, Qwen or Phi 3.
    sentencepiece: <unk>, <s>, </s> and 256 bytes precede the words, other special tokens follow; a
    space is written before a text, and also after each special token, as in Llama 2, Mistral and
    Zephyr, or with prefix=False nowhere, as in Gemma.
    special: tokens that are never divided. eos, pad, bos: which of them they are; a bos is added by
    encoding with special tokens. pad=None leaves the pad token out.
    """
    backend = _byte_level() if family == "byte-level" else _sentencepiece(prefix)
    known = backend.get_vocab()
    tokens = [*special, *(token for token in (eos, pad, bos) if token and token not in known)]
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in dict.fromkeys(tokens)]
    )
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A $B",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    named = {"eos_token": eos, "pad_token": pad, "bos_token": bos}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in named.items() if token is not None},
    )
    tokenizer.chat_template = template
    return tokenizer


def _byte_level() -> Tokenizer:
    vocabulary, merges = _learned(byte_level=True)
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(prefix: bool) -> Tokenizer:
    learned, merges = _learned(byte_level=False)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += sorted(learned, key=lambda token: learned[token])
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    space = normalizers.Replace(" ", _SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), space]) if prefix else space
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in names[:3]]
    )
    return backend


@cache
def _learned(byte_level: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of BPE on TEXT."""
    backend = Tokenizer(BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    if byte_level:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE)
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + 60, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT] * 2, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [(first, second) for first, second in model["merges"]]
