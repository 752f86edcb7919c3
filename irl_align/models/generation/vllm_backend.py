"""vLLM as a generator of samples from the current policy.

The engine gets weights only when the policy's key has changed. After that, its log-probs are
compared with the learner's on a short batch: an engine that still had old weights, or some of them,
would sample without an error, and a policy would be trained on its samples.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from irl_align.config.generation import ServerOptions
from irl_align.errors import UserError
from irl_align.models.generation.protocol import Completion, Sampling, check_prompts
from irl_align.models.generation.vllm_common import (
    Engine,
    EngineSettings,
    PolicyFolder,
    completion,
    has_own_implementation,
    requests,
)
from irl_align.models.generation.vllm_engine import VLLMEngine
from irl_align.models.generation.vllm_server import ServerEngine
from irl_align.models.lm_head import completion_logprobs
from irl_align.models.loading import evaluating

logger = logging.getLogger(__name__)
# Largest difference of a log-prob between two computations in the same precision.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5, "float16": 0.1}
PROBE_LENGTHS = (2, 7, 19, 33)  # tokens of the prompts that are compared
PROBE_TOKENS = 12  # sampled for each of them


class VLLMGenerator:
    """Samples from the policy that it was last synced to; the first sync starts vLLM.

    Samples are a function of the weights, the prompt's ids, ``Sampling`` and rounding, as with the
    transformers backend, but vLLM draws other random numbers.

    Args:
        settings: how vLLM is started; the model's own limit may lower ``context_length``.
        backend: vllm or vllm-server. Models that vLLM runs through transformers' classes need a
            server in either case.
        server: which servers, and how patiently.
        log: file for the output of a server that is started here.
    """

    def __init__(
        self, settings: EngineSettings, backend: str, server: ServerOptions, log: Path
    ) -> None:
        self.settings = settings
        self.backend = backend
        self.server = server
        self.log = log
        self.engine: Engine | None = None
        self.key: str | None = None
        """Key of the policy that samples come from; None before the first sync."""
        self.sync_seconds: list[float] = []
        """Duration of every sync, its comparison included; the first one starts vLLM."""
        self._eos: list[int] = []
        self._vocab_size = 0

    def sync(
        self,
        path: Path,
        key: str,
        eos_token_ids: Sequence[int],
        load: Callable[[], PreTrainedModel],
    ) -> None:
        """Sample from the policy in a folder; does nothing if the key is that of the last sync.

        Args:
            path: a model in transformers' format, or a LoRA adapter.
            key: names the weights: other weights, another key.
            eos_token_ids: any of these ends a completion; the first is the end of text.
            load: returns the learner's model of this policy, whose log-probs are compared.

        Raises:
            UserError: vLLM cannot load the policy, or its log-probs differ from the learner's and
                do not agree after a restart of vLLM either.
        """
        self._eos = list(eos_token_ids)
        if key == self.key:
            return
        self.key = None
        begin = time.perf_counter()
        policy = PolicyFolder.read(path)
        config = AutoConfig.from_pretrained(
            policy.model, trust_remote_code=self.settings.trust_remote_code
        ).get_text_config()
        self._vocab_size = config.vocab_size
        engine = self.engine or self._make_engine(policy.model, config)
        engine.load(policy, key)
        gap = self.compare(load)
        tolerance = TOLERANCE[self.settings.dtype]
        if not gap <= tolerance:
            logger.warning("vLLM's log-probs differ by %.2g after new weights: restarting it", gap)
            engine.close()
            engine.load(policy, key)
            gap = self.compare(load)
            if not gap <= tolerance:
                raise UserError(
                    f"{path}: vLLM's log-probs differ from transformers' by {gap:.2g}, "
                    f"expected at most {tolerance:g}; set generation.backend to transformers"
                )
        self.key = key
        self.sync_seconds.append(time.perf_counter() - begin)

    def _make_engine(self, model: Path, config: PreTrainedConfig) -> Engine:
        """The engine for a model's architecture, within the model's context."""
        positions = getattr(config, "max_position_embeddings", None)
        longest = self.settings.context_length
        self.settings = replace(self.settings, context_length=min(longest, positions or longest))
        if self.backend == "vllm" and has_own_implementation(model):
            self.engine = VLLMEngine(self.settings)
        else:
            self.engine = ServerEngine(self.settings, self.server, self.log)
        return self.engine

    def compare(self, load: Callable[[], PreTrainedModel]) -> float:
        """Largest difference between vLLM's and the learner's log-prob of a sampled token.

        load: returns the learner's model.
        """
        assert self.engine is not None
        rng = np.random.default_rng(0)
        longest = self.settings.context_length - 1
        prompts = [rng.integers(0, self._vocab_size, size=min(n, longest)) for n in PROBE_LENGTHS]
        probe = requests(prompts, Sampling(max_new_tokens=PROBE_TOKENS), eos=())
        samples = [(r.prompt, completion(r, s, ())) for r, [s] in self.engine.run(probe)]
        learner = load()
        with evaluating(learner):
            logprobs = completion_logprobs(
                learner, [prompt for prompt, _ in samples], [c.token_ids for _, c in samples]
            )
        gaps = [
            np.abs(sample.logprobs - own).max()
            for (_, sample), own in zip(samples, logprobs, strict=True)
        ]
        return float(np.max(gaps))

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (prompt index, its N completions by sample index), in order of completion.

        Raises:
            UserError: as :meth:`TransformersGenerator.stream` does; or no server is left.
        """
        assert self.engine is not None
        arrays = check_prompts(prompts, self._vocab_size, self.settings.context_length)
        partial: dict[int, dict[int, list[Completion]]] = {}
        missing: dict[int, int] = {}
        # Greedy samples of a prompt are all the same, so vLLM computes one of them.
        distinct = replace(sampling, n=1) if sampling.greedy else sampling
        for request, samples in self.engine.run(requests(arrays, distinct, self._eos)):
            index = request.index
            done = [completion(request, sample, self._eos) for sample in samples]
            partial.setdefault(index, {})[request.first] = done
            missing[index] = missing.get(index, distinct.n) - len(done)
            if missing[index] == 0:
                del missing[index]
                parts = partial.pop(index)
                drawn = [sample for first in sorted(parts) for sample in parts[first]]
                yield index, drawn * (sampling.n // distinct.n)

    def rest(self) -> None:
        """Give accelerator memory back until vLLM is needed again."""
        if self.engine is not None:
            self.engine.rest()

    def close(self) -> None:
        """End what was started."""
        if self.engine is not None:
            self.engine.close()
        self.key = None
