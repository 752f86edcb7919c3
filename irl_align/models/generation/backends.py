"""Which backend samples a run's policies, and vLLM kept at the policy that is asked for."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedModel

from irl_align.config.generation import GenerationOptions
from irl_align.config.schema import Recipe
from irl_align.errors import UserError
from irl_align.models.generation.protocol import Completion, Sampling
from irl_align.models.generation.transformers_backend import evaluating
from irl_align.models.generation.vllm_backend import VLLMGenerator
from irl_align.models.generation.vllm_common import (
    Engine,
    EngineSettings,
    PolicyFolder,
    has_own_implementation,
    require_vllm,
    vllm_importable,
)
from irl_align.models.generation.vllm_engine import VLLMEngine
from irl_align.models.generation.vllm_server import ServerEngine, ServerSettings
from irl_align.models.lm_head import completion_logprobs
from irl_align.models.lora import has_adapter, save_adapter

MEMORY = Path("/dev/shm")  # a file system in memory, on Linux


@dataclass(frozen=True)
class BackendSampling(Sampling):
    """Sampling by another backend than transformers, which draws other random numbers.

    The backend is among the settings, and so in the keys of all stages that depend on samples.

    Attributes:
        backend: vllm or vllm-server.
        engine: vLLM's own options, as JSON.
    """

    backend: str = "vllm"
    engine: str = "{}"


def sampling_of(options: GenerationOptions, backend: str, n: int, temperature: float) -> Sampling:
    """The options' sampling with this n and temperature; the seed is left to the caller."""
    settings: dict[str, Any] = {
        "n": n,
        "temperature": temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "max_new_tokens": options.max_new_tokens,
    }
    if backend == "transformers":
        return Sampling(**settings)
    engine = json.dumps(options.engine, sort_keys=True)
    return BackendSampling(**settings, backend=backend, engine=engine)


def resolve_backend(options: GenerationOptions, device: torch.device) -> str:
    """transformers, vllm or vllm-server; auto is vllm where there is a GPU and vLLM is there.

    Raises UserError where vLLM is asked for and not there, before any work is done.
    """
    name: str = options.backend
    if name == "auto":
        name = "vllm" if device.type == "cuda" and vllm_importable() else "transformers"
    if name == "vllm" or (name == "vllm-server" and not options.server.urls):
        require_vllm(device.type, whole=False)
    return name


@dataclass(frozen=True)
class VLLMSettings:
    """What vLLM is started for.

    Attributes:
        generation: its own options, the servers, and the size of its cache.
        longest: most tokens of prompt and completion together, where the model has room for them.
        dtype: of weights and arithmetic.
        trust_remote_code: run code that comes with a model.
        lora_rank: of the adapters that policies come as; 0 where they come whole.
    """

    generation: GenerationOptions
    longest: int
    dtype: str = "float32"
    trust_remote_code: bool = False
    lora_rank: int = 0

    @staticmethod
    def of(recipe: Recipe) -> VLLMSettings:
        """Those of a recipe."""
        model, options = recipe.model, recipe.generation
        return VLLMSettings(
            options,
            recipe.data.max_prompt_tokens + options.max_new_tokens,
            model.dtype,
            model.trust_remote_code,
            0 if model.lora is None else model.lora.r,
        )


