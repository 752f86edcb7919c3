"""What every generator of samples takes and returns: ``Sampling``, ``Completion``, ``Generator``.

Dimensions: B rows in a batch, N samples per prompt, P prompt tokens, T completion tokens,
V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from irl_align.errors import UserError

LOWEST_TEMPERATURE = 0.01  # below it logits / temperature may overflow; 0 means greedy


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes:
        n: samples per prompt. Greedy samples of one prompt are all the same.
        temperature: 0 for greedy, else at least 0.01.
        top_p: keep the smallest set of most likely tokens with this probability; 1 keeps all.
        top_k: keep this many most likely tokens; 0 keeps all. Applied before ``top_p``.
        max_new_tokens: most tokens in a completion, the end of text included.
        backend: transformers, vllm or vllm-server, which draw different random numbers.
        engine: vLLM's own options, as JSON.
        seed: decides every random number, together with the prompt's ids and the sample's index.

    Raises:
        UserError: a value is out of its range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 64
    backend: str = "transformers"
    engine: str = "{}"
    seed: int = 0

    def __post_init__(self) -> None:
        temperature = self.temperature
        in_range = temperature == 0 or LOWEST_TEMPERATURE <= temperature < math.inf
        _require(self.n >= 1, "n", self.n, "at least 1")
        _require(in_range, "temperature", temperature, f"0 (greedy) or >= {LOWEST_TEMPERATURE}")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from the model's own distribution, as it is."""
        return self.temperature == 1 and self.top_p == 1 and self.top_k == 0

    @property
    def all_tokens(self) -> Sampling:
        """The same without top-p and top-k: every token can be drawn."""
        return replace(self, top_p=1.0, top_k=0)

    @property
    def greedy(self) -> bool:
        """Whether each token is the most likely one."""
        return self.temperature == 0


def _require(holds: bool, field: str, value: object, expected: str) -> None:
    if not holds:
        raise UserError(f"sampling.{field}: found {value}, expected {expected}")


@dataclass(frozen=True)
class Completion:
    """One completion, as the policy sampled it.

    Attributes:
        token_ids: T ids, as rewards and pairs read them. The last one is the end of text if and
            only if the policy stopped there, by whichever stop id.
        logprobs: (T,) float32, natural log-probabilities of ``sampled_ids`` under the distribution
            that was sampled from, after temperature, top-k and top-p; for greedy sampling, under
            the model's own distribution at temperature 1.
        truncated: whether the limit on new tokens, or the model's context, came before a stop id. A
            truncated completion has no end of text, and none may be appended: the policy did not
            sample it.
        stop: the stop id that the policy sampled, if ``token_ids`` has the end of text in its
            place; else None.
    """

    token_ids: list[int]
    logprobs: np.ndarray
    truncated: bool
    stop: int | None = None

    @property
    def sampled_ids(self) -> list[int]:
        """T ids, as the policy sampled them: its log-probs, ratios and KL are those of these ids.

        To a reward all stop ids are one event, the end of the text. They are different actions of
        the policy, which ``token_ids`` alone would give the log-prob of an action it did not take.
        """
        return self.token_ids if self.stop is None else [*self.token_ids[:-1], self.stop]


def completed(token_ids: list[int], logprobs: np.ndarray, eos: Sequence[int]) -> Completion:
    """The completion of T sampled ids with their log-probs (T,).

    eos: ids that end a completion, the end of text first; it replaces the others.
    """
    last = token_ids[-1]
    if last not in eos or last == eos[0]:
        return Completion(token_ids, logprobs, truncated=last not in eos)
    return Completion([*token_ids[:-1], int(eos[0])], logprobs, truncated=False, stop=last)


def check_prompts(
    prompts: Sequence[Sequence[int]], vocab_size: int, context_length: int | None
) -> list[np.ndarray]:
    """Prompts as arrays (P,) int64; each must leave room in the context for one token.

    Raises:
        UserError: one is empty, has ids outside the vocabulary, or leaves no room.
    """
    arrays = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
    for index, ids in enumerate(arrays):
        if not len(ids):
            raise UserError(f"prompt {index}: found no tokens, expected at least one")
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise UserError(
                f"prompt {index}: found token ids {ids.min()} to {ids.max()}, "
                f"expected 0 to {vocab_size - 1}, the model's vocabulary"
            )
        if context_length is not None and len(ids) >= context_length:
            raise UserError(
                f"prompt {index}: found {len(ids)} tokens, expected at most "
                f"{context_length - 1}: the context of {context_length} tokens "
                "must hold the prompt and at least one new token"
            )
    return arrays


class Generator(Protocol):
    """Anything that samples completions for prompts."""

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (prompt index, its N completions by sample index), in order of completion."""
        ...


def generate(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    progress: bool = False,
) -> list[list[Completion]]:
    """Sample ``sampling.n`` completions for each prompt; returns them in the prompts' order.

    Args:
        generator: the backend.
        prompts: token ids, one sequence per prompt.
        sampling: how to sample.
        progress: show a bar with samples/s, tokens/s and the time left.

    Returns:
        One list per prompt, of N completions by sample index.
    """
    collected = dict(stream(generator, prompts, sampling, progress))
    return [collected[index] for index in range(len(prompts))]


def stream(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    progress: bool = False,
) -> Iterator[tuple[int, list[Completion]]]:
    """The generator's stream, with a progress bar as in :func:`generate`."""
    from tqdm.auto import tqdm

    tokens = 0
    total = len(prompts) * sampling.n
    with tqdm(total=total, unit="samples", desc="sampling", disable=not progress) as bar:
        for index, completions in generator.stream(prompts, sampling):
            tokens += sum(len(completion.token_ids) for completion in completions)
            if progress:
                rate = tokens / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
                bar.update(len(completions))
            yield index, completions


def sample_uniforms(seed: int, prompt: np.ndarray, sample: int, count: int) -> np.ndarray:
    """The random numbers of one sample: the t-th number draws its t-th token.

    They depend only on the arguments, so the other prompts, their order, the batch and the number
    of samples do not change them, and a larger ``count`` only appends numbers. A prompt that is
    listed twice gets the same samples twice: increase n instead.

    Args:
        seed: any integer.
        prompt: (P,) int64 token ids.
        sample: the sample's index, 0 to N-1.
        count: number of random numbers.

    Returns:
        (count,) float64 in [0, 1).
    """
    name = hashlib.blake2b(f"{seed}/{sample}/".encode(), digest_size=16)
    name.update(prompt.tobytes())
    key = int.from_bytes(name.digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).random(count)
