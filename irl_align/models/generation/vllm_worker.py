"""What runs inside vLLM's workers: methods added to them by ``--worker-extension-cls``.

vLLM imports this in the process of its engine, which may be a server on another machine.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

EXTENSION = "irl_align.models.generation.vllm_worker.PolicyWeights"
SHAPE_VARIABLE = "IRL_ALIGN_VLLM_SHAPE"
# Fields of config.json that say how a model came about, not what its weights look like.
_INCIDENTAL = {
    "_name_or_path",
    "irl_prompt",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
}


def shape_of(folder: Path) -> dict[str, Any]:
    """What config.json says of a model's layers; models of equal shape take each other's weights.

    Raises:
        OSError, ValueError: there is no such file, or it is no JSON.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokens = {name for name in config if name.endswith("_token_id")}
    return {name: value for name, value in config.items() if name not in _INCIDENTAL | tokens}


def remember_shape(folder: Path) -> None:
    """Keep the shape of the model that vLLM starts with, for the processes that it starts.

    Its folder need not last as long as the engine: PPO's rollouts come from one that is replaced.
    """
    os.environ[SHAPE_VARIABLE] = json.dumps(shape_of(folder))


class PolicyWeights:
    """New weights in place, tied output layers included."""

    model_runner: Any  # vLLM's, whose worker has this class as a base

    def load_policy(self, path: str) -> dict[str, Any]:
        """Read the weights of a policy's folder into the running model.

        On a CPU vLLM computes linear layers from packed copies. Its reload packs every layer whose
        weights it reads from the files, and a tied output layer has none there: it would go on
        with the copy of the old weights, silently. So output layers are packed again.

        Returns:
            ``error`` in words, if the folder cannot be loaded: vLLM's engine does not survive an
            exception here. Else ``output_layers``, how many were packed again.
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
        wanted = json.loads(os.environ[SHAPE_VARIABLE])
        try:
            found = shape_of(path)
        except (OSError, ValueError) as error:
            return f"no readable config.json there: {error}"
        if not any(path.glob("*.safetensors")):
            return "no *.safetensors there"
        differing = sorted(k for k in wanted | found if wanted.get(k) != found.get(k))
        if differing:
            name = differing[0]
            return (
                f"{name} is {found.get(name)} there and {wanted.get(name)} in the model that "
                "vLLM was started with"
            )
        return None