class VLLMSampler:
    """A run's one vLLM: started when first needed, synced when the policy has changed.

    Args:
        settings: what it is started for.
        backend: vllm or vllm-server.
        device: of the learner; vLLM is on the same kind.
        log: file for the output of a server that is started.
    """

    def __init__(
        self, settings: VLLMSettings, backend: str, device: torch.device, log: Path
    ) -> None:
        self.settings = settings
        self.backend = backend
        self.device = device
        self.log = log
        self.generator: VLLMGenerator | None = None

    def synced(
        self,
        path: Path,
        key: str,
        eos_token_ids: Collection[int],
        load: Callable[[], PreTrainedModel],
    ) -> VLLMGenerator:
        """vLLM with the policy in a folder, whose key names its weights.

        ``load`` gives the learner's model of it; it is called where weights have changed alone.
        """
        model = PolicyFolder.read(path).model
        config = AutoConfig.from_pretrained(
            model, trust_remote_code=self.settings.trust_remote_code
        ).get_text_config()
        if self.generator is None:
            self.generator = self._start(model, getattr(config, "max_position_embeddings", None))

        def logprobs(
            prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
        ) -> list[np.ndarray]:
            learner = load()
            with evaluating(learner):
                return completion_logprobs(learner, prompts, completions)

        self.generator.sync(path, key, eos_token_ids, config.vocab_size, logprobs)
        return self.generator

    def _start(self, model: Path, positions: int | None) -> VLLMGenerator:
        asked = self.settings
        context = min(asked.longest, positions or asked.longest)
        settings = EngineSettings(
            device=self.device.type,
            dtype=asked.dtype,
            context_length=context,
            cache_tokens=asked.generation.max_batch_tokens,
            trust_remote_code=asked.trust_remote_code,
            lora_rank=asked.lora_rank,
            args=asked.generation.engine,
        )
        engine: Engine
        if self.backend == "vllm" and has_own_implementation(model):
            engine = VLLMEngine(settings)
        else:
            engine = ServerEngine(settings, self._servers())
        return VLLMGenerator(engine, asked.dtype, context)

    def _servers(self) -> ServerSettings:
        options = self.settings.generation.server
        api_key = os.environ.get(options.api_key_env, "")
        if options.urls and not api_key and options.api_key_env != "VLLM_API_KEY":
            raise UserError(
                f"generation.server.api_key_env: {options.api_key_env} is not in the environment; "
                "expected the servers' API key there"
            )
        return ServerSettings(
            urls=tuple(options.urls),
            api_key=api_key,
            timeout=options.timeout,
            start_timeout=options.start_timeout,
            retries=options.retries,
            log=self.log,
            port=options.port,
        )

    def rest(self) -> None:
        """Give accelerator memory back until the next sampling."""
        if self.generator is not None:
            self.generator.rest()

    def close(self) -> None:
        """End vLLM."""
        if self.generator is not None:
            self.generator.close()


def bits(model: torch.nn.Module) -> list[int]:
    """A hash of the bits of each weight: torch does not count what a fused optimiser changes."""
    hashes = [torch.hash_tensor(weight.detach()) for weight in model.parameters()]
    return [int(one) for one in torch.stack(hashes).view(torch.int64).tolist()]


class LiveGenerator:
    """Samples from a model that is being trained: its weights go to vLLM whenever they changed.

    Args:
        sampler: the run's vLLM.
        model: the policy; of one with a LoRA adapter that alone goes to vLLM.
        eos_token_ids: any of these ends a completion.
        shared: folder that the servers see too, for the weights; None for one in memory.
    """

    def __init__(
        self,
        sampler: VLLMSampler,
        model: PreTrainedModel,
        eos_token_ids: Collection[int],
        shared: Path | None = None,
    ) -> None:
        self.sampler = sampler
        self.model = model
        self.eos_token_ids = eos_token_ids
        memory = MEMORY if MEMORY.is_dir() else None
        self.folder = tempfile.TemporaryDirectory(prefix="live-policy-", dir=shared or memory)
        self.saves = 0
        self._seen: list[int] = []

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (prompt index, its N completions by sample index), in order of completion."""
        if (seen := bits(self.model)) != self._seen:
            self._seen = seen
            self.saves += 1
        folder = Path(self.folder.name) / "policy"
        key = f"{folder}-{self.saves}"
        generator = self.sampler.generator
        if generator is None or generator.key != key:
            shutil.rmtree(folder, ignore_errors=True)
            if has_adapter(self.model):
                save_adapter(self.model, folder)
            else:
                self.model.save_pretrained(folder)
        synced = self.sampler.synced(folder, key, self.eos_token_ids, lambda: self.model)
        try:
            yield from synced.stream(prompts, sampling)
        finally:
            self.sampler.rest()  # the training that follows needs the memory
