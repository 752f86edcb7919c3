"""Methods that ``--worker-extension-cls`` adds to vLLM's workers.

vLLM imports this module in the process of its engine, which may be a server on another machine.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

EXTENSION = "irl_align.models.generation.vllm_worker.PolicyWeights"
SHAPE_VARIABLE = "IRL_ALIGN_VLLM_SHAPE"
# Fields of config.json that do not change the shapes of the weights.
_INCIDENTAL = {
    "_name_or_path",
    "irl_prompt",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
}


def shape_of(folder: Path) -> dict[str, Any]:
    """The part of config.json that decides which weights fit: equal shapes fit each other.

    Raises:
        OSError, ValueError: there is no such file, or it is not JSON.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokens = {name for name in config if name.endswith("_token_id")}
    return {name: value for name, value in config.items() if name not in _INCIDENTAL | tokens}


def remember_shape(folder: Path) -> None:
    """Pass the shape of the model that vLLM starts with to the processes that it starts.

    The folder may be gone later: PPO replaces the folder that its rollouts come from.
    """
    os.environ[SHAPE_VARIABLE] = json.dumps(shape_of(folder))


class PolicyWeights:
    """Base class that vLLM adds to its workers: replaces weights in place, tied ones included."""

    model_runner: Any  # attribute of vLLM's worker

    def load_policy(self, path: str) -> dict[str, Any]:
        """Read the weights of a policy's folder into the running model.

        On a CPU vLLM computes linear layers from packed copies. Its reload packs every layer whose
        weights are in the files. A tied output layer has none there, and would silently keep the
        copy of the old weights, so output layers are packed again here.

        Returns:
            {"error": message} if the folder cannot be loaded, since vLLM's engine does not survive
            an exception here. Otherwise {"output_layers": how many were packed again}.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        if error := self._refusal(Path(path)):
            return {"error": error}
        self.model_runner.reload_weights(weights_path=path)
        model = self.model_runner.get_model()
        heads = [module for module in model.modules() if isinstance(module, ParallelLMHead)]
        for head in heads:
            head.quant_method.process_weights_after_loading(head)
        return {"output_layers": len(heads)}

    def _refusal(self, path: Path) -> str | None:
        """Why the weights in a folder cannot become those of the running model."""
        own = json.loads(os.environ[SHAPE_VARIABLE])
        try:
            shape = shape_of(path)
        except (OSError, ValueError) as error:
            return f"no readable config.json there: {error}"
        if not any(path.glob("*.safetensors")):
            return "no *.safetensors there"
        differing = sorted(name for name in own | shape if own.get(name) != shape.get(name))
        if differing:
            name = differing[0]
            return (
                f"{name} is {shape.get(name)} there and {own.get(name)} in the model that vLLM was "
                "started with"
            )
        return None
