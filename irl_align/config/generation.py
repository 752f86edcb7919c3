"""The recipe's group ``generation``: how a policy is sampled."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from irl_align.config.types import Options

# Options of vLLM that decide what samples mean, or for which the recipe has its own option.
RESERVED_ENGINE_OPTIONS = {
    "dtype",
    "enable_lora",
    "generation_config",
    "logprobs_mode",
    "max_model_len",
    "model",
    "seed",
    "skip_tokenizer_init",
    "trust_remote_code",
    "worker_extension_cls",
}


class ServerOptions(Options):
    """The vLLM servers of backend vllm-server."""

    urls: list[str] = Field(default_factory=list)
    """URLs of running servers (irl-align vllm-serve), which must see this machine's files under the
    same paths. Empty: the run starts a server here."""
    port: Annotated[int, Field(gt=0, lt=65536)] | None = None
    """Port of the server that the run starts, on the loopback interface. Null picks a free one."""
    api_key_env: str = "VLLM_API_KEY"
    """Environment variable that holds the API key of the servers."""
    timeout: PositiveFloat = 600.0
    """Seconds to wait for one request, or for weights to load."""
    start_timeout: PositiveFloat = 600.0
    """Seconds to wait for a server to start."""
    retries: PositiveInt = 4
    """How often a failed request or server is retried, with growing pauses."""

    @model_validator(mode="after")
    def _port_needs_a_start(self) -> ServerOptions:
        if self.urls and self.port is not None:
            raise ValueError("port is for a server that the run starts, but urls are given")
        return self


class GenerationOptions(Options):
    """How a policy is sampled for pairs, Best-of-N and evaluation."""

    used_with = (
        ("backend", ("vllm-server",), ("server",)),
        ("backend", ("vllm", "vllm-server", "auto"), ("engine",)),
    )

    backend: Literal["transformers", "vllm", "vllm-server", "auto"] = "transformers"
    """What draws the samples: transformers, vllm in this process, or a vllm-server. auto is vllm
    where there is a GPU and vLLM is installed, else transformers. Each backend draws its own random
    numbers."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """vLLM's own options under its own names, e.g. {tensor_parallel_size: 2}."""
    server: ServerOptions = ServerOptions()
    """The vLLM servers."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature of the negatives. 0 is greedy and logs a warning."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling for the negatives. 1 turns it off."""
    top_k: NonNegativeInt = 0
    """Top-k sampling for the negatives. 0 turns it off."""
    max_new_tokens: PositiveInt = 128
    """Longest sample, in tokens, its end included. Longer demonstrations make no pairs with
    samples."""
    samples_per_prompt: PositiveInt = 1
    """Policy samples per prompt for the pairs."""
    max_batch_tokens: PositiveInt = 16384
    """Largest number of cache positions in one batch: prompts and samples of all rows."""

    @model_validator(mode="after")
    def _engine_is_open(self) -> GenerationOptions:
        if self.engine and self.server.urls:
            raise ValueError("engine is for a vLLM that the run starts, but server.urls are given")
        reserved = sorted(set(self.engine) & RESERVED_ENGINE_OPTIONS)
        if reserved:
            raise ValueError(f"engine.{reserved[0]} is set by irl-align: leave it out")
        return self
