"""Tokenizers unlike the tests' usual one, for rewards with a tokenizer of their own."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}


def words() -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows other words than the tests' usual tokenizer."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["punt river cheap the there is a pub near here"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def wordpiece(folder: Path) -> BertTokenizerFast:
    letters = "abcdefghijklmnopqrstuvwxyz."
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(names), encoding="utf-8")
    return BertTokenizerFast(vocab=str(folder / "vocab.txt"))
