"""The command line with DeepSpeed on a CPU, which DeepSpeed can do and accelerate leaves out.

Run by `accelerate launch` in place of irl_align, with DS_ACCELERATOR=cpu; for tests.
"""

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from irl_align.cli.main import main

_partial, _whole = PartialState.__init__, AcceleratorState.__init__


def _partial_state(self: Any, cpu: bool = False, **kwargs: Any) -> None:
    """Asked for a CPU, accelerate takes its own data parallelism; so it is not asked."""
    _partial(self, cpu=False, **kwargs)


def _state(self: Any, mixed_precision: str | None = None, cpu: bool = False, **more: Any) -> None:
    _whole(self, mixed_precision, cpu=False, **more)


PartialState.__init__ = _partial_state  # type: ignore[method-assign]
AcceleratorState.__init__ = _state  # type: ignore[method-assign]
PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
