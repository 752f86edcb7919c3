"""vLLM as a generator that samples the current policy.

Weights are given to the engine when the policy's key has changed, and never else. After that the
engine's log-probabilities are compared with the learner's on a short batch: an engine that kept
old weights, or part of them, samples on without a word, and a policy would be trained on it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from irl_align.errors import UserError
from irl_align.models.generation.protocol import Completion, Sampling, check_prompts
from irl_align.models.generation.vllm_common import Engine, PolicyFolder, completion, requests

logger = logging.getLogger(__name__)
# Largest gap of a log-prob: of arithmetic in the same precision, in another order.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5, "float16": 0.1}
PROBE_LENGTHS = (2, 7, 19, 33)  # tokens of the prompts that are compared
PROBE_TOKENS = 12  # sampled for each

LearnerLogprobs = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Sequence[np.ndarray]]
"""Prompts and completions, as ids, to the log-probs (T,) of each at temperature 1."""


class VLLMGenerator:
    """Samples from the policy that it was last synced to.

    Samples are a function of the weights, the prompt's ids, ``Sampling`` and rounding, as those of
    the transformers backend are, but drawn with other random numbers.

    Args:
        engine: vLLM, in this process or as servers.
        dtype: of the engine's weights; decides how far its log-probs may be from the learner's.
        context_length: most tokens of prompt and completion together.
    """

    def __init__(self, engine: Engine, dtype: str, context_length: int) -> None:
        self.engine = engine
        self.tolerance = TOLERANCE[dtype]
        self.context_length = context_length
        self.key: str | None = None
        self.gap: float | None = None
        """Largest gap of a log-prob in the comparison after the last sync."""
        self.seconds: list[float] = []
        """Of every sync, its comparison included; the first one starts the engine."""
        self._eos: frozenset[int] = frozenset()
        self._vocab_size = 0

    def sync(
        self,
        path: Path,
        key: str,
        eos_token_ids: Collection[int],
        vocab_size: int,
        logprobs: LearnerLogprobs,
    ) -> None:
        """Sample from the policy in a folder from now on; nothing happens if its key is the last.

        Args:
            path: a model in transformers' format, or a LoRA adapter.
            key: names the weights: other weights, another key.
            eos_token_ids: any of these ends a completion.
            vocab_size: V of the model.
            logprobs: the learner's log-probs, to compare with.

        Raises:
            UserError: vLLM cannot load the policy, or its log-probs are not the learner's and a
                new engine does not mend that.
        """
        self._eos, self._vocab_size = frozenset(eos_token_ids), vocab_size
        if key == self.key:
            return
        self.key = None
        begin = time.perf_counter()
        policy = PolicyFolder.read(path)
        self.engine.load(policy, key)
        self.gap = self._compare(logprobs)
        if not self.gap <= self.tolerance:
            logger.warning(
                "vLLM's log-probs are off by %.2g after new weights: starting it anew", self.gap
            )
            self.engine.restart()
            self.engine.load(policy, key)
            self.gap = self._compare(logprobs)
            if not self.gap <= self.tolerance:
                raise UserError(
                    f"{path}: vLLM's log-probs differ from transformers' by {self.gap:.2g}, "
                    f"expected at most {self.tolerance:g}; set generation.backend to transformers"
                )
        self.key = key
        self.seconds.append(time.perf_counter() - begin)

    @property
    def syncs(self) -> int:
        """How often the engine was given weights."""
        return len(self.seconds)

    def _compare(self, logprobs: LearnerLogprobs) -> float:
        """Largest gap between the engine's and the learner's log-prob of a sampled token."""
        rng = np.random.default_rng(0)
        longest = self.context_length - 1
        prompts = [rng.integers(0, self._vocab_size, size=min(n, longest)) for n in PROBE_LENGTHS]
        probe = requests(prompts, Sampling(max_new_tokens=PROBE_TOKENS), eos=())
        found = [(r.prompt, completion(r, s, ())) for r, [s] in self.engine.run(probe)]
        learner = logprobs([p for p, _ in found], [c.token_ids for _, c in found])
        gaps = [np.abs(c.logprobs - own).max() for (_, c), own in zip(found, learner, strict=True)]
        return float(np.max(gaps))

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (prompt index, its N completions by sample index), in order of completion.

        Raises:
            UserError: as :meth:`TransformersGenerator.stream` does; or no server is left.
        """
        arrays = check_prompts(prompts, self._vocab_size, self.context_length)
        partial: dict[int, dict[int, list[Completion]]] = {}
        missing: dict[int, int] = {}
        # Greedy samples of a prompt are all the same, and vLLM gives one of them.
        asked = replace(sampling, n=1) if sampling.greedy else sampling
        for request, samples in self.engine.run(requests(arrays, asked, self._eos)):
            index = request.index
            done = [completion(request, sample, self._eos) for sample in samples]
            partial.setdefault(index, {})[request.first] = done
            missing[index] = missing.get(index, asked.n) - len(done)
            if missing[index] == 0:
                del missing[index]
                parts = partial.pop(index)
                drawn = [sample for first in sorted(parts) for sample in parts[first]]
                yield index, drawn * (sampling.n // asked.n)

    def rest(self) -> None:
        """Give accelerator memory back until it is needed."""
        self.engine.rest()

    def close(self) -> None:
        """End what the engine started."""
        self.engine.close()
        self.key = None
