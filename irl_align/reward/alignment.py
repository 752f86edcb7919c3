"""Rewards with a tokenizer of their own: they read the text, and scores return to policy tokens.

The reward's tokenizer encodes a completion's text again. A policy token gets the reward of the
longest reward prefix that ends at a byte where both tokenizations have a boundary, so a change
between two shared boundaries is credited to the token that reaches the second. Sums over the tokens
are exact. The place of a shared boundary may depend on later text (the reward's tokenizer sees the
whole), so potential-based credit is only approximately so. If either tokenizer changes a completion
(bytes that are no text, a character that it normalises), its only boundary is its end.

EOS is no text: the reward's EOS is appended where the policy stopped, and not to truncated samples.
Other special tokens in a completion are left out, as in decoding.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from irl_align.data.encoding import encode_prompts
from irl_align.data.rows import Prompt, prompt_text
from irl_align.data.tokenizer import decode_batch
from irl_align.errors import UserError
from irl_align.models.loading import load_model, load_tokenizer
from irl_align.models.packing import (
    TOKENS_PER_BATCH,
    Ids,
    batches_by_tokens,
    context_length,
    require_context,
)
from irl_align.reward.attention import no_prefix_scores
from irl_align.reward.model import RewardModel
from irl_align.reward.protocol import RewardFunction, ScoreRequest, TokenScores
from irl_align.reward.scoring import score_tokens
from irl_align.reward.settings import DEFAULT_SETTINGS

RawPrompt = Callable[[Sequence[int]], Prompt]
_PROBE = "A cafe, 'it's £12.50'!\n\tThe  END: naïve 漢字 🙂 x=1_000;"


def load_reward(
    path: str | Path,
    policy_tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str = "cpu",
    raw_prompt: RawPrompt | None = None,
    template: str | None = None,
    **options: Any,
) -> RewardFunction:
    """Any one-label AutoModelForSequenceClassification as the reward of a policy's token ids.

    raw_prompt: returns the data's prompt for a policy's prompt ids, for a reward with a template of
    its own; without it the reward reads the decoded prompt ids. template: the reward's template,
    such as chat, if its folder does not name it. Raises UserError: no such model.
    """
    with torch.device("meta"):
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            empty = AutoModelForSequenceClassification.from_config(config)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: config.json: not a reward model: {' '.join(str(error).split())[:200]}; "
                "expected one of AutoModelForSequenceClassification"
            ) from error
    if empty.config.num_labels != 1:
        raise UserError(
            f"{path}: config.json: num_labels is {empty.config.num_labels}; expected a reward "
            "model with one label"
        )
    if hasattr(empty, "score"):
        reward = RewardModel.from_pretrained(path, device, **options)
        if template is not None:
            reward.settings = replace(reward.settings, template=template)
        return for_policy(reward, policy_tokenizer, raw_prompt)
    model = load_model(path, device, AutoModelForSequenceClassification, **options)
    return PairClassifier(model, load_tokenizer(path), policy_tokenizer, raw_prompt)


def for_policy(
    reward: RewardModel,
    policy_tokenizer: PreTrainedTokenizerBase,
    raw_prompt: RawPrompt | None = None,
) -> RewardFunction:
    """The reward itself if it shares the policy's tokenizer, else one that aligns the two."""
    if same_tokenizer(reward.tokenizer, policy_tokenizer):
        return reward
    return AlignedReward(reward, policy_tokenizer, raw_prompt)


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
    policy_tokenizer: PreTrainedTokenizerBase
    raw_prompt: RawPrompt | None = None

    def score_ids(self, prompts: Ids, completions: Ids) -> Tensor:
        """Reward of completions as the policy's token ids: (B,) float32 on the CPU."""
        texts = decode_batch(self.policy_tokenizer, completions)
        return self.reward.score_ids(*self._translate(prompts, completions, texts), None)

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
        texts = decode_batch(self.policy_tokenizer, completions)
        prompt_ids, reward_ids = self._translate(request.prompts, completions, texts)
        scores = score_tokens(
            self.reward, replace(request, prompts=prompt_ids, completions=reward_ids)
        )
        if not (request.prefixes or request.attention):
            return scores
        places = self._places(completions, reward_ids, texts)  # (B, Tmax + 1)
        carried = weights = None
        if scores.prefixes is not None:
            lengths = torch.tensor([len(completion) for completion in completions])
            beyond = torch.arange(places.shape[1]) > lengths[:, None]
            carried = scores.prefixes.gather(1, places).masked_fill(beyond, 0.0)
        if scores.attention is not None:
            total = torch.nn.functional.pad(scores.attention.double().cumsum(1), (1, 0))
            weights = total.gather(1, places).diff(dim=1).float()
        return TokenScores(scores.rewards, carried, weights)

    def _translate(
        self, prompts: Ids, completions: Ids, texts: Sequence[str]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and completions as the reward's token ids."""
        tokenizer = self.reward.tokenizer
        distinct = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
        raw = _raw_prompts(distinct, self.policy_tokenizer, self.raw_prompt)
        settings = DEFAULT_SETTINGS if self.raw_prompt is None else self.reward.settings
        ids = dict(zip(distinct, encode_prompts(raw, tokenizer, settings), strict=True))
        stopped = [_stopped(completion, self.policy_tokenizer) for completion in completions]
        end = tokenizer.eos_token_id
        if end is None and any(stopped):
            raise UserError("reward model: its tokenizer has no EOS token; expected one")
        rows = _encode(tokenizer, texts)
        reward_ids = [row + [end] * stop for row, stop in zip(rows, stopped, strict=True)]
        return [ids[tuple(prompt)] for prompt in prompts], reward_ids

    def _places(self, policy_ids: Ids, reward_ids: Ids, texts: Sequence[str]) -> Tensor:
        """Number of the reward prefix of each policy prefix, the last repeated: (B, Tmax + 1)."""
        policy, reward = self._bytes
        out = np.zeros((len(policy_ids), max(map(len, policy_ids), default=0) + 1), np.int64)
        for number, (own, read, text) in enumerate(zip(policy_ids, reward_ids, texts, strict=True)):
            stop = int(_stopped(own, self.policy_tokenizer))
            own_ends = policy.boundaries(own[: len(own) - stop], text)
            read_ends = reward.boundaries(read[: len(read) - stop], text)
            if own_ends is not None and read_ends is not None:
                out[number, : len(own_ends)] = shared_prefixes(own_ends, read_ends)
            out[number, len(own) :] = len(read)
        return torch.from_numpy(out)

    @cached_property
    def _bytes(self) -> tuple[TokenBytes, TokenBytes]:
        tables = TokenBytes(self.policy_tokenizer), TokenBytes(self.reward.tokenizer)
        for table in tables:
            if table.boundaries(_encode(table.tokenizer, [_PROBE])[0], _PROBE) is None:
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


class PairClassifier:
    """A RewardFunction of a classifier that reads prompt and completion as two texts (BERT).

    It scores whole completions only, since each of its tokens depends on later ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        raw_prompt: RawPrompt | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.policy_tokenizer = policy_tokenizer
        self.raw_prompt = raw_prompt

    def score_ids(self, prompts: Ids, completions: Ids) -> Tensor:
        """The classifier's logit for each completion: (B,) float32 on the CPU."""
        raw = _raw_prompts(prompts, self.policy_tokenizer, self.raw_prompt)
        texts = decode_batch(self.policy_tokenizer, completions)
        rows = self.tokenizer([prompt_text(prompt) for prompt in raw], texts)
        lengths = [len(ids) for ids in rows["input_ids"]]
        # Some models (RoBERTa) reserve positions; only their tokenizers know the usable length.
        context = min(context_length(self.model) or 10**12, self.tokenizer.model_max_length)
        require_context(lengths, context, self.model.config.model_type)
        scores = torch.empty(len(texts))
        with torch.inference_mode():
            for batch in batches_by_tokens(lengths, TOKENS_PER_BATCH):
                chosen = {name: [values[i] for i in batch] for name, values in rows.items()}
                inputs = self.tokenizer.pad(chosen, return_tensors="pt").to(self.model.device)
                scores[batch] = self.model(**inputs).logits[:, 0].float().cpu()
        return scores

    def prefix_scores_ids(self, prompts: Ids, completions: Ids) -> list[Tensor]:
        """Raises UserError: a prefix has no score of its own."""
        raise no_prefix_scores(self.model)


def _raw_prompts(
    prompts: Ids, tokenizer: PreTrainedTokenizerBase, raw_prompt: RawPrompt | None
) -> list[Prompt]:
    """Prompts as in the data, or else the decoded ids, which may hold no special token."""
    if raw_prompt is not None:
        return [raw_prompt(prompt) for prompt in prompts]
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    for prompt in prompts:
        inside = special.intersection(prompt[1:] if prompt[0] == tokenizer.bos_token_id else prompt)
        if inside:
            raise UserError(
                f"reward.tokenizer: a prompt holds {tokenizer.decode([min(inside)])!r}, a special "
                "token of the policy's tokenizer, which the reward's does not share; expected a "
                "template of the reward's own, or plain text"
            )
    return list(decode_batch(tokenizer, prompts))


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts without added tokens; the name of a special token is encoded as text."""
    if not texts:
        return []
    rows: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
    )["input_ids"]
    return rows


def _stopped(completion: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a completion ends with the policy's EOS."""
    return bool(completion) and completion[-1] == tokenizer.eos_token_id


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
