"""LoRA adapters on transformers' models: added, switched, saved, loaded and merged.

peft's layers stand inside the model (transformers' own integration), which keeps its class: what
takes a language model also takes one with an adapter. In a store, base_model_name_or_path is
relative to the nearest folder that holds both adapter and base, so that a store can be moved.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from irl_align.config.model import ALL_LINEAR, LoraOptions, QuantizationOptions
from irl_align.errors import UserError
from irl_align.utils.files import atomic_write, read_json, to_json

DEFAULT_ADAPTER = "default"  # name of the adapter that a model is saved with
ADAPTER_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of peft's names in files
_HEAD = "score"  # a reward's head, saved with its adapter
_REWRITE = "write the adapter again"


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, and not a whole model."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def is_foreign(folder: str | Path) -> bool:
    """Whether a folder holds an adapter as peft and TRL write it: without the model's config."""
    return is_adapter(folder) and not (Path(folder) / "config.json").is_file()


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has adapters in it."""
    return bool(getattr(model, "peft_config", None))


def base_of(folder: str | Path) -> str:
    """The whole model under the model in a folder: the base of its adapter, or the folder itself.

    Returns a folder, or the Hub id that an adapter from elsewhere names. Raises UserError where the
    adapter names no base.
    """
    if not is_adapter(folder):
        return str(Path(folder).absolute())
    file = Path(folder) / ADAPTER_CONFIG
    named = read_json(file, "an adapter's settings", _REWRITE).get("base_model_name_or_path")
    if not named:
        raise UserError(f"{file}: base_model_name_or_path: found none, expected the base model")
    for above in Path(folder).absolute().parents:
        if (above / named / "config.json").is_file():
            return str(above / named)
    return str(named)


# --- into a model ---------------------------------------------------------------------------------


def add_adapter(model: PreTrainedModel, options: LoraOptions, base: str) -> None:
    """Put a new adapter into the model and freeze the rest; the model's function does not change.

    A is random, by torch's global numbers, and B is 0; both are float32. Raises UserError where
    target_modules are not linear layers of the backbone.
    """
    targets = options.target_modules
    config = LoraConfig(
        **options.model_dump(exclude={"target_modules"}),
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        task_type=_task_type(model),
    )
    try:
        _inject(model, config, DEFAULT_ADAPTER)
    except ValueError as error:
        raise UserError(_no_targets(model, targets)) from error
    config.base_model_name_or_path = base
    _check_targets(model, targets)


def _task_type(model: PreTrainedModel) -> str:
    """peft's name of what a model is, by which peft chooses the class that loads its adapter."""
    return "CAUSAL_LM" if model.can_generate() else "SEQ_CLS"


def _check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    """Raise UserError unless each target is adapted, and only linear layers of the backbone are."""
    adapted = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    for target in targets if list(targets) != [ALL_LINEAR] else ():
        if not any(name == target or name.endswith(f".{target}") for name in adapted):
            raise UserError(_no_targets(model, [target]))
    for name, layer in adapted.items():
        inside = name.startswith(f"{model.base_model_prefix}.")
        if not inside or not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
            raise UserError(
                f"target_modules: {name} is no linear layer of the backbone; expected some of "
                f"{_linear_names(model)}"
            )


def _no_targets(model: PreTrainedModel, targets: Sequence[str]) -> str:
    return (
        f"target_modules: found no {', '.join(targets)} in a {model.config.model_type}; "
        f"expected {ALL_LINEAR}, or some of {_linear_names(model)}"
    )


def _linear_names(model: PreTrainedModel) -> str:
    linear = (nn.Linear, Conv1D, BaseTunerLayer)
    modules = model.base_model.named_modules()
    own = (name for name, m in modules if isinstance(m, linear) and "lora_" not in name)
    return ", ".join(sorted({n.removesuffix(".base_layer").rsplit(".", 1)[-1] for n in own}))


