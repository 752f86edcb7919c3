"""The command line with FSDP on a CPU, which torch can do and accelerate leaves out.

Run by `accelerate launch` in place of irl_align; for tests.
"""

from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from irl_align.cli.main import main

_plain = AcceleratorState.__init__


def _with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
    if getattr(self, "fsdp_plugin", None) is not None:  # every new view of the state resets it
        self.distributed_type = DistributedType.FSDP


AcceleratorState.__init__ = _with_fsdp  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
