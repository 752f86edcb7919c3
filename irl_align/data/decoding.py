"""Token ids of a policy as texts: prompts of the data, and answers without their template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from irl_align.data.encoding import Templated, encode_completions, encode_prompts
from irl_align.data.rows import Prompt, prompt_key, with_last_text
from irl_align.data.tokenizer import decode_batch, tokenizer_name
from irl_align.errors import UserError

PROBE = "zqxj"  # an answer that no template writes, and that no template changes


class Answer(NamedTuple):
    """A completion as text, and which part of it is the answer."""

    whole: str
    """The completion without special tokens."""
    start: int
    stop: int

    @property
    def text(self) -> str:
        """The answer: the completion without what the template writes around it."""
        return self.whole[self.start : self.stop]


@dataclass(frozen=True)
class TokenFormat:
    """How a policy's token ids are text: its tokenizer, its template and its prompts."""

    tokenizer: PreTrainedTokenizerBase
    card: Templated
    prompts: Mapping[tuple[int, ...], Prompt] = field(default_factory=dict)
    """Prompts as they are in the data, by their ids. Others are decoded."""

    def prompt(self, ids: Sequence[int], like: Prompt = "") -> Prompt:
        """The prompt of the data that these ids encode.

        A prompt that is not known is decoded, as one that differs from `like` in its last turn.
        Raises UserError: it holds a special token.
        """
        known = self.prompts.get(tuple(ids))
        return self._decoded(ids, like) if known is None else known

    def _decoded(self, ids: Sequence[int], like: Prompt) -> Prompt:
        tokenizer = self.tokenizer
        [probe] = encode_prompts([with_last_text(like, PROBE)], tokenizer, self.card)
        # BOS is of the tokenizer or of the template, and no part of a text.
        rows = [row[row[:1] == [tokenizer.bos_token_id] :] for row in (list(ids), probe)]
        text, rendered = (str(tokenizer.decode(row)) for row in rows)
        before, _, after = rendered.partition(PROBE)
        text = text.removeprefix(before).removesuffix(after)
        for token in tokenizer.all_special_tokens:
            if token in text:
                raise UserError(
                    f"a prompt holds {token!r}, a special token of {tokenizer_name(tokenizer)}, "
                    "and is not in the data; expected plain text"
                )
        return with_last_text(like, text)

    def answers(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[Answer]:
        """Completions after prompts, as token ids, as answers; see decode_answers."""
        return decode_answers(
            [self.prompt(ids) for ids in prompts], completions, self.tokenizer, self.card
        )


def decode_answers(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    card: Templated,
) -> list[Answer]:
    """Sampled completions (B) as text, each after its prompt.

    What the chat template writes around every answer, such as an empty think block or a line end,
    is no part of the answer. It is found by rendering an answer after the same prompt, and left out
    where the completion has it.
    """
    around: dict[str, tuple[str, str]] = {}
    if card.template == "chat":
        distinct = {prompt_key(prompt): prompt for prompt in prompts}
        around = dict(zip(distinct, _around(list(distinct.values()), tokenizer, card), strict=True))
    answers = []
    for prompt, whole in zip(prompts, decode_batch(tokenizer, completions), strict=True):
        before, after = around[prompt_key(prompt)] if around else ("", "")
        start = len(before) if whole.startswith(before) else 0
        end = len(after) if whole[start:].endswith(after) else 0
        answers.append(Answer(whole, start, len(whole) - end))
    return answers


def _around(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, card: Templated
) -> list[tuple[str, str]]:
    """What the template writes before and after an answer to each prompt, as decoded text."""
    ids = encode_prompts(prompts, tokenizer, card)
    probes = encode_completions(prompts, [PROBE] * len(prompts), ids, tokenizer, card)
    parts = [text.partition(PROBE) for text in decode_batch(tokenizer, probes)]
    # A tokenizer that cannot spell the probe shows nothing around it.
    return [(before, after) if probe else ("", "") for before, probe, after in parts]