def load_adapter(
    model: PreTrainedModel, folder: str | Path, name: str = DEFAULT_ADAPTER
) -> dict[str, Tensor]:
    """Put a saved adapter into its base model, and freeze the rest.

    Returns the weights of a reward's head by their names in it; a policy's adapter has none.
    Raises UserError: the adapter is incomplete, not LoRA, or of another model.
    """
    folder = Path(folder)
    config, state = _read(folder)
    prefix = f"{_PREFIX}{_HEAD}."
    head = {
        key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)
    }
    config.modules_to_save = None  # the head, which is not among the adapted layers here
    try:
        with torch.random.fork_rng(devices=[]):  # peft draws weights that are then replaced
            _inject(model, config, name)
        result: Any = set_peft_model_state_dict(model, state, name)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(_other_model(folder, model, str(error))) from error
    config.base_model_name_or_path = base_of(folder)
    missing = set(result.missing_keys) & set(adapter_weights(model, name))
    if missing or result.unexpected_keys:
        wrong = f"{len(missing)} weights missing, {len(result.unexpected_keys)} unknown"
        raise UserError(_other_model(folder, model, wrong))
    return head


def merge_foreign(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The base model with an adapter of any kind of peft merged into its weights.

    Raises UserError: the adapter is incomplete, or of another model.
    """
    try:
        head_in(folder)  # peft would read pickled weights in place of missing ones
        merged: PreTrainedModel = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except UserError:
        raise
    except Exception as error:  # peft and torch raise many kinds
        raise UserError(_other_model(folder, model, str(error))) from error
    return merged


def head_in(folder: Path) -> bool:
    """Whether an adapter has a reward's head. Raises UserError: its weights cannot be read."""
    try:
        with safe_open(folder / _WEIGHTS, "pt") as weights:
            return any(name.startswith(f"{_PREFIX}{_HEAD}.") for name in weights.keys())  # noqa: SIM118
    except Exception as error:  # safetensors raises many kinds
        raise _incomplete(folder, error) from error


def _inject(model: PreTrainedModel, config: LoraConfig, name: str) -> None:
    """Put peft's layers into the model, in float32, and in the model's mode (they have dropout).

    peft's warnings about a second adapter and about GPT-2's kind of linear layer are expected.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        model.add_adapter(config, name)
    for weight in adapter_weights(model, name).values():
        weight.data = weight.data.float()
    model.train(model.training)


def _read(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Settings and weights of a saved adapter."""
    kind = read_json(folder / ADAPTER_CONFIG, "an adapter's settings", _REWRITE).get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder / ADAPTER_CONFIG}: peft_type: found {kind}, expected LORA")
    try:
        return LoraConfig.from_pretrained(str(folder)), load_file(folder / _WEIGHTS)
    except Exception as error:  # peft and safetensors raise many kinds
        raise _incomplete(folder, error) from error


def _incomplete(folder: Path, error: Exception) -> UserError:
    cause = " ".join(str(error).split())[:200]
    return UserError(
        f"{folder / _WEIGHTS}: no complete adapter: {cause}; expected {ADAPTER_CONFIG} and "
        f"{_WEIGHTS}"
    )


def _other_model(folder: Path, model: PreTrainedModel, cause: str) -> str:
    kind = f"{type(model).__name__} ({model.config.model_type})"
    return (
        f"{folder}: the adapter does not fit its base model, found a {kind}; expected the model "
        f"that it was trained on: {' '.join(cause.split())[:160]}"
    )


