"""Language models on disk and in memory: loading with plain errors, and their log-probabilities.

Legend of shapes: B rows, P prompt tokens, T completion tokens, L = P + T, V vocabulary, H width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from irl_align.config.model import LoraOptions, ScratchOptions
from irl_align.errors import UserError
from irl_align.models import lora
from irl_align.models.logprobs import chosen_logprobs
from irl_align.models.packing import (
    TOKENS_PER_BATCH,
    PackedRows,
    hidden_states,
    model_inputs,
    over_packed,
)
from irl_align.utils.files import read_json

LOGITS_AT_ONCE = 2**26  # 256 MiB in float32: vocabularies of 150,000 would fill a GPU otherwise
# Heads that transform the logits after the output matrix: these need the model's own forward.
_LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "output_multiplier",
)


def pick_device(name: str) -> torch.device:
    """Device of a recipe's `device` option; auto is CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("recipe: device: cuda, but torch sees no CUDA device; use cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    loader: Any = AutoModelForCausalLM,
    fresh: Sequence[str] = (),
    merge: bool = True,
    base: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a model folder or Hub id with `loader`, safetensors only, in eval mode.

    fresh: weights that may be missing, to start at random. merge: the adapter of a folder that
    holds one goes into the weights of its base, where those are float32; else it stays apart.
    base: the adapter's, in place of the one that it names.
    Raises UserError when the folder is missing, half written, or no such model, or when other
    weights are missing.
    """
    if lora.is_adapter(path):
        base = base or lora.base_of(path)
        return _load_adapted(Path(path), base, device, loader, fresh, merge, options)
    options.setdefault("dtype", torch.float32)
    options.setdefault("trust_remote_code", False)  # left out, transformers would ask
    quantized = options.get("quantization_config") is not None
    if quantized:
        lora.require_bitsandbytes(f"{path}: a model in 4 bits")
        options["device_map"] = {"": device}
    try:
        model, report = loader.from_pretrained(
            str(path), use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # transformers, safetensors and the hub raise many kinds
        raise UserError(_load_message(path, "model", error)) from error
    if missing := sorted(set(report["missing_keys"]) - set(fresh)):
        raise UserError(
            f"{path}: *.safetensors: {len(missing)} weights of {type(model).__name__} are missing "
            f"({', '.join(missing[:4])}); expected all of them"
        )
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # torch's own kernel leaves the cap out (Gemma 2)
    loaded: PreTrainedModel = (model if quantized else model.to(device)).eval()
    return loaded


def check_adapter(
    path: str | Path, options: LoraOptions, option: str, trust_remote_code: bool = False
) -> None:
    """Raise UserError where an adapter with these options does not fit a model; no weights read."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        try:
            lora.add_adapter(model, options, str(path))
        except UserError as error:
            raise UserError(f"{option}.{error}") from error


def _load_adapted(
    folder: Path,
    base: str,
    device: torch.device | str,
    loader: Any,
    fresh: Sequence[str],
    merge: bool,
    options: dict[str, Any],
) -> PreTrainedModel:
    """The base model of an adapter's folder with the adapter, and a reward's head, in it."""
    config = read_json(folder / "config.json", "a model's config", "write the adapter again")
    quantization = lora.saved_quantization(folder)
    if quantization is not None:
        options["quantization_config"] = quantization
    if loader is not AutoModelForCausalLM:
        options.setdefault("num_labels", 1)
        fresh = (*fresh, "score.weight")
    model = load_model(base, device, loader, fresh, **options)
    if head := lora.load_adapter(model, folder):
        _load_head(model, head, folder)
    for name in (key for key in config if key.startswith("irl_")):
        setattr(model.config, name, config[name])
    model.requires_grad_(False).eval()
    if not (merge and lora.can_merge(model)):
        return model
    return lora.merge(model).requires_grad_(True)


def _load_head(model: PreTrainedModel, head: dict[str, Tensor], folder: Path) -> None:
    own: torch.nn.Module | None = getattr(model, "score", None)
    if own is None:
        raise UserError(f"{folder}: found the adapter of a reward, expected one of a policy")
    try:
        own.load_state_dict(head)
    except RuntimeError as error:
        raise UserError(f"{folder}: the reward's head: {' '.join(str(error).split())}") from error


def load_config(path: str | Path) -> PreTrainedConfig:
    """Config of a model's folder or Hub id. Raises UserError when there is none."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:
        raise UserError(_load_message(path, "model", error)) from error
    return config


def load_tokenizer(path: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer. Raises UserError when the folder or Hub id has none."""
    options.setdefault("trust_remote_code", False)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path), **options)
        # Of a folder with config.json alone some architectures make a tokenizer without a text.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError(f"its vocabulary has {len(tokenizer)} tokens, all of them special")
    except Exception as error:
        raise UserError(_load_message(path, "tokenizer", error)) from error
    return tokenizer


