"""Rewards that read a policy's completions as text: scores return to the policy's tokens.

The reward's tokenizer encodes a completion's text again, by the reward's own template. A policy
token gets the reward of the longest reward prefix that ends at a byte where both tokenizations have
a boundary, so a change between two shared boundaries is credited to the token that reaches the
second. Sums over the tokens are exact. The place of a shared boundary may depend on later text (the
reward's tokenizer sees the whole), so potential-based credit is only approximately so. If either
tokenizer changes a completion (bytes that are no text, a character that it normalises), its only
boundary is its end.

What the policy's template writes around an answer is no text, and neither is its end: the reward's
own end follows where the policy stopped, and nothing follows truncated samples. Special tokens in a
completion are left out, as in decoding.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from irl_align.data.decoding import Answer, TokenFormat
from irl_align.data.tokenizer import decode_batch, text_end
from irl_align.errors import UserError
from irl_align.models.packing import Ids
from irl_align.reward.model import RewardModel
from irl_align.reward.protocol import RewardFunction, ScoreRequest, TextFormat, TokenScores
from irl_align.reward.scoring import score_tokens

_PROBE = "A cafe, 'it's £12.50'!\n\tThe  END: naïve 漢字 🙂 x=1_000;"
PROBED = 8  # prompts with which it is found whether a reward reads a policy's token ids


def for_policy(reward: RewardModel, policy: TokenFormat) -> RewardFunction:
    """The reward itself if it reads texts as the policy's token ids, else one that aligns the two.

    It does if the tokenizers are the same, and an answer to prompts of the data has the same ids.
    """
    form = reward.text_format()
    if same_tokenizer(form.tokenizer, policy.tokenizer):
        prompts = list(policy.prompts.values())[:PROBED]
        answers = [_PROBE] * len(prompts)
        own = TextFormat(policy.tokenizer, policy.card).encode(prompts, answers)
        if form.encode(prompts, answers) == own:
            return reward
    return AlignedReward(reward, policy)


def same_tokenizer(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether each token id means the same to both; padding, which is masked, may differ."""
    if (first.eos_token_id, first.bos_token_id) != (second.eos_token_id, second.bos_token_id):
        return False
    pads = {first.pad_token, second.pad_token} - {first.eos_token}
    ids, others = (
        {word: number for word, number in tokenizer.get_vocab().items() if word not in pads}
        for tokenizer in (first, second)
    )
    return ids == others


@dataclass
class AlignedReward:
    """A reward model for a policy with another tokenizer. A RewardFunction and TokenScorer."""

    reward: RewardModel
    policy: TokenFormat

    def score_ids(self, prompts: Ids, completions: Ids) -> Tensor:
        """Reward of completions as the policy's token ids: (B,) float32 on the CPU."""
        return self.reward.score_ids(*self._translate(prompts, completions)[:2], None)

    def prefix_scores_ids(self, prompts: Ids, completions: Ids) -> list[Tensor]:
        """Rewards of all prefixes at the policy's tokens: (T + 1,) per row."""
        scores = self.score_tokens(ScoreRequest(prompts, completions, prefixes=True))
        assert scores.prefixes is not None
        pairs = zip(scores.prefixes, completions, strict=True)
        return [row[: len(completion) + 1] for row, completion in pairs]

    def score_tokens(self, request: ScoreRequest) -> TokenScores:
        """As scoring.score_tokens, with the reward's scores moved to the policy's tokens.

        Raises UserError: a tokenizer's tokens do not spell the bytes of a text.
        """
        completions = request.completions
        prompt_ids, reward_ids, answers = self._translate(request.prompts, completions)
        if request.eos_prefixes:
            self._require_one_end()
        scores = score_tokens(
            self.reward, replace(request, prompts=prompt_ids, completions=reward_ids)
        )
        if not (request.prefixes or request.attention):
            return scores
        places = self._places(completions, reward_ids, answers)  # (B, Tmax + 1)
        carried = weights = None
        if scores.prefixes is not None:
            lengths = torch.tensor([len(completion) for completion in completions])
            beyond = torch.arange(places.shape[1]) > lengths[:, None]
            carried = scores.prefixes.gather(1, places).masked_fill(beyond, 0.0)
        if scores.attention is not None:
            total = torch.nn.functional.pad(scores.attention.double().cumsum(1), (1, 0))
            weights = total.gather(1, places).diff(dim=1).float()
        return TokenScores(scores.rewards, carried, weights)

    def _require_one_end(self) -> None:
        """Raise UserError if finished texts do not end with EOS only, which prefixes then get."""
        form = self.reward.text_format()
        prompt = [next(iter(self.policy.prompts.values()), "")]
        (_, [whole]), (_, [cut]) = (
            form.encode(prompt, [_PROBE], [finished]) for finished in (True, False)
        )
        if whole != [*cut, form.tokenizer.eos_token_id]:
            end = form.tokenizer.decode(whole[len(cut) :])
            raise UserError(
                f"reward: eos_prefixes: this reward's texts end with {end!r} and not with its EOS "
                "token only; expected eos_prefixes: false"
            )

    def _translate(
        self, prompts: Ids, completions: Ids
    ) -> tuple[list[list[int]], list[list[int]], list[Answer]]:
        """Prompts and completions as the reward's token ids, and the policy's answers."""
        answers = self.policy.answers(prompts, completions)
        finished = [self._stopped(completion) for completion in completions]
        prompt_ids, reward_ids = self.reward.text_format().encode(
            [self.policy.prompt(ids) for ids in prompts],
            [answer.text for answer in answers],
            finished,
        )
        return prompt_ids, reward_ids, answers

    def _places(self, policy_ids: Ids, reward_ids: Ids, answers: Sequence[Answer]) -> Tensor:
        """Number of the reward prefix of each policy prefix, the last repeated: (B, Tmax + 1)."""
        policy, reward = self._bytes
        out = np.zeros((len(policy_ids), max(map(len, policy_ids), default=0) + 1), np.int64)
        texts = decode_batch(self.reward.tokenizer, reward_ids)
        rows = zip(policy_ids, reward_ids, answers, texts, strict=True)
        for number, (own, read, answer, text) in enumerate(rows):
            stop = int(self._stopped(own))
            own_ends = policy.answer_ends(own[: len(own) - stop], answer)
            read_ends = reward.answer_ends(read, self._within(text, answer.text))
            if own_ends is not None and read_ends is not None and own_ends[-1] == read_ends[-1]:
                # What the reward's template writes after the answer belongs to the policy's end.
                read_ends = read_ends[: int((read_ends == read_ends[-1]).argmax()) + 1]
                out[number, : len(own_ends)] = shared_prefixes(own_ends, read_ends)
            out[number, len(own) :] = len(read)
        return torch.from_numpy(out)

    def _within(self, text: str, answer: str) -> Answer:
        """The answer within the reward's completion; the whole text if the template changed it."""
        answer = answer.lower() if self.reward.settings.lowercase else answer
        start = text.rfind(answer)
        return (
            Answer(text, start, start + len(answer)) if start >= 0 else Answer(text, 0, len(text))
        )

    def _stopped(self, completion: Sequence[int]) -> bool:
        """Whether a completion ends with the policy's end of text."""
        return bool(completion) and completion[-1] == self._end

    @cached_property
    def _end(self) -> int:
        return text_end(self.policy.tokenizer, self.policy.card.template).id

    @cached_property
    def _bytes(self) -> tuple[TokenBytes, TokenBytes]:
        tables = TokenBytes(self.policy.tokenizer), TokenBytes(self.reward.tokenizer)
        for table in tables:
            ids = table.tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
            if table.boundaries(ids, _PROBE) is None:
                raise table.refusal(f"its tokens of {_PROBE[:20]!r} do not spell that text")
        return tables


