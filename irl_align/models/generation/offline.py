"""Sampling from a policy on disk outside a run, by any backend."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from irl_align.config.generation import GenerationOptions
from irl_align.errors import UserError
from irl_align.models.generation.protocol import Generator
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.models.generation.vllm_backend import VLLMGenerator
from irl_align.models.generation.vllm_common import EngineSettings
from irl_align.models.loading import eos_ids, folder_eos_ids, load_model, require_embeddings


def with_backend(options: GenerationOptions, backend: str | None) -> GenerationOptions:
    """The options with another backend, without what only the previous one reads; None keeps it."""
    if backend is None or backend == options.backend:
        return options
    unread = {"server", "engine"}
    return GenerationOptions.model_validate(
        {**options.model_dump(exclude=unread), "backend": backend}
    )


@contextmanager
def saved_sampler(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    backend: str,
    device: torch.device,
) -> Iterator[Generator]:
    """A generator of samples from the policy in a folder; vLLM ends with the block.

    prompts: token ids of the prompts that will be sampled. backend: that of the options, resolved.
    Raises UserError where the tokenizer has no EOS token, or the policy cannot be loaded.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, so samples never end")
    if backend == "transformers":
        model, pad = load_model(path, device), tokenizer.pad_token_id
        require_embeddings(path, model, tokenizer)
        yield TransformersGenerator(
            model,
            eos_token_ids=eos_ids(model, tokenizer),
            pad_token_id=int(tokenizer.eos_token_id if pad is None else pad),
        )
        return
    longest = max((len(prompt) for prompt in prompts), default=1) + options.max_new_tokens
    with tempfile.TemporaryDirectory(prefix="vllm-") as folder:
        settings = EngineSettings(
            device=device.type,
            dtype="float32",
            context_length=longest,
            cache_tokens=options.max_batch_tokens,
            args=options.engine,
        )
        vllm = VLLMGenerator(settings, backend, options.server, Path(folder) / "server.log")
        eos = folder_eos_ids(path, tokenizer)
        try:
            vllm.sync(path, str(path), eos, lambda: load_model(path, device))
            yield vllm
        finally:
            vllm.close()
