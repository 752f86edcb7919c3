"""Language models and tokenizers on disk: loaded and saved, with errors that name the folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GenericForSequenceClassification

from irl_align.config.model import LoraOptions, ScratchOptions
from irl_align.errors import UserError
from irl_align.models.lora import (
    add_adapter,
    base_of,
    has_adapter,
    head_in,
    is_adapter,
    is_foreign,
    load_adapter,
    merge_adapter,
    merge_foreign,
    require_bitsandbytes,
    save_adapter,
    saved_quantization,
)
from irl_align.utils import distributed
from irl_align.utils.files import read_json


def pick_device(name: str) -> torch.device:
    """Device of a recipe's `device` option; auto is CUDA where there is a GPU.

    Raises UserError for cuda without a GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("recipe: device: cuda, but torch sees no CUDA device; use cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU random numbers inside the block, and restore their state after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards, the modules that were in training mode are again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


# --- models ---------------------------------------------------------------------------------------


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    loader: Any = AutoModelForCausalLM,
    *,
    fresh: Sequence[str] = (),
    merge: bool = True,
    base: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a model folder or Hub id with `loader`, safetensors only, in eval mode.

    fresh: weights that may be missing; they start at random. merge: merge the adapter of a folder
    that holds one into its base, where the weights are float32. base: the base model of the
    adapter, in place of the one that its config names.
    Raises UserError: the folder is missing, incomplete or holds no such model, or other weights
    are missing.
    """
    if is_adapter(path):
        folder, base = Path(path), base or base_of(path)
        quantization = saved_quantization(folder)
        if quantization is not None:
            options["quantization_config"] = quantization
        if loader is not AutoModelForCausalLM:
            labels = 1 if is_foreign(folder) else load_config(folder).num_labels
            options.setdefault("num_labels", labels)  # more for an ensemble of heads
            fresh = (*fresh, "score.weight") if head_in(folder) else fresh
        model = load_model(base, device, loader, fresh=fresh, **options)
        return _with_adapter(model, folder, merge)
    options.setdefault("dtype", torch.float32)
    options.setdefault("trust_remote_code", False)  # transformers would ask on the terminal
    quantized = options.get("quantization_config") is not None
    if quantized:
        require_bitsandbytes(f"{path}: a model in 4 bits")
        options["device_map"] = {"": device}
    try:
        if loader is AutoModelForSequenceClassification:
            loader = classifier_class(_auto_config(path, **options))
        model, report = loader.from_pretrained(
            str(path), use_safetensors=True, output_loading_info=True, **options
        )
    except UserError:
        raise
    except Exception as error:  # transformers, safetensors and the hub raise many kinds
        raise UserError(_load_message(path, "model", error)) from error
    if missing := sorted(set(report["missing_keys"]) - set(fresh)):
        raise UserError(
            f"{path}: *.safetensors: {len(missing)} weights of {type(model).__name__} are missing "
            f"({', '.join(missing[:4])}); expected all of them"
        )
    if has_capped_attention(model.config):
        model.set_attn_implementation("eager")
    name_backbone(model)
    _keep_valid_generation(model)
    loaded: PreTrainedModel = (model if quantized else model.to(device)).eval()
    # transformers puts an adapter on the Hub into its base.
    return merge_adapter(loaded) if has_adapter(loaded) else loaded


def _with_adapter(model: PreTrainedModel, folder: Path, merge: bool) -> PreTrainedModel:
    """The base model with the adapter of a folder, a reward's head and our config entries."""
    if is_foreign(folder):
        merged: PreTrainedModel = merge_foreign(model, folder).eval()
        return merged
    if head := load_adapter(model, folder):
        _load_head(model, head, folder)
    config = read_json(folder / "config.json", "a model's config", "write the adapter again")
    for name in (key for key in config if key.startswith("irl_")):
        setattr(model.config, name, config[name])
    model.requires_grad_(False).eval()
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    return merge_adapter(model).requires_grad_(True) if merge and exact else model


def _load_head(model: PreTrainedModel, head: dict[str, Tensor], folder: Path) -> None:
    own: torch.nn.Module | None = getattr(model, "score", None)
    if own is None:
        raise UserError(f"{folder}: found the adapter of a reward, expected one of a policy")
    try:
        own.load_state_dict(head)
    except RuntimeError as error:
        raise UserError(f"{folder}: the reward's head: {' '.join(str(error).split())}") from error


def name_backbone(model: PreTrainedModel) -> None:
    """Make ``model.base_model`` the backbone where the class does not name it (Llama 4's text).

    Raises UserError: the model has no backbone apart from its output layer.
    """
    if model.base_model is model and isinstance(getattr(model, "model", None), torch.nn.Module):
        model.base_model_prefix = "model"
    if model.base_model is model:
        raise UserError(
            f"model: a {model.config.model_type} has no backbone apart from its output layer; "
            "expected a causal language model such as llama, mistral, qwen3, gpt_neox or gpt2"
        )


def classifier_class(config: PreTrainedConfig) -> Any:
    """The class that loads a reward of this architecture: AutoModelForSequenceClassification.

    transformers lacks a classifier of some causal models (Granite). It is then their backbone with
    a head, as transformers' generic class makes it. Raises UserError: there is no such backbone.
    """
    causal: Any = getattr(AutoModelForCausalLM, "_model_mapping").get(type(config), None)  # noqa: B009
    known = getattr(AutoModelForSequenceClassification, "_model_mapping")  # noqa: B009
    if type(config) in known or causal is None:
        return AutoModelForSequenceClassification
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    name_backbone(model)
    return _generic_classifier(causal, model.base_model_prefix)


@cache
def _generic_classifier(causal: Any, prefix: str) -> Any:
    parent = next(each for each in causal.__mro__[1:] if issubclass(each, PreTrainedModel))
    name = causal.__name__.replace("ForCausalLM", "") + "ForSequenceClassification"
    fields = {"config_class": causal.config_class, "base_model_prefix": prefix}
    return type(name, (GenericForSequenceClassification, parent), fields)


def empty_classifier(config: PreTrainedConfig) -> PreTrainedModel:
    """A reward of this architecture without weights, on the device meta.

    Raises ValueError: transformers has no sequence classifier for the config.
    """
    loader = classifier_class(config)
    with torch.device("meta"):
        if loader is AutoModelForSequenceClassification:
            model: PreTrainedModel = loader.from_config(config)
        else:
            model = loader(config)
    return model


def check_classifier(config: PreTrainedConfig) -> None:
    """Raise UserError if an explicit reward cannot be a head on this architecture; no weights."""
    head = None
    with contextlib.suppress(ValueError):  # no such class
        head = getattr(empty_classifier(config), "score", None)
    if head is None:
        raise UserError(
            f"reward.kind: explicit needs a score on the last hidden state, and the sequence "
            f"classifier of a {config.model_type} has none; expected another architecture, or kind "
            "implicit"
        )


def _keep_valid_generation(model: PreTrainedModel) -> None:
    """Drop sampling settings that transformers would refuse to save; samplers do not read them."""
    own = getattr(model, "generation_config", None)
    if own is None:
        return
    try:
        own.validate(strict=True)
    except ValueError:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = GenerationConfig(**{name: getattr(own, name) for name in ids})


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (safetensors), config and tokenizer; only the adapter where there is one.

    Among several processes only the main one writes.
    """
    if not distributed.is_main():
        return
    if has_adapter(model):
        save_adapter(model, folder)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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


def check_adapter(
    path: str | Path, options: LoraOptions, option: str, trust_remote_code: bool = False
) -> None:
    """Raise UserError where an adapter with these options does not fit a model; reads no weights.

    option: the recipe option that the message names.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        name_backbone(model)
        try:
            add_adapter(model, options, str(path))
        except UserError as error:
            raise UserError(f"{option}.{error}") from error


# --- configs and tokenizers -----------------------------------------------------------------------


def load_config(path: str | Path, **options: Any) -> PreTrainedConfig:
    """Config of a model's folder or Hub id; that of the base for an adapter without one.

    Raises UserError when there is none.
    """
    try:
        return _auto_config(base_of(path) if is_foreign(path) else path, **options)
    except Exception as error:
        raise UserError(_load_message(path, "model", error)) from error


def _auto_config(path: str | Path, **options: Any) -> PreTrainedConfig:
    names = ("revision", "trust_remote_code")
    hub = {"trust_remote_code": False, **{n: options[n] for n in names if n in options}}
    config: PreTrainedConfig = AutoConfig.from_pretrained(str(path), **hub)
    return config


def has_capped_attention(config: PreTrainedConfig) -> bool:
    """Whether attention scores are capped (Gemma 2): torch's own kernel leaves that out."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def load_tokenizer(path: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer, for an adapter without one that of its base.

    Raises UserError when the folder or Hub id has none.
    """
    options.setdefault("trust_remote_code", False)
    if is_foreign(path) and not list(Path(path).glob("tokenizer*")):
        path = base_of(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path), **options)
        # For a folder with only config.json some architectures make a tokenizer without a text.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError(f"its vocabulary has {len(tokenizer)} tokens, all of them special")
    except Exception as error:
        raise UserError(_load_message(path, "tokenizer", error)) from error
    # transformers reads some files by the class of the architecture, whatever they hold.
    ids = tokenizer("a b", add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id not in ids and " " not in tokenizer.decode(ids):
        raise UserError(
            f"{path}: tokenizer.json: transformers reads it as a {type(tokenizer).__name__}, as it "
            "does for this architecture, and then it loses the spaces of texts; expected a "
            "tokenizer of that kind"
        )
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that embeddings need for all tokens, those that were added included."""
    return 1 + max(tokenizer.get_vocab().values())


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of a model's input embeddings."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def require_embeddings(
    path: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise UserError if a token of the tokenizer has no row in the model's embeddings."""
    rows = embedding_rows(model)
    without = [token for token, number in tokenizer.get_vocab().items() if number >= rows]
    if without:
        raise UserError(
            f"{path}: the embeddings have {rows} rows, and {len(without)} tokens of the tokenizer "
            f"have none ({', '.join(map(repr, sorted(without)[:3]))}); expected a row for "
            "each: give the tokenizer that the model was trained with, or resize the embeddings"
        )


def _load_message(path: str | Path, what: str, error: Exception) -> str:
    cause = " ".join(str(error).split())[:300] or type(error).__name__
    if "custom code" in cause:
        return (
            f"{path}: this {what} comes with code of its own, which is not run; read it, and set "
            "trust_remote_code next to this model's path if you trust it"
        )
    folder = Path(path)
    inside = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    whole = {"config.json"} <= {*inside} and any(name.endswith(".safetensors") for name in inside)
    if folder.suffix == ".gguf" or (not whole and any(n.endswith(".gguf") for n in inside)):
        return (
            f"{path}: found GGUF, the format of llama.cpp, expected the {what} that it was "
            "converted from: config.json, *.safetensors and tokenizer files"
        )
    if "Padding_idx" in cause:
        return (
            f"{path}: config.json: pad_token_id has no row in the embeddings; expected an id below "
            "vocab_size, or null"
        )
    if isinstance(error, ValueError) and whole and what == "model":
        return f"{path}: transformers cannot load this model: {cause}"
    if folder.is_dir():
        files = ", ".join(inside[:8]) or "nothing"
        return (
            f"{path}: no usable {what} in this folder (it holds {files}); expected config.json, "
            f"*.safetensors and tokenizer files, all complete: {cause}"
        )
    if folder.is_absolute() or str(path).startswith(".") or str(path).count("/") > 1:
        return f"{path}: no such folder, expected one with a {what}, or an id of the Hub"
    return f"{path}: neither a folder nor a {what} that the Hub gave: {cause}"


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a completion: the tokenizer's EOS, then the others of the generation config."""
    return _all_eos(getattr(model.generation_config, "eos_token_id", None), tokenizer)


def folder_eos_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """:func:`eos_ids` of the model in a folder."""
    file = path / "generation_config.json"
    configured = read_json(file, "a generation config", "delete it") if file.exists() else {}
    return _all_eos(configured.get("eos_token_id"), tokenizer)


def _all_eos(configured: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    listed = configured if isinstance(configured, list) else [configured]
    end = int(tokenizer.eos_token_id)
    return [end, *sorted({int(i) for i in listed if i is not None} - {end})]
