"""vLLM in this process: one engine per run, whose weights are replaced in place.

An engine that starts seeds random numbers, freezes torch's threads and edits the environment. All
of that is restored, so that a learner in the same process trains as if vLLM were not there.
Architectures that vLLM runs through transformers' own classes need a server (see
``vllm_common.has_own_implementation``).
"""

from __future__ import annotations

import logging
import os
import random
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from irl_align.errors import UserError
from irl_align.models.generation.vllm_common import (
    EngineSettings,
    PolicyFolder,
    RawSample,
    Request,
    engine_args,
    import_architecture,
    require_vllm,
)
from irl_align.models.generation.vllm_worker import remember_shape, shape_of

logger = logging.getLogger(__name__)
IN_FLIGHT = 512  # samples in vLLM's scheduler at a time, so that memory does not grow with N
# Environment variables that a trainer, or a process that it starts, reads.
LEARNER_VARIABLES = ("LD_", "LOCAL_", "MASTER_", "MKL_", "OMP_", "RANK", "WORLD_SIZE")


class VLLMEngine:
    """An engine (``vllm_common.Engine``) in this process, which can have one at a time."""

    _running: ClassVar[weakref.ref[VLLMEngine] | None] = None

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.starts = 0
        self.llm: Any = None
        self._shape: Any = None
        self._rank = 0  # of the largest adapter that it takes
        self._weights: Any = None
        self._adapter: Any = None
        self._adapters = 0
        self._resting = False

    def load(self, policy: PolicyFolder, key: str) -> None:
        """Sample from these weights from now on; starts the engine when none of this shape runs.

        Raises UserError where vLLM does not start on the model or cannot load it.
        """
        shape, weights = shape_of(policy.model), policy.weights
        if self.llm is not None and (shape != self._shape or policy.rank > self._rank):
            self.close()
        if self.llm is None:
            self._start(policy)
            self._shape, self._rank = shape, max(self.settings.lora_rank, policy.rank)
        else:
            self._wake()
            if weights != self._weights:
                self._reload(policy.model)
        self._weights = weights
        self._adapter = self._lora_request(policy, key)
        self.llm.reset_prefix_cache()

    def _start(self, policy: PolicyFolder) -> None:
        if (other := VLLMEngine._running) is not None and other() is not None:
            raise RuntimeError("this process has an engine already, and vLLM allows one: close it")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "generation.backend: vllm in a training of several processes; expected vllm-server"
            )
        with learner_untouched():
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
            os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # no reports to vLLM's developers
            require_vllm(self.settings.device)
            from vllm import LLM

            args = {"disable_log_stats": True, **engine_args(self.settings, policy)}
            import_architecture(policy.model)
            remember_shape(policy.model)
            try:
                self.llm = LLM(**args)
            except (RuntimeError, ValueError, OSError, TypeError) as error:
                cause = " ".join(str(error).split())[:300]
                raise UserError(f"{policy.model}: vLLM does not start on it: {cause}") from error
        self.starts += 1
        VLLMEngine._running = weakref.ref(self)

    def _reload(self, model: Path) -> None:
        [result] = self.llm.collective_rpc("load_policy", kwargs={"path": str(model)})
        if "error" in result:
            raise UserError(f"{model}: vLLM cannot load it: {result['error']}")

    def _lora_request(self, policy: PolicyFolder, key: str) -> Any:
        if policy.adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        self._adapters += 1  # a new number for each, otherwise vLLM continues with the loaded one
        return LoRARequest(key, self._adapters, str(policy.adapter))

    def run(self, requests: Iterator[Request]) -> Iterator[tuple[Request, list[RawSample]]]:
        """Answer requests in the order in which they are done."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._wake()
        engine = self.llm.llm_engine
        # Entries of an earlier call in the cache would change the batches, and so the rounding.
        self.llm.reset_prefix_cache()
        waiting: dict[str, Request] = {}
        upcoming = next(requests, None)
        samples = 0
        try:
            while waiting or upcoming is not None:
                while upcoming is not None and (not waiting or samples < IN_FLIGHT):
                    name = f"{upcoming.index}/{upcoming.first}"
                    params = SamplingParams(**upcoming.params, flat_logprobs=True)
                    params.output_kind = RequestOutputKind.FINAL_ONLY
                    prompt = {"prompt_token_ids": upcoming.prompt}
                    engine.add_request(name, prompt, params, lora_request=self._adapter)
                    waiting[name] = upcoming
                    samples += params.n
                    upcoming = next(requests, None)
                with self._stepping():
                    outputs = engine.step()
                for output in outputs:
                    if output.finished:
                        request = waiting.pop(output.request_id)
                        samples -= request.params["n"]
                        yield request, _samples(output)
        finally:
            if waiting:  # the consumer stopped early, or an error
                engine.abort_request(list(waiting))

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """One step of vLLM, which also draws from torch's global numbers and ignores the draw."""
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng())
            if self.settings.device == "cpu":
                # On a CPU compiling two small functions of vLLM's sampler takes longer (9 to 15 s)
                # than it saves.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def rest(self) -> None:
        """Give the GPU's memory back until it is needed; on a CPU vLLM has no such mode."""
        if self.llm is not None and self.settings.device == "cuda" and not self._resting:
            self.llm.sleep(level=1)
            self._resting = True

    def _wake(self) -> None:
        if self._resting:
            self.llm.wake_up()
            self._resting = False

    def close(self) -> None:
        """End the engine and free its memory; the next ``load`` starts a new one."""
        if self.llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        VLLMEngine._running = None
        self.llm.llm_engine.engine_core.shutdown()
        self.llm = self._weights = self._adapter = None
        self._resting = False
        with learner_untouched():
            cleanup_dist_env_and_memory()


def _samples(output: Any) -> list[RawSample]:
    samples = sorted(output.outputs, key=lambda sample: sample.index)
    for sample in samples:
        if sample.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a request with {sample.finish_reason}")
    return [(list(sample.token_ids), sample.logprobs.logprobs) for sample in samples]


@contextmanager
def learner_untouched() -> Iterator[None]:
    """Restore what vLLM changes in its process: random numbers, threads, LEARNER_VARIABLES."""
    numbers = random.getstate(), np.random.get_state()
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    environment = dict(os.environ)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        for name in set(os.environ) | set(environment):
            if name.startswith(LEARNER_VARIABLES):
                if name in environment:
                    os.environ[name] = environment[name]
                else:
                    del os.environ[name]
