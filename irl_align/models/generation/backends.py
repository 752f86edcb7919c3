"""Which backend samples a run's policies, and sampling from a policy that is being trained."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from irl_align.config.generation import GenerationOptions
from irl_align.config.schema import Recipe
from irl_align.models.generation.protocol import Completion, Sampling
from irl_align.models.generation.vllm_backend import VLLMGenerator
from irl_align.models.generation.vllm_common import (
    EngineSettings,
    require_vllm,
    vllm_importable,
)
from irl_align.models.lora import has_adapter, save_adapter

MEMORY = Path("/dev/shm")  # a file system in memory, on Linux


def sampling_of(options: GenerationOptions, backend: str, n: int, temperature: float) -> Sampling:
    """The options' sampling with this n and temperature; the caller sets the seed."""
    return Sampling(
        n=n,
        temperature=temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_new_tokens=options.max_new_tokens,
        backend=backend,
        engine=json.dumps(options.engine, sort_keys=True),
    )


def resolve_backend(options: GenerationOptions, device: torch.device) -> str:
    """transformers, vllm or vllm-server; auto is vllm where there are a GPU and vLLM.

    Raises UserError where the options need vLLM and it is not installed, before any work is done.
    """
    name: str = options.backend
    if name == "auto":
        name = "vllm" if device.type == "cuda" and vllm_importable() else "transformers"
    if name == "vllm" or (name == "vllm-server" and not options.server.urls):
        require_vllm(device.type, whole=False)
    return name


def vllm_for(recipe: Recipe, backend: str, device: torch.device, log: Path) -> VLLMGenerator:
    """vLLM for a recipe's policies, not started yet.

    backend: vllm or vllm-server. log: file for the output of a server that is started.
    """
    model, options = recipe.model, recipe.generation
    settings = EngineSettings(
        device=device.type,
        dtype=model.dtype,
        context_length=recipe.data.max_prompt_tokens + options.max_new_tokens,
        cache_tokens=options.max_batch_tokens,
        trust_remote_code=model.trust_remote_code,
        lora_rank=0 if model.lora is None else model.lora.r,
        args=options.engine,
    )
    return VLLMGenerator(settings, backend, options.server, log)


def bits(model: torch.nn.Module) -> list[int]:
    """A hash of each weight's bits: torch's version counters miss what fused optimisers change."""
    hashes = [torch.hash_tensor(weight.detach()) for weight in model.parameters()]
    return [int(one) for one in torch.stack(hashes).view(torch.int64).tolist()]


class LiveGenerator:
    """Samples from a model that is being trained: vLLM gets its weights whenever they changed.

    Args:
        vllm: the run's vLLM.
        model: the policy; from a policy with a LoRA adapter, vLLM gets only the adapter.
        eos_token_ids: any of these ends a completion; the first is the end of text.
        shared: folder for the weights that the servers see too; None for a folder in memory.
    """

    def __init__(
        self,
        vllm: VLLMGenerator,
        model: PreTrainedModel,
        eos_token_ids: Sequence[int],
        shared: Path | None = None,
    ) -> None:
        self.vllm = vllm
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
        if self.vllm.key != key:
            shutil.rmtree(folder, ignore_errors=True)
            if has_adapter(self.model):
                save_adapter(self.model, folder)
            else:
                self.model.save_pretrained(folder)
        self.vllm.sync(folder, key, self.eos_token_ids, lambda: self.model)
        try:
            yield from self.vllm.stream(prompts, sampling)
        finally:
            self.vllm.rest()  # the training that follows needs the memory