def adapter_weights(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The weights of one adapter, by their names in the model."""
    return {
        key: weight
        for key, weight in model.named_parameters()
        if "lora_" in key and f".{name}." in key
    }


def train_only(model: nn.Module, *names: str) -> None:
    """Train the weights of these adapters, and no others."""
    model.requires_grad_(False)
    for name in names:
        for weight in adapter_weights(model, name).values():
            weight.requires_grad_(True)


def copy_adapter(model: PreTrainedModel, source: str, name: str) -> None:
    """Add an adapter that equals one that the model has."""
    config: Any = copy.deepcopy(model.peft_config[source])
    with torch.random.fork_rng(devices=[]):
        _inject(model, config, name)
    own = adapter_weights(model, source)
    for key, weight in adapter_weights(model, name).items():
        weight.data = own[key.replace(f".{name}.", f".{source}.")].detach().clone()


def merge_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """W + scale * B A in place of each adapted layer: the same function, without adapters."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    model.delete_adapter(DEFAULT_ADAPTER)
    return model


class AdapterSwitch:
    """Chooses which adapter of a backbone is active: one at a time, or none.

    Which weights are trained does not change: peft's own switch would freeze the inactive ones.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self.active: str | None = DEFAULT_ADAPTER
        self.reset()

    def reset(self) -> None:
        """Activate the model's own adapter, for example after another one was added."""
        self._set(DEFAULT_ADAPTER)

    @contextlib.contextmanager
    def on(self, name: str | None) -> Iterator[None]:
        """Activate only the adapter of this name inside the block, and the previous one after it.

        name: None for no adapter.
        """
        before = self.active
        self._set(name)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, name: str | None) -> None:
        for layer in self.layers:
            trained = [(weight, weight.requires_grad) for weight in layer.parameters()]
            layer.set_adapter([] if name is None else [name])
            for weight, flag in trained:
                weight.requires_grad_(flag)
        self.active = name


# --- on disk --------------------------------------------------------------------------------------


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write a model's adapter in peft's format, a reward's head with it, and the model's config."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(
        model, adapter_name=DEFAULT_ADAPTER, save_embedding_layers=False
    )
    config: Any = copy.deepcopy(model.peft_config[DEFAULT_ADAPTER])
    config.inference_mode = True
    config.task_type = _task_type(model)  # a reward's adapter may continue a policy's
    head: Any = getattr(model, _HEAD, None)
    if head is not None:
        config.modules_to_save = [_HEAD]
        state |= {f"{_HEAD}.{name}": weight for name, weight in head.state_dict().items()}
    config.base_model_name_or_path = _reference(str(config.base_model_name_or_path), folder)
    tensors = {_PREFIX + name: weight.detach().contiguous() for name, weight in state.items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    values = {  # peft has sets, whose order differs between processes
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
    }
    atomic_write(folder / ADAPTER_CONFIG, to_json(dict(sorted(values.items())), indent=2) + "\n")


def _reference(base: str, folder: Path) -> str:
    """A base's path from the nearest folder that holds both; Hub ids and unrelated paths stay."""
    if not Path(base).is_absolute():
        return base
    above = os.path.commonpath([base, folder.absolute()])
    return base if above == os.path.sep else os.path.relpath(base, above)


def _trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def save_trained(model: nn.Module, file: Path) -> None:
    """Write the weights that are trained: all that a checkpoint needs besides the base."""
    save_file({name: w.detach().contiguous() for name, w in _trained_weights(model).items()}, file)


def load_trained(model: nn.Module, file: Path) -> None:
    """Read what :func:`save_trained` wrote into the same model."""
    saved = load_file(file)
    with torch.no_grad():
        for name, weight in _trained_weights(model).items():
            weight.copy_(saved[name])


# --- four bits ------------------------------------------------------------------------------------


def quantization_config(options: QuantizationOptions) -> BitsAndBytesConfig:
    """transformers' settings of a 4-bit model."""
    return BitsAndBytesConfig(load_in_4bit=True, **options.model_dump())


def saved_quantization(folder: Path) -> BitsAndBytesConfig | None:
    """Quantization of the base that an adapter was trained on; None if that was not in 4 bits."""
    if is_foreign(folder):
        return None
    config = read_json(folder / "config.json", "a model's config", _REWRITE)
    settings = config.get("quantization_config")
    return None if settings is None else BitsAndBytesConfig.from_dict(settings)


@contextlib.contextmanager
def kept_precision(model: nn.Module) -> Iterator[None]:
    """Undo the rounding to bfloat16 that TRL's trainers apply to the adapters of a 4-bit model."""
    before = {weight: weight.data for weight in _trained_weights(model).values()}
    yield
    for weight, data in before.items():
        weight.data = data


def require_bitsandbytes(what: str) -> None:
    """Raise UserError where bitsandbytes is not installed. what: who needs it, for the message."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{what} needs bitsandbytes: pip install 'irl-align[qlora]'")
