"""Sampling: prompt token ids in, completion token ids out.

``protocol`` holds the values and the protocol that every backend shares and needs no torch; a
backend is imported when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

from irl_align.models.generation.protocol import Completion, Generator, Sampling, generate

if TYPE_CHECKING:
    from irl_align.models.generation.transformers_backend import TransformersGenerator

__all__ = ["Completion", "Generator", "Sampling", "TransformersGenerator", "generate"]


def __getattr__(name: str) -> Any:
    if name == "TransformersGenerator":
        from irl_align.models.generation.transformers_backend import TransformersGenerator

        return TransformersGenerator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