class TokenBytes:
    """The bytes of each token of a tokenizer; special tokens have none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        kinds = _decoder_kinds(tokenizer)
        if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise self.refusal("its tokens are not spelled in bytes")
        from_char = {char: byte for byte, char in bytes_to_unicode().items()}
        self.table: list[bytes] = [b""] * len(tokenizer)
        added = tokenizer.added_tokens_decoder
        for token, number in tokenizer.get_vocab().items():
            if number in added:
                self.table[number] = (
                    b"" if added[number].special else added[number].content.encode()
                )
            elif "ByteLevel" in kinds:
                self.table[number] = bytes(from_char[char] for char in token if char in from_char)
            elif "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x"):
                self.table[number] = bytes([int(token[3:5], 16)])
            else:
                self.table[number] = token.replace("▁", " ").encode()
        self.size = np.array([len(spelling) for spelling in self.table])

    def boundaries(self, ids: Sequence[int], text: str) -> np.ndarray | None:
        """Bytes of `text` that each prefix of its tokens spells, -1 inside a character: (T + 1,).

        None if the tokens spell another text. A space that a tokenizer puts before every text, and
        that decoding removes, does not count.
        """
        whole = b"".join(self.table[number] for number in ids)
        if whole == text.encode():
            return np.cumsum([0, *self.size[ids]])
        decoded, ends = _decode_stepwise([self.table[number] for number in ids])
        if decoded == f" {text}":
            return np.where(ends > 0, ends - 1, ends)
        return ends if decoded == text else None

    def answer_ends(self, ids: Sequence[int], answer: Answer) -> np.ndarray | None:
        """Bytes of the answer in a completion that each prefix of its tokens spells: (T + 1,).

        0 before the answer and the answer's length after it; otherwise as boundaries.
        """
        ends = self.boundaries(ids, answer.whole)
        if ends is None:
            return None
        start, length = (len(t.encode()) for t in (answer.whole[: answer.start], answer.text))
        return np.where(ends < 0, ends, np.clip(ends - start, 0, length))

    def refusal(self, why: str) -> UserError:
        """The error for tokens that cannot be mapped to bytes of text."""
        return UserError(
            f"reward.tokenizer: {type(self.tokenizer).__name__} of "
            f"{self.tokenizer.name_or_path or 'the model'} cannot be aligned byte by byte: {why}; "
            "expected a reward with the policy's tokenizer, or credit sparse, uniform or random"
        )


def shared_prefixes(policy: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """Number of the longest reward prefix at a boundary that both have, for each policy prefix.

    policy: (T + 1,) bytes spelled by each prefix of the policy's tokens, -1 inside a character;
    reward: the same for the reward's tokens. Both start at 0. Returns (T + 1,).
    """
    shared = np.flatnonzero((reward >= 0) & np.isin(reward, policy))
    reached = np.maximum.accumulate(policy)
    places = shared[np.searchsorted(reward[shared], reached, side="right") - 1]
    places[0] = 0
    return places


def _decoder_kinds(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Names of the steps of a tokenizer's decoder; none without a `tokenizers` backend."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return set()
    decoder = json.loads(backend.decoder.__getstate__())
    return {step["type"] for step in decoder.get("decoders", [decoder])}


def _decode_stepwise(pieces: Sequence[bytes]) -> tuple[str, np.ndarray]:
    """UTF-8 of the joined pieces, and its bytes after each, -1 inside a character: (T + 1,)."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts, ends, size = [], [0], 0
    for number, piece in enumerate(pieces, start=1):
        text = decoder.decode(piece, final=number == len(pieces))
        texts.append(text)
        size += len(text.encode())
        ends.append(-1 if decoder.getstate()[0] else size)
    return "".join(texts), np.array(ends)