def _load_message(path: str | Path, what: str, error: Exception) -> str:
    cause = " ".join(str(error).split())[:300] or type(error).__name__
    if "custom code" in cause:
        return (
            f"{path}: this {what} comes with code of its own, which is not run; read it, and set "
            "trust_remote_code beside this model's path if you trust it"
        )
    folder = Path(path)
    if folder.is_dir():
        has = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        return (
            f"{path}: no usable {what} in this folder (it holds {has}); expected config.json, "
            f"*.safetensors and tokenizer files, written whole: {cause}"
        )
    if folder.is_absolute() or str(path).startswith(".") or str(path).count("/") > 1:
        return f"{path}: no such folder, expected one with a {what}, or an id of the Hub"
    return f"{path}: neither a folder nor a {what} that the Hub gave: {cause}"


def scratch_model(
    options: ScratchOptions, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """A model of random weights for this tokenizer; the same seed gives the same weights."""
    shape: dict[str, Any] = options.model_dump(exclude={"architecture", "vocab_size"})
    if options.num_key_value_heads is None:
        del shape["num_key_value_heads"]
    config = AutoConfig.for_model(
        options.architecture,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )
    with seeded(seed):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's CPU random numbers from `seed` inside the block, and as before after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def has_plain_logits(model: PreTrainedModel) -> bool:
    """Whether logits are the output layer's, neither scaled nor capped after it."""
    config = model.config.get_text_config()
    return all(getattr(config, name, None) in (None, 1, 1.0) for name in _LOGIT_TRANSFORMS)


def lm_head_logits(head: torch.nn.Module | Tensor, hidden: Tensor) -> Tensor:
    """Logits (..., V) of hidden states (..., H) by an output layer or its weight (V, H)."""
    if isinstance(head, Tensor):
        return torch.nn.functional.linear(hidden, head)
    logits: Tensor = head(hidden)
    return logits


def head_logprobs(head: torch.nn.Module | Tensor, hidden: Tensor, token_ids: Tensor) -> Tensor:
    """Log-prob (M,) of token ids (M,) by an output layer on hidden states (M, H), in pieces."""
    weight: Any = head if isinstance(head, Tensor) else head.weight  # (V, H)
    rows = max(1, LOGITS_AT_ONCE // weight.shape[0])
    pieces = zip(hidden.split(rows), token_ids.split(rows), strict=True)
    return torch.cat([chosen_logprobs(lm_head_logits(head, h), ids) for h, ids in pieces])


def completion_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    max_batch_tokens: int = TOKENS_PER_BATCH,
    progress: str | None = None,
) -> list[np.ndarray]:
    """Log-prob of every completion token given its prompt, at temperature 1.

    Token ids of P and T tokens per row; returns a float32 array (T,) per row. The output layer
    runs on completion positions only.
    """
    out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(prompts)
    direct = has_plain_logits(model)
    if not direct:  # the logits of all places are there at once
        vocabulary = model.config.get_text_config().vocab_size
        max_batch_tokens = min(max_batch_tokens, LOGITS_AT_ONCE // vocabulary)

    def one_batch(batch: list[int], packed: PackedRows) -> None:
        places = packed.places()  # the token at a place is predicted at the one before it
        real = torch.arange(places.shape[1] - 1, device=places.device) < packed.length[:, None]
        row = packed.row.repeat_interleave(packed.length)
        place, target = places[:, :-1][real], packed.input_ids[row, places[:, 1:][real]]
        if direct:
            hidden = hidden_states(model, packed)
            chosen = head_logprobs(model.get_output_embeddings(), hidden[row, place], target)
        else:
            logits = model(**model_inputs(packed)).logits[row, place]
            chosen = chosen_logprobs(logits, target)
        ends = np.cumsum([len(completions[i]) for i in batch])[:-1]
        for number, values in zip(batch, np.split(chosen.cpu().numpy(), ends), strict=True):
            out[number] = values

    over_packed(one_batch, model, prompts, completions, max_batch_tokens, progress)
    return out


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a completion: the tokenizer's EOS, and those of the generation config."""
    return _all_eos(getattr(model.generation_config, "eos_token_id", None), tokenizer)


def folder_eos_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """:func:`eos_ids` of the model in a folder."""
    file = path / "generation_config.json"
    configured = read_json(file, "a generation config", "delete it") if file.exists() else {}
    return _all_eos(configured.get("eos_token_id"), tokenizer)


def _all_eos(configured: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({int(tokenizer.eos_token_id), *(int(i) for i in listed if i is not None)})
